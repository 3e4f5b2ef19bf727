"""Trajectories as values, for benchmarks without HTTP: each prompt extends what came before."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from benchmarks.payloads import random_ids, random_routes, random_words
from driftgate.trace import Engine, Proof, Routes, Sampling, Trace, TraceMeta

__all__ = ["Growth", "trajectory"]

ENGINE = Engine(name="vllm", version="0.29.0", model="bench", logprobs_mode="raw_logprobs")
STARTED_NS = 1_795_000_000_000_000_000


@dataclass(frozen=True, slots=True)
class Growth:
    """Each turn adds ``before`` prompt tokens and ``response`` sampled ones."""

    turns: int
    before: int
    response: int
    routes: bool = False
    vocabulary: int | None = None
    """Ids are below this; None: as a large tokenizer's."""

    @property
    def tokens(self) -> int:
        """P + R of the last turn."""
        return self.turns * (self.before + self.response)


def trajectory(growth: Growth, *, seed: int = 0) -> list[Trace]:
    """The traces of one trajectory, turn by turn. Arrays are views of one long run of tokens."""
    total = growth.tokens
    ids = random_ids(total, seed=seed).astype(np.int32)
    if growth.vocabulary is not None:
        ids %= growth.vocabulary
    words = random_words(total, seed=seed + 1)
    logprobs = -np.random.default_rng(seed + 2).exponential(0.4, total).astype(np.float32)
    routes = random_routes(total, seed=seed + 3) if growth.routes else None
    messages = [{"role": "system", "content": "You are a coding agent."}]
    traces = []
    for turn in range(growth.turns):
        start = turn * (growth.before + growth.response)
        prompt_len, end = start + growth.before, start + growth.before + growth.response
        messages.append({"role": "user", "content": "".join(words[start:prompt_len])})
        text = "".join(words[prompt_len:end])
        lengths = [len(word) for word in words[prompt_len:end]]
        message = {"role": "assistant", "content": text}
        traces.append(
            Trace(
                meta=_meta(turn, prompt_len, growth.response, seed, routes),
                prompt_ids=ids[:prompt_len],
                response_ids=ids[prompt_len:end],
                logprobs=logprobs[prompt_len:end],
                routes=None if routes is None else routes[: end - 1],
                token_bytes=text.encode(),
                token_offsets=np.cumsum([0, *lengths]).astype(np.int32),
                request=msgspec.json.encode({"messages": messages, "model": "bench"}),
                response=msgspec.json.encode({"message": message, "finish_reason": "stop"}),
            )
        )
        messages.append(message)
    return traces


def _meta(turn: int, prompt: int, response: int, seed: int, routes: Routes | None) -> TraceMeta:
    parent_len = prompt - prompt // (turn + 1) + response if turn else 0
    return TraceMeta(
        trace_id=f"call-{seed}-{turn}.0",
        call_id=f"call-{seed}-{turn}",
        trajectory=f"bench-{seed}",
        step=turn,
        choice=0,
        api="chat",
        model="bench",
        attribution="prefix" if turn else "new",
        parent=f"call-{seed}-{turn - 1}.0" if turn else None,
        prefix_len=parent_len,
        prefix_exact=turn > 0,
        engine=ENGINE,
        sampling=Sampling(),
        streamed=False,
        routes_via="none" if routes is None else "json",
        finish_reason="stop",
        proof=Proof(
            ids=response,
            logprob_rows=response,
            usage_completion=response,
            usage_prompt=prompt,
            prompt_ids=prompt,
            route_rows=None if routes is None else prompt + response - 1,
            text_matches=True,
            terminal=True,
        ),
        started_ns=STARTED_NS + turn,
        ended_ns=STARTED_NS + turn + 1,
    )

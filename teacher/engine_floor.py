"""An engine against itself, on what it has already answered: its noise floor, measured on request.

Two ways. *Repeat*: the same prompt, settings and seed again; where the stored answer had no seed of
its own, twice now. *Decode against prefill*: the tokens that the engine decoded one by one, read
back all at once as a prompt; both are its own numbers for one text, and no seed is needed.

Refused, with the reason counted: an engine that is not the one of the traces, logprobs that prefill
does not give (vLLM's prompt logprobs are raw), and settings that cannot be asked for again.
Requests go to the engine itself and are not recorded. No torch.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
import msgspec
import numpy as np

from driftgate.adapters.vllm import Vllm
from driftgate.errors import DriftgateError, UpstreamError
from driftgate.facts import as_sampled, constraints
from driftgate.floor import PREFILL
from driftgate.teacher.held import Held, hold
from driftgate.teacher.scores import Run, floor
from driftgate.temperature import effective_temperature
from driftgate.trace import F32, I32, Engine, Routes, Score, Trace, TraceMeta

__all__ = ["EngineFloors"]

REQUEST_TIMEOUT_S = 600.0
"""One answer of a few thousand tokens, behind whatever the engine is busy with."""

SEED = 0
"""Of two runs over a prompt whose own answer had none."""

ASKABLE = (
    *("temperature", "top_p", "top_k", "min_p", "min_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
"""Settings of ``Sampling`` that a completions request can carry as they are stored."""


class _Skip(DriftgateError):
    """This run is not possible for this trace; the message says why, alike for all such traces."""


class _Answer(NamedTuple):
    """One completion of ``n`` tokens."""

    ids: I32
    run: Run


@dataclass(slots=True)
class EngineFloors:
    """Measures the floors of one engine over stored traces."""

    url: str
    """Of the engine, without ``/v1``."""
    key: str | None = None
    concurrency: int = 4
    """Requests in flight: 1 measures the engine when it has nothing else to do; more let it batch,
    as rollouts do."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Runs that were not made, by reason."""

    def measure(self, traces: list[Trace], known: set[tuple[str, str]]) -> list[Score]:
        """Floors of ``traces``, of both kinds where possible.

        ``known``: (trace id, digest of the second side) of floors that there are already. Raises
        ``UpstreamError`` where no engine answers.
        """
        return asyncio.run(self._measure(traces, known))

    async def _measure(self, traces: list[Trace], known: set[tuple[str, str]]) -> list[Score]:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        free = asyncio.Semaphore(self.concurrency)
        async with httpx.AsyncClient(
            base_url=self.url.rstrip("/"), headers=headers, timeout=REQUEST_TIMEOUT_S
        ) as http:

            async def one(trace: Trace, kind: Any) -> Score | None:
                async with free:
                    try:
                        score: Score = await kind(http, hold(trace))
                    except _Skip as reason:
                        self.skipped[str(reason)] += 1
                        return None
                    return score

            kinds = (self._repeat, self._prefill)
            measured = await asyncio.gather(*(one(t, kind) for kind in kinds for t in traces))
        scores = [score for score in measured if score is not None]
        new = [s for s in scores if (s.meta.trace_id, s.meta.trainer.digest) not in known]
        if len(new) < len(scores):
            self.skipped["measured before"] += len(scores) - len(new)
        return new

    async def _repeat(self, http: httpx.AsyncClient, held: Held) -> Score:
        """The same request again; the two answers are compared as far as they share tokens."""
        trace, meta = held.trace, held.trace.meta
        assert trace.logprobs is not None
        assert trace.response_ids is not None
        body = _sampled_again(trace)
        seeded = meta.sampling.seed is not None and meta.sampling.n == 1
        if seeded:
            first = _Answer(trace.response_ids, Run(trace.logprobs, held.routes))
        else:
            first = await self._complete(http, trace, body)
        second = await self._complete(http, trace, body)
        shared = _shared(first.ids, second.ids)
        if not shared:
            raise _Skip("two runs with one seed share no token: this engine does not repeat itself")
        return floor(
            meta,
            first.ids[:shared],
            _cut(first.run, shared),
            _cut(second.run, shared),
            side=meta.engine,
            now_ns=time.time_ns(),
            foreign=not seeded,
        )

    async def _prefill(self, http: httpx.AsyncClient, held: Held) -> Score:
        """The stored answer read back as a prompt."""
        trace, meta = held.trace, held.trace.meta
        assert trace.prompt_ids is not None
        assert trace.response_ids is not None
        assert trace.logprobs is not None
        _check_raw(meta)
        start, ids = len(trace.prompt_ids), np.concatenate([trace.prompt_ids, trace.response_ids])
        answer = await self._ask(
            http,
            meta,
            {"prompt": ids.tolist(), "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0.0},
        )
        choice = answer["choices"][0]
        rows = (choice.get("prompt_logprobs") or [])[start:]
        if len(rows) != len(trace.response_ids):
            raise _Skip("the engine gives no logprobs of a prompt")
        said = [row[str(token)]["logprob"] for row, token in zip(rows, ids[start:], strict=True)]
        routes = _routes(choice, prompt_len=len(ids), response_len=1)
        second = Run(
            np.asarray(said, np.float32),
            None if routes is None else routes[start - 1 : len(ids) - 1],
        )
        return floor(
            meta,
            trace.response_ids,
            Run(trace.logprobs, held.routes),
            second,
            side=meta.engine,
            now_ns=time.time_ns(),
            label=PREFILL,
        )

    async def _complete(
        self, http: httpx.AsyncClient, trace: Trace, body: dict[str, Any]
    ) -> _Answer:
        """The trace's prompt, answered anew."""
        assert trace.prompt_ids is not None
        choice = (await self._ask(http, trace.meta, body))["choices"][0]
        ids = np.asarray(choice.get("token_ids") or (), np.int32)
        said: F32 = np.asarray((choice.get("logprobs") or {}).get("token_logprobs"), np.float32)
        if not len(ids) or said.shape != ids.shape:
            raise _Skip("the engine gives no token ids or logprobs")
        prompt_len = len(trace.prompt_ids)
        routes = _routes(choice, prompt_len=prompt_len, response_len=len(ids))
        return _Answer(ids, Run(said, None if routes is None else routes[prompt_len - 1 :]))

    async def _ask(
        self, http: httpx.AsyncClient, meta: TraceMeta, body: dict[str, Any]
    ) -> dict[str, Any]:
        """A completion by the engine of ``meta``. Skips where it is another one, or refuses."""
        try:
            answer = await http.post("/v1/completions", json={"model": meta.model, **body})
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise UpstreamError(
                f"no engine answers at {self.url}: {why}; give --engine the URL that serves the "
                "model"
            ) from error
        if answer.status_code != 200:
            raise _Skip(f"the engine answered {answer.status_code}: {answer.text[:200]}")
        said = msgspec.json.decode(answer.content, type=dict[str, Any])
        theirs = said.get("system_fingerprint")
        if None not in (theirs, meta.engine.system_fingerprint) and (
            theirs != meta.engine.system_fingerprint
        ):
            raise _Skip(f"the engine is {theirs}, the trace is of {meta.engine.system_fingerprint}")
        return said


def _sampled_again(trace: Trace) -> dict[str, Any]:
    """The request whose answer ``trace`` is, by its token ids."""
    assert trace.prompt_ids is not None
    assert trace.response_ids is not None
    asked = trace.meta.sampling
    if asked.structured or asked.logit_bias or asked.bad_words or asked.allowed_token_ids:
        raise _Skip("a grammar or banned tokens, which the trace does not hold in full")
    if asked.beam_search:
        raise _Skip("beam search")
    settings = {name: value for name in ASKABLE if (value := getattr(asked, name)) is not None}
    return {
        "prompt": trace.prompt_ids.tolist(),
        "max_tokens": len(trace.response_ids),
        "seed": SEED if asked.seed is None else asked.seed,
        "ignore_eos": True,  # an end that comes sooner is a difference, and is seen as one
        "logprobs": 0,
        Vllm.ask_ids: True,
        **settings,
    }


def _check_raw(meta: TraceMeta) -> None:
    """Skip where the stored logprobs are not what a prompt's are."""
    engine: Engine = meta.engine
    if meta.sampling.structured:
        raise _Skip("a grammar masked the logprobs of the answer")
    if engine.logprobs_mode == "raw_logprobs":
        return
    used = as_sampled(engine, meta.sampling)
    plain = effective_temperature(used.temperature) == 1.0 and not constraints(used)
    if engine.logprobs_mode != "processed_logprobs" or not plain:
        raise _Skip(f"logprobs of a prompt are raw, those of the answer {engine.logprobs_mode}")


def _routes(choice: dict[str, Any], *, prompt_len: int, response_len: int) -> Routes | None:
    encoded = choice.get("routed_experts")
    if not encoded:
        return None
    try:
        return Vllm().decode_routes(
            encoded.encode(), prompt_len=prompt_len, response_len=response_len
        )
    except ValueError:
        return None  # the floor of the logprobs stands without it, and says that it has no routes


def _shared(a: I32, b: I32) -> int:
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if different.size else length


def _cut(run: Run, tokens: int) -> Run:
    routes = None if run.routes is None else run.routes[:tokens]
    return Run(run.logprobs[:tokens], routes)

"""What the fault server says. Every answer is made of its call's name, so any stored byte tells
whether it is the one that was sent."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from driftgate.trace import Trace

__all__ = ["MODEL", "Said", "Spell", "is_exact", "is_part", "plain_text", "request", "say"]

MODEL = "reliability"
FINGERPRINT = "vllm-0.29.0-reliability"
FIRST_ID, IDS = 300, 1200
"""Inside the vocabulary of ``driftgate.testing.checkpoints``, above its bytes."""
PROMPT, RESPONSE = 6, 8

LONG_TEXT = 10_000
"""A text of megabytes says its bytes by itself."""

Spell = Callable[[int], str]
"""The text of a token id."""


def plain_text(token: int) -> str:
    """A text that says its id."""
    return f" w{token}"


def request(fault: str, name: str, *, stream: bool, **more: Any) -> bytes:
    """The body of a call; the fault server reads its instruction and the call's name from it."""
    messages = [{"role": "user", "content": f"{fault} {name}"}]
    return json.dumps({"model": MODEL, "messages": messages, "stream": stream, **more}).encode()


@dataclass(frozen=True, slots=True)
class Said:
    """One answer, as numbers and in the forms of vLLM 0.29."""

    name: str
    prompt_ids: list[int]
    """[P]"""
    ids: list[int]
    """[R]"""
    logprobs: list[float | None]
    """[R] nats"""
    texts: list[str]
    """[R]"""
    asked: bool
    """Ids and logprobs were asked for."""

    @property
    def content(self) -> str:
        """What the agent reads."""
        return "".join(self.texts)

    def chat(self, **choice_more: Any) -> bytes:
        """The JSON answer; ``choice_more`` over the fields of its choice."""
        message = {"role": "assistant", "content": self.content, "refusal": None}
        choice: dict[str, Any] = {"index": 0, "message": message, "logprobs": None}
        if self.asked:
            rows = [self._row(i) for i in range(len(self.ids))]
            choice["logprobs"] = {"content": rows}
        choice |= {"finish_reason": "stop", "stop_reason": None}
        choice |= {"token_ids": self.ids if self.asked else None}
        prompt = self.prompt_ids if self.asked else None
        body = self._head("chat.completion") | {"choices": [choice | choice_more]}
        usage = {"prompt_tokens": len(self.prompt_ids), "completion_tokens": len(self.ids)}
        body |= {"system_fingerprint": FINGERPRINT, "usage": usage, "prompt_token_ids": prompt}
        return _dump(body)

    def events(self) -> list[bytes]:
        """The same as server-sent events: role, one for each token, ``[DONE]``."""
        opening = self._head("chat.completion.chunk")
        first: dict[str, Any] = {"index": 0, "delta": {"role": "assistant", "content": ""}}
        chunks = [opening | {"choices": [first | {"logprobs": None, "finish_reason": None}]}]
        chunks[0]["prompt_token_ids"] = self.prompt_ids if self.asked else None
        for i, text in enumerate(self.texts):
            choice: dict[str, Any] = {"index": 0, "delta": {"content": text}, "logprobs": None}
            if self.asked:
                choice["logprobs"] = {"content": [self._row(i)]}
            last = i == len(self.texts) - 1
            choice["finish_reason"] = "stop" if last else None
            choice["token_ids"] = [self.ids[i]] if self.asked else None
            chunks.append(opening | {"choices": [choice]})
        chunks[-1]["system_fingerprint"] = FINGERPRINT
        return [*(b"data: %b\n\n" % _dump(chunk) for chunk in chunks), b"data: [DONE]\n\n"]

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.name}", "object": kind, "created": 7, "model": MODEL}

    def _row(self, i: int) -> dict[str, Any]:
        text, logprob = self.texts[i], self.logprobs[i]
        spelt = list(text.encode()) if len(text) < LONG_TEXT else None
        return {"token": text, "logprob": logprob, "bytes": spelt, "top_logprobs": []}


def say(name: str, *, asked: bool, spell: Spell = plain_text, tokens: int = RESPONSE) -> Said:
    """The answer to the call ``name``: always the same."""
    source = random.Random(name)
    prompt_ids = [FIRST_ID + source.randrange(IDS) for _ in range(PROMPT)]
    ids = [FIRST_ID + source.randrange(IDS) for _ in range(tokens)]
    logprobs: list[float | None] = [-source.expovariate(2.0) for _ in ids]
    return Said(name, prompt_ids, ids, logprobs, [spell(token) for token in ids], asked)


def is_exact(trace: Trace, said: Said, body: bytes) -> bool:
    """The trace is this whole answer, number for number, and nothing else."""
    return (
        is_part(trace, said, body)
        and trace.meta.status == "complete"
        and trace.logprobs is not None
        and trace.response_ids is not None
        and len(trace.response_ids) == len(trace.logprobs) == len(said.ids)
        and trace.prompt_ids is not None
        and json.loads(trace.response)["message"]["content"] == said.content
    )


def is_part(trace: Trace, said: Said, body: bytes) -> bool:
    """What the trace holds is the beginning of this answer."""
    ids = [] if trace.response_ids is None else trace.response_ids.tolist()
    prompt = said.prompt_ids if trace.prompt_ids is None else trace.prompt_ids.tolist()
    given = np.empty(0, np.float32) if trace.logprobs is None else trace.logprobs
    sent = np.array([np.nan if v is None else v for v in said.logprobs], np.float32)
    return (
        trace.request == body
        and prompt == said.prompt_ids
        and ids == said.ids[: len(ids)]
        and given.tobytes() == sent[: len(given)].tobytes()
        and "".join(said.texts).encode().startswith(trace.token_bytes)
    )


def _dump(value: Any) -> bytes:
    """As engines write it: compact, UTF-8, with NaN where there is one."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()

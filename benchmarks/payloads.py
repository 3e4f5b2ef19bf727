"""What an agent asks and a vLLM 0.29 answers, made once and sent many times.

An *episode* is a trajectory of some steps whose history grows: each request holds the answers
before it, each prompt continues the tokens before it, and routes of a prefix do not change. Every
trajectory of a run is its own: its number stands in the first message, in the seed and in the first
two prompt ids; every answer has an id of its own. So attribution, prefix search and deltas have the
work that they have with real agents, while the stand-in only copies bytes.

Key order, nulls and chunks are those of vLLM 0.29.0 (``model_dump`` of its JSON answer,
``model_dump_json(exclude_unset=True)`` of its chunks).
"""

from __future__ import annotations

import functools
import io
import re
import time
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pybase64

__all__ = [
    "CREATED",
    "FIRST_NONCE",
    "MODEL",
    "PACED",
    "ROUTES",
    "SEED_FIELD",
    "SHAPES",
    "SMALL",
    "STEP_BASE",
    "STEP_FIELD",
    "TYPICAL",
    "Canned",
    "Episode",
    "Shape",
    "random_ids",
    "random_routes",
    "random_words",
    "since_us",
    "stamp",
]

MODEL = "bench"

FIRST_NONCE = 10_000_000
"""Trajectory numbers have 8 digits, so that lengths never change."""

ID_SLOT = b"@@@@@@@@@@@@@@@@"
NONCE_SLOT = b"########"
PROMPT_SLOT = b"11111,22222"
"""Stands for the first two prompt ids, 5 digits each, made of the nonce."""

VOCABULARY = 151_643
"""Of Qwen3: ids have up to six digits."""

EXPERTS, LAYERS, TOP_K = 128, 48, 8
"""Of Qwen3-30B-A3B."""

CREATED = 1_795_000_000
"""Ten digits, as many as a stamp has."""

STAMP_FIRST, STAMP_RANGE = 1_000_000_000, 8_000_000_000

STEP_FIELD = b'"max_completion_tokens":'
SEED_FIELD = b'"seed":'
STEP_BASE = 1000
"""``max_completion_tokens`` is this + the step: how the stand-in knows which answer is due."""


def stamp() -> int:
    """Monotonic time of this machine in us as ten digits; see ``since_us``."""
    return STAMP_FIRST + time.monotonic_ns() // 1000 % STAMP_RANGE


def since_us(stamped: int) -> int:
    """Microseconds since a stamp, in any process of this machine."""
    return (stamp() - stamped) % STAMP_RANGE


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of an episode, in tokens unless said."""

    name: str
    first_prompt: int
    response: int
    between: int
    """New prompt tokens between an answer and the next prompt's end: tool output."""
    steps: int
    routes: bool
    text_bytes: int
    """Of the system prompt and the first message."""


TYPICAL = Shape("typical", 6075, 500, 50, 8, routes=False, text_bytes=26_000)
"""8,000 prompt tokens on average, 500 out: JSON answers of about 100 kB, bodies of about 40 kB."""
ROUTES = Shape("routes", 6075, 500, 50, 8, routes=True, text_bytes=26_000)
"""The same with routes [8,499, 48, 8] on average: 4.4 MB of base64."""
SMALL = Shape("small", 100, 20, 20, 4, routes=False, text_bytes=600)
PACED = Shape("paced", 6075, 250, 50, 8, routes=False, text_bytes=26_000)
"""Streams that last 5 s at an event every 20 ms."""
SHAPES = {shape.name: shape for shape in (TYPICAL, ROUTES, SMALL, PACED)}


def random_ids(count: int, *, seed: int) -> npt.NDArray[np.int64]:
    """[count] token ids; frequent tokens have small ids, roughly as in a byte-level BPE."""
    u = np.random.default_rng(seed).random(count)
    return (VOCABULARY * u**4).astype(np.int64)


def random_words(count: int, *, seed: int) -> list[str]:
    """``count`` words of 2 to 8 letters, each with a space before it."""
    rng = np.random.default_rng(seed)
    letters = rng.integers(97, 123, size=(count, 8), dtype=np.uint8)
    lengths = rng.integers(2, 9, size=count)
    return [" " + row[:n].tobytes().decode() for row, n in zip(letters, lengths, strict=True)]


def random_routes(rows: int, *, seed: int) -> npt.NDArray[np.uint8]:
    """[rows, 48, 8] expert ids, each a random choice of 8 of 128 without repeats, unordered."""
    rng = np.random.default_rng(seed)
    routes = np.empty((rows, LAYERS, TOP_K), np.uint8)
    for start in range(0, rows, 1024):
        block = routes[start : start + 1024]
        scores = rng.random((*block.shape[:2], EXPERTS), dtype=np.float32)
        block[:] = np.argpartition(scores, TOP_K, axis=2)[:, :, :TOP_K]
    return routes


class Canned:
    """Bytes with slots for a trajectory's number and an answer's id, all of fixed width."""

    def __init__(self, template: bytes) -> None:
        self.template = template
        self._parts = re.split(b"(%b)" % b"|".join([ID_SLOT, NONCE_SLOT, PROMPT_SLOT]), template)
        self._slots = self._parts[1::2]

    def __len__(self) -> int:
        return len(self.template)

    def fill(self, nonce: bytes, call: bytes = ID_SLOT) -> list[bytes]:
        """The parts to send, for ``writelines`` or ``join``; ``nonce`` has 8 bytes, ``call`` 16."""
        prompt = b"1%b,1%b" % (nonce[:4], nonce[4:])
        values = {ID_SLOT: call, NONCE_SLOT: nonce, PROMPT_SLOT: prompt}
        parts = self._parts.copy()
        parts[1::2] = [values[slot] for slot in self._slots]
        return parts


@dataclass(frozen=True, slots=True)
class _Tokens:
    """One trajectory's tokens: ids, texts and logprobs by absolute position."""

    ids: npt.NDArray[np.int64]
    words: list[str]
    logprobs: npt.NDArray[np.float32]


class Episode:
    """Requests and answers of every step of one shape. Deterministic: processes build the same."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        total = shape.first_prompt + shape.steps * (shape.response + shape.between)
        self._tokens = self._draw(total)
        self.contents = [
            "".join(self._tokens.words[self.prompt_len(step) :][: shape.response])
            for step in range(shape.steps)
        ]

    def prompt_len(self, step: int) -> int:
        """P of a step."""
        return self.shape.first_prompt + step * (self.shape.response + self.shape.between)

    def request(self, step: int, *, stream: bool) -> Canned:
        """The body of a step's call, as the OpenAI SDK writes it (compact)."""
        words = self._tokens.words
        text = "".join(words * (1 + self.shape.text_bytes // (4 * len(words))))
        half = self.shape.text_bytes // 2
        messages = [
            {"role": "system", "content": "You are a coding agent." + text[:half]},
            {"role": "user", "content": f"Task {NONCE_SLOT.decode()}:" + text[half : 2 * half]},
        ]
        for before in range(step):
            seen = self.prompt_len(before) + self.shape.response
            output = "".join(words[seen : seen + self.shape.between])
            messages.append({"role": "assistant", "content": self.contents[before]})
            messages.append({"role": "user", "content": f"Output:{output}"})
        body: dict[str, Any] = {
            "messages": messages,
            "model": MODEL,
            "temperature": 0.7,
            "seed": FIRST_NONCE,
            "max_completion_tokens": STEP_BASE + step,
        }
        if stream:
            body["stream"] = True
        encoded = msgspec.json.encode(body)
        return Canned(encoded.replace(b'"seed":%d' % FIRST_NONCE, SEED_FIELD + NONCE_SLOT))

    def answer(self, step: int) -> Canned:
        """The JSON answer of a step, as vLLM gives it with everything that driftgate asks for."""
        prompt, response = self.prompt_len(step), self.shape.response
        choice = {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": self.contents[step],
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "reasoning": None,
            },
            "logprobs": {"content": [self._logprob(prompt + j) for j in range(response)]},
            "finish_reason": "stop",
            "stop_reason": None,
            "token_ids": self._tokens.ids[prompt : prompt + response].tolist(),
            "routed_experts": self._routes(prompt + response - 1),
        }
        body = {
            **_head("chat.completion"),
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": "vllm-0.29.0-3f7381ba",
            "usage": {
                "prompt_tokens": prompt,
                "total_tokens": prompt + response,
                "completion_tokens": response,
                "prompt_tokens_details": None,
                "completion_tokens_details": None,
            },
            "prompt_logprobs": None,
            "prompt_token_ids": self._prompt_ids(prompt),
            "prompt_text": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }
        return Canned(msgspec.json.encode(body))

    def events(self, step: int) -> list[Canned]:
        """The same answer as server-sent events: role, one per token, ``[DONE]``."""
        prompt, response = self.prompt_len(step), self.shape.response
        first = {
            **_head("chat.completion.chunk"),
            "choices": [_delta({"role": "assistant", "content": ""}, None)],
            "prompt_token_ids": self._prompt_ids(prompt),
            "prompt_text": None,
        }
        chunks: list[dict[str, Any]] = [first]
        for position in range(prompt, prompt + response):
            last = position == prompt + response - 1
            choice = _delta(
                {"content": self._tokens.words[position]},
                {"content": [self._logprob(position)]},
                finish="stop" if last else None,
            )
            if last:
                choice["stop_reason"] = None
            choice["token_ids"] = [int(self._tokens.ids[position])]
            chunk = {**_head("chat.completion.chunk"), "choices": [choice]}
            if last:
                chunk["system_fingerprint"] = "vllm-0.29.0-3f7381ba"
            chunks.append(chunk)
        encoded = [msgspec.json.encode(chunk) for chunk in chunks]
        return [Canned(b"data: %b\n\n" % data) for data in [*encoded, b"[DONE]"]]

    def _draw(self, total: int) -> _Tokens:
        return _Tokens(
            random_ids(total, seed=20),
            random_words(total, seed=22),
            -np.random.default_rng(23).exponential(0.4, total).astype(np.float32),
        )

    def _logprob(self, position: int) -> dict[str, Any]:
        token = self._tokens.words[position]
        return {
            "token": token,
            "logprob": float(self._tokens.logprobs[position]),
            "bytes": list(token.encode()),
            "top_logprobs": [],
        }

    def _prompt_ids(self, prompt: int) -> list[int]:
        return [11111, 22222, *self._tokens.ids[2:prompt].tolist()]

    @functools.cached_property
    def _all_routes(self) -> npt.NDArray[np.uint8]:
        return random_routes(len(self._tokens.ids), seed=21)

    def _routes(self, rows: int) -> str | None:
        if not self.shape.routes:
            return None
        file = io.BytesIO()
        np.save(file, self._all_routes[:rows])
        return pybase64.b64encode(file.getvalue()).decode()


def _head(kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{ID_SLOT.decode()}",
        "object": kind,
        "created": CREATED,
        "model": MODEL,
    }


def _delta(delta: dict[str, str], logprobs: Any, finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

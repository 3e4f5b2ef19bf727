"""Synthetic traces and scores for tests and benchmarks: deterministic, with the shapes of real
ones.

``make_trajectory`` grows a conversation as an agent does: each prompt continues the tokens before
it, its routes begin with the rows that the engine gave before, its request body repeats the
messages before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import msgspec
import numpy as np

from driftgate.mismatch import Bucket, worst
from driftgate.trace import (
    I32,
    CallIntent,
    Comparable,
    Engine,
    Proof,
    Routes,
    Sampling,
    Score,
    ScoreMeta,
    Trace,
    TraceMeta,
    Trainer,
)

__all__ = [
    "ENGINE",
    "EPOCH_NS",
    "STEP_NS",
    "TRAINER",
    "assert_same_score",
    "assert_same_trace",
    "make_intent",
    "make_score",
    "make_trace",
    "make_trajectory",
]

ENGINE = Engine(
    name="vllm",
    version="0.29.0",
    model="tiny-moe",
    system_fingerprint="vllm-0.29.0-3f7381ba",
    logprobs_mode="raw_logprobs",
)
TRAINER = Trainer(backend="reference", model="tiny-moe", checkpoint="c0ffee", dtype="float32")

EPOCH_NS = 1_750_000_000_000_000_000
"""Start of step 0 of every synthetic trajectory."""

STEP_NS = 1_000_000_000
"""From the start of one step to that of the next; each takes half of it."""


def make_trace(
    *,
    trajectory: str = "t1",
    step: int = 0,
    choice: int = 0,
    n: int = 1,
    prompt: int = 12,
    response: int = 5,
    layers: int = 4,
    experts: int = 16,
    k: int = 4,
    routed: bool = True,
    seed: int = 0,
    base: Trace | None = None,
    **meta: Any,
) -> Trace:
    """A trace of ``prompt`` + ``response`` tokens; ``meta`` overrides fields of its ``TraceMeta``.

    With ``base`` the prompt is the base's prompt and response followed by ``prompt`` new tokens.
    ``k`` of ``experts`` at each of ``layers`` (``routed=False``: a dense model, no routes).
    """
    rng = np.random.default_rng([seed, step, choice, *trajectory.encode()])
    prompt_ids = _ids(rng, prompt)
    if base is not None:
        assert base.prompt_ids is not None
        assert base.response_ids is not None
        prompt_ids = np.concatenate([base.prompt_ids, base.response_ids, prompt_ids])
    response_ids = _ids(rng, response)
    rows = len(prompt_ids) + response - 1
    texts = [f" w{token}".encode() for token in response_ids]
    call_id = str(meta.pop("call_id", f"{trajectory}-{step}"))
    started = EPOCH_NS + step * STEP_NS
    fields: dict[str, Any] = {
        "trace_id": f"{call_id}.{choice}",
        "call_id": call_id,
        "trajectory": trajectory,
        "step": step,
        "choice": choice,
        "api": "chat",
        "model": ENGINE.model,
        "attribution": "header",
        "parent": base.meta.trace_id if base else None,
        "prefix_len": len(prompt_ids) - prompt if base else 0,
        "prefix_exact": base is not None,
        "engine": ENGINE,
        "sampling": Sampling(temperature=1.0, seed=7 + seed, n=n),
        "streamed": False,
        "routes_via": "json" if routed else "none",
        "finish_reason": "stop",
        "proof": _proof(len(prompt_ids), response, rows if routed else None),
        "started_ns": started,
        "first_byte_ns": started + STEP_NS // 4,
        "ended_ns": started + STEP_NS // 2,
    }
    content = b"".join(texts).decode()
    return Trace(
        meta=TraceMeta(**(fields | meta)),
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        logprobs=-rng.exponential(1.0, response).astype(np.float32),
        routes=_routes(rng, rows, (layers, experts, k), base) if routed else None,
        token_bytes=b"".join(texts),
        token_offsets=np.cumsum([0, *map(len, texts)], dtype=np.int32),
        request=_request(base, content, int(prompt_ids[-1])),
        response=msgspec.json.encode(
            {"index": choice, "message": {"role": "assistant", "content": content}}
        ),
    )


def make_trajectory(trajectory: str = "t1", *, steps: int = 3, **options: Any) -> Iterator[Trace]:
    """``steps`` traces, each continuing the one before; ``options`` as in ``make_trace``."""
    base: Trace | None = None
    for step in range(steps):
        base = make_trace(trajectory=trajectory, step=step, base=base, **options)
        yield base


def make_intent(trace: Trace) -> CallIntent:
    """What was written before the call of ``trace``."""
    meta = trace.meta
    return CallIntent(
        call_id=meta.call_id,
        trajectory=meta.trajectory,
        step=meta.step,
        attribution=meta.attribution,
        api=meta.api,
        model=meta.model,
        body_sha256="0123456789abcdef",
        retry=meta.retry,
        started_ns=meta.started_ns,
    )


def make_score(trace: Trace, *, noise: float = 0.01, seed: int = 0, **meta: Any) -> Score:
    """A trainer's score whose log ratios are normal with deviation ``noise``; ``meta``
    overrides."""
    assert trace.logprobs is not None
    assert trace.response_ids is not None
    rng = np.random.default_rng([seed, len(trace.logprobs)])
    train = (trace.logprobs + rng.normal(0, noise, len(trace.logprobs))).astype(np.float32)
    fields: dict[str, Any] = {
        "trace_id": trace.meta.trace_id,
        "trajectory": trace.meta.trajectory,
        "step": trace.meta.step,
        "choice": trace.meta.choice,
        "model": trace.meta.model,
        "engine": trace.meta.engine,
        "weight_version": trace.meta.weight_version,
        "trainer": TRAINER,
        "bucket": Bucket.of(train, trace.logprobs),
        "comparable": Comparable(verdict="yes"),
        "worst": worst(train, trace.logprobs, trace.response_ids, trace_id=trace.meta.trace_id),
        "scored_ns": trace.meta.ended_ns + STEP_NS,
    }
    routes = trace.routes
    return Score(
        meta=ScoreMeta(**(fields | meta)),
        logprobs=train,
        entropy=rng.exponential(1.0, len(train)).astype(np.float32),
        routes=None if routes is None else routes[-len(train) :],
    )


def assert_same_trace(a: Trace, b: Trace) -> None:
    """AssertionError unless equal bit for bit, NaN included."""
    names = ("prompt_ids", "response_ids", "logprobs", "routes", "token_offsets")
    _assert_same_arrays(a, b, names)
    assert a.meta == b.meta
    assert (a.token_bytes, a.request, a.response) == (b.token_bytes, b.request, b.response)


def assert_same_score(a: Score, b: Score) -> None:
    """AssertionError unless equal bit for bit, NaN included."""
    _assert_same_arrays(a, b, ("logprobs", "entropy", "logprobs_at_temperature", "routes"))
    assert a.meta == b.meta


def _assert_same_arrays(a: object, b: object, names: tuple[str, ...]) -> None:
    for name in names:
        x, y = getattr(a, name), getattr(b, name)
        if x is None or y is None:
            assert x is y, name
        else:
            assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name


def _ids(rng: np.random.Generator, count: int) -> I32:
    return rng.integers(0, 2000, count, dtype=np.int32)


def _routes(
    rng: np.random.Generator, rows: int, shape: tuple[int, int, int], base: Trace | None
) -> Routes:
    """[rows, L, K] distinct experts per cell, the base's rows first."""
    layers, experts, k = shape
    known = base.routes if base is not None else None
    fresh = rows - (0 if known is None else len(known))
    order = rng.random((fresh, layers, experts)).argpartition(k - 1, axis=2)[:, :, :k]
    new: Routes = order.astype(np.uint8) if experts <= 256 else order.astype(np.uint16)
    return new if known is None else cast(Routes, np.concatenate([known, new]))


def _request(base: Trace | None, content: str, marker: int) -> bytes:
    """A chat request that repeats the base's messages and its answer."""
    messages: list[dict[str, str]] = [{"role": "system", "content": "You are a careful agent."}]
    if base is not None:
        messages = msgspec.json.decode(base.request)["messages"]
        messages.append(msgspec.json.decode(base.response)["message"])
    messages.append({"role": "user", "content": f"Tool output {marker}: {content[::-1]}"})
    return msgspec.json.encode({"model": ENGINE.model, "messages": messages, "temperature": 1.0})


def _proof(prompt: int, response: int, rows: int | None) -> Proof:
    return Proof(
        ids=response,
        logprob_rows=response,
        usage_completion=response,
        usage_prompt=prompt,
        prompt_ids=prompt,
        route_rows=rows,
        text_matches=True,
        terminal=True,
    )

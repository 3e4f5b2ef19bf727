"""Runs with a known cause of drift, over synthetic traces."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from driftgate.anatomy import Response
from driftgate.mismatch import Bucket
from driftgate.testing.traces import make_score, make_trajectory
from driftgate.trace import Score, Trace

F64 = npt.NDArray[np.float64]


def run(steps: int = 4, response: int = 200, **options: Any) -> list[Trace]:
    """A dense run whose tokens' logprobs leave room for noise on either side, all in one bin of
    probability, .1 to .5: its baselines are then plain means."""
    traces = make_trajectory("run", steps=steps, response=response, routed=False, **options)
    return [
        dataclasses.replace(trace, logprobs=np.clip(trace.logprobs, -2.2, -1.3).astype(np.float32))
        for trace in traces
        if trace.logprobs is not None
    ]


def with_meta(trace: Trace, **changes: Any) -> Trace:
    return dataclasses.replace(trace, meta=msgspec.structs.replace(trace.meta, **changes))


def scored(trace: Trace, d: F64, other: F64 | None = None, **meta: Any) -> Score:
    """A score whose log ratios are ``d`` at T = 1, and ``other`` at the requested temperature."""
    assert trace.logprobs is not None
    train = (trace.logprobs + d).astype(np.float32)
    at = None if other is None else (trace.logprobs + other).astype(np.float32)
    bucket = Bucket.of(train, trace.logprobs, trace_id=trace.meta.trace_id)
    score = make_score(trace, noise=0.0, bucket=bucket, **meta)
    return dataclasses.replace(score, logprobs=train, logprobs_at_temperature=at)


def noise(seed: int, size: int, sigma: float) -> F64:
    return np.random.default_rng(seed).normal(0.0, sigma, size)


def responses(traces: Sequence[Trace], scores: Iterable[Score]) -> list[Response]:
    out = [Response.of(trace, score) for trace, score in zip(traces, scores, strict=True)]
    return [response for response in out if response is not None]


def drift(found: Iterable[Response]) -> float:
    """Sum of |D| as stored, in float32 differences."""
    return float(sum(np.abs(response.d).sum() for response in found))

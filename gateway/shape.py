"""Turns a store's records into the API's values. Pure: records in, views out."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from driftgate.mismatch import Bucket, Worst
from driftgate.pool import LagSums
from driftgate.replay import ReplayPair
from driftgate.router import RouterBucket
from driftgate.storage import AnswerText
from driftgate.trace import Routes, Score, Trace
from driftgate.views import (
    LagView,
    Measures,
    ReplayView,
    RouterMeasures,
    RoutesView,
    TokenView,
    WorstView,
)

__all__ = ["lags", "measures", "placed", "replay", "router", "routes", "text", "tokens"]


def measures(bucket: Bucket | None) -> Measures | None:
    """Every metric by name, and why a missing one is."""
    if bucket is None:
        return None
    return Measures(metrics=bucket.metrics(), undefined=bucket.undefined())


def router(bucket: RouterBucket | None) -> RouterMeasures | None:
    """Every router metric by name, and why a missing one is."""
    if bucket is None:
        return None
    return RouterMeasures(metrics=bucket.metrics(), undefined=bucket.undefined())


def replay(pair: ReplayPair | None, *, comparable: bool = True) -> ReplayView | None:
    """Both drifts and the share between them; no share where the numbers are no drift."""
    if pair is None:
        return None
    shares, why = pair.shares(), pair.undefined()
    if not comparable:
        shares = dict.fromkeys(shares)
        why = dict.fromkeys(shares, "the comparison is not valid, so its numbers are no drift")
    return ReplayView(
        n_tokens=pair.under.n_tokens,
        n_seqs=pair.under.n_seqs,
        coverage=pair.coverage,
        shares=Measures(metrics={**shares}, undefined=why),
        native=Measures(metrics=pair.native.metrics(), undefined=pair.native.undefined()),
        measures=Measures(metrics=pair.under.metrics(), undefined=pair.under.undefined()),
    )


def lags(parts: Sequence[LagSums]) -> list[LagView]:
    """A cell by policy lag."""
    return [
        LagView(
            label=part.label,
            n_tokens=part.bucket.n_tokens if part.bucket else 0,
            n_seqs=part.bucket.n_seqs if part.bucket else 0,
            measures=measures(part.bucket),
            router=router(part.router),
        )
        for part in parts
    ]


def placed(worst: Worst, trace_id: str, step: int, choice: int) -> WorstView:
    """The worst token with its step and choice, without its text."""
    return WorstView(
        trace_id=trace_id,
        step=step,
        choice=choice,
        token_index=worst.token_index,
        position=None,
        token_id=worst.token_id,
        log_ratio=_finite(worst.log_ratio),
        train_logprob=_finite(worst.train_logprob),
        rollout_logprob=_finite(worst.rollout_logprob),
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def text(trace: Trace | AnswerText, first: int, upto: int) -> str:
    """Text of sampled tokens ``first`` to ``upto`` (exclusive)."""
    assert trace.token_offsets is not None
    start, end = int(trace.token_offsets[first]), int(trace.token_offsets[upto])
    return trace.token_bytes[start:end].decode(errors="replace")


def tokens(trace: Trace, score: Score | None) -> list[TokenView]:
    """Every sampled token with what both sides say about it; empty where the engine gave no ids."""
    if trace.response_ids is None:
        return []
    prompt = None if trace.prompt_ids is None else len(trace.prompt_ids)
    train = None
    if score is not None:
        at_one = score.meta.temperature == 1.0
        train = score.logprobs if at_one else score.logprobs_at_temperature
    return [_token(trace, j, prompt, train, score) for j in range(len(trace.response_ids))]


def _token(trace: Trace, j: int, prompt: int | None, train: Any, score: Score | None) -> TokenView:
    assert trace.response_ids is not None
    entropy = None if score is None else score.entropy
    replayed = None if score is None else score.logprobs_replay
    rollout = None if trace.logprobs is None else _finite(trace.logprobs[j])
    trained = None if train is None else _finite(train[j])
    text, exact = None, None
    if trace.token_offsets is not None:
        data = trace.token_bytes[trace.token_offsets[j] : trace.token_offsets[j + 1]]
        text = data.decode(errors="replace")
        if text.encode() != data:
            exact = base64.b64encode(data).decode()
    return TokenView(
        index=j,
        position=None if prompt is None else prompt + j,
        token_id=int(trace.response_ids[j]),
        text=text,
        bytes_base64=exact,
        rollout_logprob=rollout,
        train_logprob=trained,
        replay_logprob=None if replayed is None else _finite(replayed[j]),
        log_ratio=None if rollout is None or trained is None else trained - rollout,
        entropy=None if entropy is None else _finite(entropy[j]),
    )


def routes(routes: Routes | None, full: bool) -> RoutesView | None:
    """Shape and dtype of expert ids, with the array itself where ``full``."""
    if routes is None:
        return None
    return RoutesView(
        shape=list(routes.shape),
        dtype=routes.dtype.name,
        npy_base64=_npy_base64(routes) if full else None,
    )


def _npy_base64(array: Routes) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()

"""Where engine and trainer sent each token of one answer to different experts. Pure.

Row j of both sides is the row that predicts sampled token j: the last R of the engine's P + R - 1
rows, and the trainer's R rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from driftgate.live_views import StepRoutes, TokenLayers
from driftgate.routes import shared_experts
from driftgate.trace import Routes, Score, Trace

__all__ = ["step_routes"]

I64 = npt.NDArray[np.int64]


def step_routes(trace: Trace, score: Score | None, token: int | None = None) -> StepRoutes:
    """Missed experts per token and layer; ``reason`` says why there are none."""
    meta = trace.meta
    empty = StepRoutes(trajectory=meta.trajectory, step=meta.step, choice=meta.choice)
    reason = _why_not(trace, score, token)
    if reason is not None or score is None or trace.routes is None or score.routes is None:
        return _replace(empty, reason=reason)
    layers = score.meta.router.layers if score.meta.router else list(range(score.routes.shape[1]))
    train = _layers_of(score.routes, layers)
    rollout = _layers_of(trace.routes[-len(train) :], layers)
    if rollout.shape != train.shape:
        shapes = f"engine {rollout.shape}, trainer {train.shape}"
        return _replace(empty, reason=f"the two sides' routes have other shapes: {shapes}")
    k = rollout.shape[2]
    missed = k - shared_experts(rollout, train)
    valid = _chosen(rollout) & _chosen(train)
    rows = [
        [int(m) if ok else None for m, ok in zip(row, oks, strict=True)]
        for row, oks in zip(missed.tolist(), valid.tolist(), strict=True)
    ]
    return _replace(
        empty,
        layers=layers,
        k=k,
        missed=rows,
        token=None
        if token is None
        else TokenLayers(
            index=token,
            rollout=rollout[token].tolist(),
            train=train[token].tolist(),
            missed=rows[token],
        ),
    )


def _why_not(trace: Trace, score: Score | None, token: int | None) -> str | None:
    if trace.routes is None:
        return "the engine gave no routes"
    if score is None:
        return "not scored yet"
    if score.routes is None or not len(score.routes):
        return score.meta.router_reason or "the trainer gave no routes"
    if token is not None and token >= len(score.routes):
        return f"token {token} is past the last one, {len(score.routes) - 1}"
    return None


def _replace(empty: StepRoutes, **fields: Any) -> StepRoutes:
    return StepRoutes(trajectory=empty.trajectory, step=empty.step, choice=empty.choice, **fields)


def _layers_of(routes: Routes, layers: list[int]) -> Routes:
    """The MoE layers, where the array counts all hidden layers."""
    return routes if routes.shape[1] == len(layers) else routes[:, layers]


def _chosen(routes: Routes) -> npt.NDArray[np.bool_]:
    """[R, L]: the cell names K different experts; padding and sentinels repeat one."""
    ordered = np.sort(routes, axis=2)
    return np.asarray((ordered[..., 1:] != ordered[..., :-1]).all(axis=2), dtype=np.bool_)

"""How evenly tokens go to the experts of each layer, on both sides. Pure.

A load is a count of tokens by expert: it says nothing of single tokens, as the rates of
`driftgate.router` do, and shows what those cannot: experts that carry most tokens, and whether the
trainer loads others. Rows and valid cells are those of `driftgate.router`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from driftgate.router import by_layer, valid_cells

__all__ = ["Loads", "apart", "count_loads"]

I64 = npt.NDArray[np.int64]


class Loads(NamedTuple):
    """Tokens by layer and expert."""

    k: int
    layers: tuple[int, ...]
    """Absolute numbers."""
    tokens_L: I64
    """Tokens with a valid cell in that layer, on both sides."""
    rollout_LE: I64
    """E is one more than the largest expert id on either side; rows add up to ``tokens_L`` x k."""
    train_LE: I64

    def merge(self, other: Loads) -> Loads:
        """The loads of both. ValueError when they are of different layers or K."""
        if (self.k, self.layers) != (other.k, other.layers):
            raise ValueError(
                f"cannot add loads of layers {self.layers}, K = {self.k} to layers "
                f"{other.layers}, K = {other.k}: they are of different models"
            )
        return Loads(
            self.k,
            self.layers,
            self.tokens_L + other.tokens_L,
            _added(self.rollout_LE, other.rollout_LE),
            _added(self.train_LE, other.train_LE),
        )


def count_loads(rollout: npt.NDArray[Any], train: npt.NDArray[Any], layers: Sequence[int]) -> Loads:
    """Of one response: expert ids [R, L, K] whose rows j predict sampled token j on both sides.

    ``layers``: absolute numbers of the MoE layers, to which a side that counts all hidden layers is
    cut. ValueError on shapes that do not agree.
    """
    a, b = by_layer(rollout, layers), by_layer(train, layers)
    if a.shape != b.shape:
        raise ValueError(
            f"rollout routes {a.shape} and train routes {b.shape} must be one [R, L, K]"
        )
    valid = valid_cells(a, b)
    experts = max((int(side[valid].max()) + 1 for side in (a, b)), default=0) if valid.any() else 0
    return Loads(
        a.shape[2],
        tuple(layers),
        valid.sum(axis=0),
        *(_by_expert(side, valid, experts) for side in (a, b)),
    )


def apart(rollout_E: I64, train_E: I64) -> float | None:
    """Total variation distance of two spreads, 0 to 1; None where one is of no token."""
    if not rollout_E.any() or not train_E.any():
        return None
    difference = rollout_E / rollout_E.sum() - train_E / train_E.sum()
    return float(np.abs(difference).sum() / 2)


def _by_expert(side: npt.NDArray[Any], valid: npt.NDArray[np.bool_], experts: int) -> I64:
    n_layers = side.shape[1]
    code = side.astype(np.int64) + experts * np.arange(n_layers)[:, None]
    counts = np.bincount(code[valid].ravel(), minlength=n_layers * experts)
    return counts.astype(np.int64).reshape(n_layers, experts)


def _added(a: I64, b: I64) -> I64:
    out = np.zeros((a.shape[0], max(a.shape[1], b.shape[1])), np.int64)
    out[:, : a.shape[1]] += a
    out[:, : b.shape[1]] += b
    return out

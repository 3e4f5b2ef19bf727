"""Compares expert choices as sets, and finds routes whose rows stand one or two places off.

The misalignment finder is what explains a zero-overlap alarm: given the routes of both sides over
the same rows, which shift fits them, if it is not 0.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = ["ShiftFinding", "random_zero_overlap", "route_shift", "shared_experts"]

MAX_ROWS = 4096
"""Rows looked at: enough that a rate is known to 1 %, and 5 shifts of 48 layers take under a
second."""
MIN_ROWS = 8
"""Fewer rows say nothing: a shift by one of 4 rows fits by chance."""
CLEARLY_BETTER = 0.5
"""A shift is named when it misses at most half as many experts as no shift does. Right rows miss
1-3 % (METRICS 2: a tenth of the sets differ, mostly by one expert), wrong rows 40 % and more:
neighbours share experts, but far from half of what is lost."""
MIN_MISS = 0.05
"""Below this miss rate the rows stand right, whatever another shift would give."""


class ShiftFinding(msgspec.Struct, frozen=True, kw_only=True):
    """Row ``i + shift`` of the rollout's routes describes the token of row ``i`` of the
    trainer's."""

    shift: int
    miss_rate_unshifted: float
    miss_rate_shifted: float
    zero_overlap_rate: float
    """As the rows stand now."""
    zero_overlap_random: float
    """Expected for unrelated rows, with E taken as the largest id seen + 1."""
    rows: int


def shared_experts(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """|A and B| per cell, [..., K] x [..., K] -> [...]; right for rows without repeated ids.

    Makes a boolean [..., K, K]: call it on chunks.
    """
    same = a[..., :, None] == b[..., None, :]
    return np.asarray(same.any(axis=-1).sum(axis=-1), dtype=np.int64)


def random_zero_overlap(num_experts: int, k: int) -> float:
    """P(A and B are disjoint) for two independent uniform K-sets: C(E-K, K) / C(E, K).

    What `router_zero_overlap_rate` tends to when rows do not belong together: .27 for 4 of 16, .59
    for 8 of 128. 0 when 2K > E: then disjoint sets do not exist and this alarm is blind.
    """
    return (
        math.comb(num_experts - k, k) / math.comb(num_experts, k) if num_experts >= 2 * k else 0.0
    )


def route_shift(
    rollout: npt.NDArray[Any], train: npt.NDArray[Any], max_shift: int = 2
) -> ShiftFinding | None:
    """The shift in ``-max_shift .. max_shift`` that fits, or None when the rows stand right or
    none fits.

    ``rollout``, ``train``: expert ids [N, L, K] of the same N positions, prompt rows welcome: more
    rows are better evidence. ValueError when the shapes differ.
    """
    if rollout.shape != train.shape or rollout.ndim != 3:
        raise ValueError(f"routes {rollout.shape} and {train.shape} must be one [N, L, K]")
    a, b = rollout[:MAX_ROWS], train[:MAX_ROWS]
    n, _, k = a.shape
    if n < MIN_ROWS + max_shift or not a.size:
        return None
    now = _overlap(a, b)
    unshifted = 1.0 - float(now.mean()) / k
    if unshifted < MIN_MISS:
        return None
    misses = {
        shift: 1.0 - float(_overlap(*_aligned(a, b, shift)).mean()) / k
        for shift in range(-max_shift, max_shift + 1)
        if shift
    }
    best = min(misses, key=lambda shift: (misses[shift], abs(shift)))
    if misses[best] > CLEARLY_BETTER * unshifted:
        return None
    return ShiftFinding(
        shift=best,
        miss_rate_unshifted=unshifted,
        miss_rate_shifted=misses[best],
        zero_overlap_rate=float((now == 0).mean()),
        zero_overlap_random=random_zero_overlap(int(max(a.max(), b.max())) + 1, k),
        rows=n,
    )


def _aligned(
    a: npt.NDArray[Any], b: npt.NDArray[Any], shift: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Rows of both that belong together if the rollout is off by ``shift``."""
    n = len(a) - abs(shift)
    return a[max(shift, 0) :][:n], b[max(-shift, 0) :][:n]


def _overlap(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """[rows * L] shared experts, row by row in bounded memory."""
    step = 256
    parts = [shared_experts(a[i : i + step], b[i : i + step]) for i in range(0, len(a), step)]
    return np.concatenate(parts).ravel()

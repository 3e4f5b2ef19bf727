"""Confidence intervals by a cluster bootstrap over trajectories.

Tokens of one trajectory are not independent, so whole trajectories are drawn with replacement. The
sums in a bucket add, so a resample is one row of counts times the matrix of sums: no token is read
again. Deterministic for a given seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from driftgate.mismatch import Bucket
from driftgate.replay import REPLAY_METRICS, ReplayPair
from driftgate.router import RouterBucket

__all__ = [
    "FEW_TRAJECTORIES",
    "RESAMPLES",
    "Intervals",
    "intervals",
    "replay_intervals",
    "router_intervals",
]

F64 = npt.NDArray[np.float64]

RESAMPLES = 1000
"""B: the ends of a 95 % interval rest on 25 resamples each, enough for two digits."""
CONFIDENCE = 0.95
FEW_TRAJECTORIES = 30
"""Below this METRICS wants the cell marked: percentile intervals come out too narrow."""
CHUNK_COUNTS = 1 << 22
"""Resample counts held at once, 32 MiB."""


class Intervals(msgspec.Struct, frozen=True, kw_only=True):
    """95 % percentile intervals by metric; a metric that cannot be resampled is absent."""

    n_trajectories: int
    few: bool
    """Fewer than `FEW_TRAJECTORIES`: read the intervals as lower bounds of the uncertainty."""
    resamples: int = RESAMPLES
    values: dict[str, tuple[float, float]] = {}


def intervals(
    buckets: Mapping[str, Bucket], *, seed: int = 0, resamples: int = RESAMPLES
) -> Intervals:
    """Intervals of the main metrics of METRICS 2 from one bucket per trajectory.

    Trajectories without a comparable token are left out. With fewer than two trajectories there are
    no intervals. ``seed`` fixes the draw.
    """
    rows = [b for _, b in sorted(buckets.items()) if b.n_tokens]
    columns: dict[str, tuple[F64, F64]] = {}
    n = _column(rows, lambda b: b.n_tokens)
    m = _column(rows, lambda b: b.n_seqs)
    for name, value in _TOKEN_SUMS.items():
        columns[name] = (_column(rows, value), n)
    for name in _counted([b.token_hits for b in rows]):
        columns[name] = (np.array([b.token_hits[name] for b in rows], dtype=np.float64), n)
    for name in _counted([b.seq_hits for b in rows]):
        columns[name] = (np.array([b.seq_hits[name] for b in rows], dtype=np.float64), m)
    columns["ess_kish_response"] = (_column(rows, lambda b: b.kish_response), m)
    if rows and all(b.linear is not None for b in rows):
        for name, linear in _LINEAR_SUMS.items():
            columns[name] = (_column(rows, linear), n)
    kish = {}
    if rows:
        kish["ess_kish_token"] = _LogWeights(
            _column(rows, lambda b: b.weight.log()), _column(rows, lambda b: b.weight_sq.log()), n
        )
        kish["ess_kish_seq"] = _LogWeights(
            _column(rows, lambda b: b.seq_weight.log()),
            _column(rows, lambda b: b.seq_weight_sq.log()),
            m,
        )
    return _resample(len(rows), columns, kish, seed, resamples)


def _counted(hits: Sequence[Mapping[str, int]]) -> list[str]:
    """What every row counted: an older one lacks what was added since."""
    return sorted(set[str]().union(*hits).intersection(*hits)) if hits else []


def router_intervals(
    buckets: Mapping[str, RouterBucket], *, seed: int = 0, resamples: int = RESAMPLES
) -> Intervals:
    """Intervals of the main rates of METRICS 3, from one router bucket per trajectory."""
    rows = [b for _, b in sorted(buckets.items()) if b.n_cells]
    cells = np.array([b.n_cells for b in rows], dtype=np.float64)
    tokens = np.array([b.n_rows for b in rows], dtype=np.float64)
    shared = np.array([np.sum(b.shared, axis=0) for b in rows], dtype=np.float64)
    columns: dict[str, tuple[F64, F64]] = {}
    if rows:
        k = shared.shape[1] - 1
        differing = cells - shared[:, -1]
        columns = {
            "router_set_disagree_rate": (differing, cells),
            "router_expert_miss_rate": (shared @ (1.0 - np.arange(k + 1) / k), cells),
            "router_zero_overlap_rate": (shared[:, 0], cells),
            "router_layers_disagree_per_token": (differing, tokens),
        }
    return _resample(len(rows), columns, {}, seed, resamples)


def replay_intervals(
    pairs: Mapping[str, ReplayPair], *, seed: int = 0, resamples: int = RESAMPLES
) -> Intervals:
    """Intervals of the shares that replay removes, from one pair of buckets per trajectory.

    A ratio of sums, resampled as such: numerator and denominator come from the same draw. Where a
    share of the whole is undefined, it has no interval.
    """
    rows = [pair for _, pair in sorted(pairs.items()) if pair.under.n_tokens]
    alike = all(pair.native.n_tokens == pair.under.n_tokens for pair in rows)
    columns: dict[str, tuple[F64, F64]] = {}
    for name in REPLAY_METRICS if rows else ():
        sums = [pair.sums()[name] for pair in rows]
        known = [(n, u) for n, u in sums if n is not None and u is not None]
        native = np.array([n for n, _ in known], dtype=np.float64)
        under = np.array([u for _, u in known], dtype=np.float64)
        # A resample of trajectories without drift would divide 0 by 0.
        if len(known) == len(rows) and native.all() and alike:
            columns[name] = (native - under, native)
    return _resample(len(rows), columns, {}, seed, resamples)


class _LogWeights(NamedTuple):
    """Per trajectory: log of the sum of weights and of their squares, and how many there are."""

    total: F64
    square: F64
    n: F64

    def kish(self, counts: F64) -> F64:
        """[B] Kish of each resample, from its counts [B, trajectories]."""
        with np.errstate(divide="ignore"):
            times = np.log(counts)  # -inf: not drawn
        total = np.logaddexp.reduce(times + self.total, axis=1)
        square = np.logaddexp.reduce(times + self.square, axis=1)
        return np.asarray(np.exp(2.0 * total - square) / (counts @ self.n))


_TOKEN_SUMS: dict[str, Callable[[Bucket], float]] = {
    "log_ratio_mean": lambda b: b.log_ratio.mean * b.n_tokens,
    "kl_k1_rollout_train": lambda b: -b.log_ratio.mean * b.n_tokens,
    "kl_k2_rollout_train": lambda b: b.sum_sq / 2.0,
    "abs_log_ratio_mean": lambda b: b.sum_abs,
    "prob_abs_diff_mean": lambda b: b.prob_abs_diff.mean * b.n_tokens,
}
_LINEAR_SUMS: dict[str, Callable[[Bucket], float]] = {
    "mean_weight_token": lambda b: b.n_tokens * (1.0 + b.linear.excess.mean) if b.linear else 0.0,
    "kl_k3_rollout_train": lambda b: b.linear.k3 if b.linear else 0.0,
    "kl_train_rollout_is": lambda b: b.linear.kl_train if b.linear else 0.0,
    "js_is": lambda b: b.linear.js if b.linear else 0.0,
    "tv_is": lambda b: b.linear.tv if b.linear else 0.0,
}


def _column(rows: list[Bucket], value: Callable[[Bucket], float]) -> F64:
    return np.array([value(b) for b in rows], dtype=np.float64)


def _resample(
    n: int,
    columns: dict[str, tuple[F64, F64]],
    kish: dict[str, _LogWeights],
    seed: int,
    resamples: int,
) -> Intervals:
    few = n < FEW_TRAJECTORIES
    if n < 2:
        return Intervals(n_trajectories=n, few=few, resamples=resamples)
    rng = np.random.default_rng(seed)
    draws: dict[str, list[F64]] = {name: [] for name in (*columns, *kish)}
    step = max(1, CHUNK_COUNTS // n)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        counts = rng.multinomial(n, np.full(n, 1.0 / n), size=size).astype(np.float64)
        for name, (total, weight) in columns.items():
            draws[name].append((counts @ total) / (counts @ weight))
        for name, weights in kish.items():
            draws[name].append(weights.kish(counts))
    tail = (1.0 - CONFIDENCE) / 2.0
    values = {}
    for name, parts in draws.items():
        low, high = np.quantile(np.concatenate(parts), [tail, 1.0 - tail])
        values[name] = (float(low), float(high))
    return Intervals(n_trajectories=n, few=few, resamples=resamples, values=values)

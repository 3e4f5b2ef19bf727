"""METRICS 2 where float64 ends: log ratios of hundreds of nats, of 1e-9, and equal ones.

The reference is computed in decimals of 60 digits with exponents without bound, from the same
float64 log-probabilities; ours is merged from random parts in random order. A metric may be null
where float64 cannot hold it, and then no row claims it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from decimal import Context, Decimal, localcontext
from functools import reduce

import numpy as np

from driftgate.mismatch import Bucket
from science.by_hand import F64
from science.table import Row, exactly, worst
from tests.e2e.oracle import Pair

__all__ = ["extremes"]

DIGITS = Context(prec=60, Emax=999_999_999, Emin=-999_999_999)
RELATIVE = 1e-6
"""Of the value. Expectations such as k3 lose digits of D itself where D is 1e-9."""
WORLDS = 5

Shape = Callable[[np.random.Generator, int], F64]
SHAPES: dict[str, Shape] = {
    "small noise": lambda rng, n: rng.normal(0, 0.02, n),
    "large noise": lambda rng, n: rng.normal(0, 3, n),
    "single tokens at -800": lambda rng, n: np.where(
        rng.random(n) < 0.1, -rng.uniform(0, 800, n), 0.01
    ),
    "anything within 300": lambda rng, n: rng.uniform(-300, 300, n),
    "all at -1": lambda rng, n: np.full(n, -1.0),
    "noise of 1e-9": lambda rng, n: rng.normal(0, 1e-9, n),
}
NULLABLE = {"anything within 300"}
"""Shapes with values that float64 cannot hold."""


def extremes(part: str) -> Iterator[Row]:
    """The largest relative error over all values of each shape."""
    rng = np.random.default_rng(9)
    for shape, draw in SHAPES.items():
        apart, values, nulls = 0.0, 0, 0
        for _ in range(WORLDS):
            pairs = [_response(rng, draw) for _ in range(int(rng.integers(2, 8)))]
            ours = _merged(rng, pairs).metrics()
            for name, wanted in _exact(pairs).items():
                value = ours[name]
                if value is None:
                    nulls += 1
                    continue
                values += 1
                scale = max(abs(wanted), 1e-15)
                apart = max(apart, abs(value - wanted) / scale)
        yield worst(part, f"{shape}: {values} values", apart, RELATIVE, "60 digits")
        if shape not in NULLABLE:
            yield exactly(part, f"{shape}: values that are null", nulls, 0)


def _response(rng: np.random.Generator, draw: Shape) -> Pair:
    n = int(rng.integers(1, 30))
    rollout = -rng.exponential(1.5, n)
    d = draw(rng, n)
    if np.abs(d).max() > 50:
        rollout -= 400  # room for the trainer's side below 0
    return np.minimum(rollout + d, 0.0), rollout


def _merged(rng: np.random.Generator, pairs: Sequence[Pair]) -> Bucket:
    parts = [Bucket.of(train, rollout) for train, rollout in pairs]
    while len(parts) > 1:
        first, second = rng.permutation(len(parts))[:2]
        joined = parts[first].merge(parts[second])
        parts = [one for at, one in enumerate(parts) if at not in (first, second)] + [joined]
    return parts[0]


def _exact(pairs: Sequence[Pair]) -> dict[str, float]:
    with localcontext(DIGITS):
        rows = [[Decimal(float(t)) - Decimal(float(r)) for t, r in zip(*pair, strict=True)]
                for pair in pairs]  # fmt: skip
        d = [x for row in rows for x in row]
        sums = [_sum(row) for row in rows]
        w, e = [x.exp() for x in sums], [x.exp() for x in d]
        found = {
            "kl_k1_rollout_train": -_mean(d),
            "kl_k2_rollout_train": _mean([x * x for x in d]) / 2,
            "kl_k3_rollout_train": _mean([y - 1 - x for x, y in zip(d, e, strict=True)]),
            "kl_train_rollout_is": _mean([y * x - (y - 1) for x, y in zip(d, e, strict=True)]),
            "abs_log_ratio_mean": _mean([abs(x) for x in d]),
            "log_ratio_sum_mean": _mean(sums),
            "mean_weight_token": _mean(e),
            "mult_prob_error": _mean([abs(x).exp() for x in d]),
            "log_mean_weight_seq": _mean(w).ln(),
            "log1p_chi2_seq": _mean([x * x for x in w]).ln(),
            "log_ess_inv_second_moment_seq": -_mean([x * x for x in w]).ln(),
            "ess_kish_token": _kish(e),
            "ess_kish_seq": _kish(w),
            "ess_kish_geo": _kish([(x / len(row)).exp()
                                   for x, row in zip(sums, rows, strict=True)]),
        }  # fmt: skip
        return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def _sum(values: Sequence[Decimal]) -> Decimal:
    return reduce(lambda a, b: a + b, values, Decimal(0))


def _mean(values: Sequence[Decimal]) -> Decimal:
    return _sum(values) / len(values)


def _kish(w: Sequence[Decimal]) -> Decimal:
    return _sum(w) ** 2 / (len(w) * _sum([x * x for x in w]))

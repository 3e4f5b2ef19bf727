"""METRICS 2 and 3, merging, intervals: the product's sums against formulas written out by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from math import erf, log
from typing import Any

import msgspec
import numpy as np

from driftgate.bootstrap import intervals
from driftgate.glossary import METRICS, ROUTER_METRICS
from driftgate.mismatch import Bucket
from driftgate.router import RouterBucket
from science import by_hand
from science.by_hand import F64, Ids
from science.table import Row, exactly, near, worst
from tests.e2e import oracle
from tests.e2e.oracle import Pair

__all__ = ["coverage", "log_ratios", "merging", "planted", "planted_routes", "routing"]

EXACT = 1e-9
"""Relative: both sides add in float64, in another order."""
SKETCH = 0.005
"""Relative: what `driftgate.sums.Sketch` promises of a quantile."""

WORLDS = 600
CLUSTERS = 60
TOKENS = 8
NOMINAL = 0.95


def planted(seed: int = 0) -> list[Pair]:
    """Four responses whose two sides differ by much, so that every gate catches something."""
    rng = np.random.default_rng(seed)
    found = []
    for length in (1, 7, 40, 113):
        rollout = np.log(rng.uniform(0.02, 0.98, length))
        train = np.minimum(rollout + rng.normal(0.02, 0.4, length), -1e-3)
        found.append((train, rollout))
    return found


def planted_routes(seed: int = 0) -> tuple[Ids, Ids, F64]:
    """Experts of both sides [R, L, K], a tenth of the cells exchanged, and the margins [R, L]."""
    rng = np.random.default_rng(seed)
    a = rng.random((60, 5, 16)).argsort(-1)[..., :4].astype(np.uint8)
    b = a.copy()
    for t, layer in np.argwhere(rng.random(a.shape[:2]) < 0.1):
        free = sorted(set(range(16)) - set(a[t, layer].tolist()))
        b[t, layer, rng.integers(4)] = rng.choice(free)
    return a, b, rng.exponential(0.1, a.shape[:2]) * (rng.random(a.shape[:2]) > 0.05)


def bucket_of(pairs: Sequence[Pair]) -> Bucket:
    """The merged sums of these responses."""
    return reduce(Bucket.merge, (Bucket.of(train, rollout) for train, rollout in pairs), Bucket())


def log_ratios(part: str, pairs: Sequence[Pair]) -> Iterator[Row]:
    """METRICS 2: every name."""
    ours, wanted = bucket_of(pairs).metrics(), oracle.by_hand(pairs)
    for name in METRICS:
        if name in oracle.QUANTILES:
            rank = oracle.nearest_rank(pairs, oracle.QUANTILES[name])
            yield near(part, name, ours[name], rank, rel=SKETCH * min(1.0, rank))
        else:
            yield near(part, name, ours[name], wanted[name], rel=EXACT)
    unknown = ours.keys() - wanted.keys() - oracle.QUANTILES.keys()
    yield exactly(part, "names of METRICS 2 without a reference", len(unknown), 0)


def routing(part: str, a: Ids, b: Ids, margins: F64 | None, *, ordered: bool) -> Iterator[Row]:
    """METRICS 3: every name, over the valid cells of one response."""
    bucket = RouterBucket.of(a, b, margins=margins, rollout_ordered=ordered, train_ordered=ordered)
    ours: dict[str, Any] = bucket.metrics()
    wanted = by_hand.router(a, b, margins, ordered=ordered)
    for name in ROUTER_METRICS:
        if wanted[name] is None:
            yield exactly(part, name, ours[name], None)
        else:
            yield near(part, name, ours[name], wanted[name], rel=EXACT)
    yield exactly(
        part, "names of METRICS 3 without a reference", len(ours.keys() ^ wanted.keys()), 0
    )


def merging(part: str, pairs: Sequence[Pair]) -> Iterator[Row]:
    """Sums merged in any order, and through the JSON that is stored, are those of the whole."""
    buckets = [Bucket.of(train, rollout) for train, rollout in pairs]
    forward = reduce(Bucket.merge, buckets, Bucket())
    backward = reduce(lambda total, one: one.merge(total), reversed(buckets), Bucket())
    halves = [reduce(Bucket.merge, buckets[n::2], Bucket()) for n in (0, 1)]
    stored = [msgspec.json.decode(msgspec.json.encode(half), type=Bucket) for half in halves]
    for what, other in (("reversed", backward), ("halves, stored", stored[0].merge(stored[1]))):
        apart = [
            abs(value - again) / max(1.0, abs(value))
            for value, again in zip(
                forward.metrics().values(), other.metrics().values(), strict=True
            )
            if value is not None and again is not None
        ]
        yield worst(part, f"all metrics, merged {what}", max(apart), 1e-12, "merged in order")
        nulls = len(other.undefined()), len(forward.undefined())
        yield exactly(part, f"metrics that are null, merged {what}", *nulls)


def coverage(part: str) -> Iterator[Row]:
    """95 % intervals by cluster bootstrap hold the truth in 95 % of simulated worlds."""
    rng = np.random.default_rng(0)
    held = {"log_ratio_mean": 0, "extreme_frac_tau1.25": 0}
    # A trajectory's offset has deviation .1 and its tokens .1 around it: |D| > log 1.25 in this
    # share of tokens, by the normal distribution with deviation .1 * sqrt 2.
    truth = {"log_ratio_mean": 0.0, "extreme_frac_tau1.25": 1 - erf(log(1.25) / (0.1 * 2))}
    for world in range(WORLDS):
        offsets = rng.normal(0, 0.1, CLUSTERS)
        rollout = np.full(TOKENS, -2.0)
        buckets = {
            str(n): Bucket.of(rollout + offset + rng.normal(0, 0.1, TOKENS), rollout)
            for n, offset in enumerate(offsets)
        }
        found = intervals(buckets, seed=world, resamples=400).values
        for name in held:
            low, high = found[name]
            held[name] += low <= truth[name] <= high
    # Three standard errors of a share of so many worlds, and 1.5 % by which percentile intervals of
    # 60 clusters are known to be too narrow.
    tolerance = 3 * (NOMINAL * (1 - NOMINAL) / WORLDS) ** 0.5 + 0.015
    for name, count in held.items():
        share = count / WORLDS
        what = f"worlds whose interval of {name} holds the truth"
        yield Row(part, what, share, NOMINAL, abs(share - NOMINAL), tolerance)

"""Buckets merge: the metrics of merged parts are those of the whole."""

from __future__ import annotations

import math
from functools import reduce

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftgate.mismatch import Bucket
from driftgate.readout import Value
from driftgate.sums import QUANTILE_RELATIVE_ERROR, LogSum, Moments, Sketch

logprob = st.floats(-1000.0, 0.0) | st.floats(-3.0, 0.0) | st.sampled_from([math.nan, -9999.0])
pairs = st.lists(st.tuples(logprob, logprob), min_size=0, max_size=6)


def bucket(sequence: list[tuple[float, float]], name: str = "") -> Bucket:
    data = np.array(sequence, dtype=np.float64).reshape(-1, 2)
    return Bucket.of(data[:, 0], data[:, 1], trace_id=name)


def close(a: Value, b: Value) -> bool:
    return (a is None and b is None) or a == pytest.approx(b, rel=1e-9, abs=1e-9)


def assert_same(a: Bucket, b: Bucket) -> None:
    mine, theirs = a.metrics(), b.metrics()
    assert a.undefined() == b.undefined()
    assert {name for name in mine if not close(mine[name], theirs[name])} == set()
    assert a.worst == b.worst


@given(st.lists(pairs, min_size=1, max_size=6))
@settings(max_examples=150)
def test_merge_is_associative_and_commutative(data: list[list[tuple[float, float]]]) -> None:
    parts = [bucket(sequence, f"{i}.0") for i, sequence in enumerate(data)]
    left = reduce(Bucket.merge, parts, Bucket())
    right = reduce(lambda acc, b: b.merge(acc), reversed(parts), Bucket())
    half = len(parts) // 2
    split = reduce(Bucket.merge, parts[:half], Bucket()).merge(
        reduce(Bucket.merge, parts[half:], Bucket())
    )
    assert_same(left, right)
    assert_same(left, split)
    json = msgspec.json.encode(left)
    assert msgspec.json.decode(json, type=Bucket) == left


@given(pairs, pairs)
@settings(max_examples=100)
def test_token_level_metrics_do_not_care_where_a_sequence_is_cut(
    first: list[tuple[float, float]], second: list[tuple[float, float]]
) -> None:
    whole = bucket(first + second).metrics()
    merged = bucket(first).merge(bucket(second)).metrics()
    by_token = [
        name
        for name in whole
        if name.startswith(
            ("kl_", "js", "tv", "log_ratio_m", "abs_", "extreme", "prob_", "n_t", "n_b")
        )
    ]
    by_token += ["mult_prob_error", "chi2_token", "mean_weight_token", "ess_kish_token"]
    assert {name for name in by_token if not close(merged[name], whole[name])} == set()


def test_empty_is_the_identity_and_merge_changes_nothing() -> None:
    one = bucket([(-1.0, -1.5), (-0.2, -0.1)])
    before = msgspec.json.encode(one)
    assert one.merge(Bucket()) == Bucket().merge(one) == one
    one.merge(one)
    assert msgspec.json.encode(one) == before
    assert msgspec.json.encode(Bucket()) == msgspec.json.encode(Bucket().merge(Bucket()))


def test_spread_survives_a_large_mean() -> None:
    """Sums of squares would lose 1e-9 against 1e4; centred moments do not."""
    x = np.random.default_rng(0).normal(8000.0, 1e-5, 500)
    parts = [Moments.of(x[i : i + 50]) for i in range(0, 500, 50)]
    merged = reduce(Moments.merge, parts, Moments())
    assert merged.std() == pytest.approx(x.std(ddof=1), rel=1e-5)


@given(st.lists(st.floats(-2000.0, 2000.0), min_size=1, max_size=20))
def test_log_sum_equals_a_sorted_log_sum(x: list[float]) -> None:
    merged = reduce(LogSum.merge, (LogSum.of(np.array([v])) for v in x), LogSum())
    top = max(x)
    expected = top + math.log(math.fsum(math.exp(v - top) for v in x))
    assert merged.log() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert LogSum.of(np.array(x)).log() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(
    st.lists(st.floats(1e-30, 9000.0), min_size=1, max_size=200),
    st.sampled_from([0.001, 0.25, 0.5, 0.9, 0.99, 0.999, 1.0]),
)
def test_sketch_quantile_keeps_its_bound(x: list[float], q: float) -> None:
    half = len(x) // 2
    sketch = Sketch.of(np.array(x[:half])).merge(Sketch.of(np.array(x[half:])))
    rank = max(1, math.ceil(round(q * len(x), 9)))
    assert sketch.quantile(q) == pytest.approx(
        sorted(x)[rank - 1], rel=QUANTILE_RELATIVE_ERROR * (1 + 1e-9)
    )


def test_sketch_counts_zeros_apart() -> None:
    sketch = Sketch.of(np.array([0.0, 0.0, 0.0, 5.0]))
    assert sketch.quantile(0.75) == 0.0
    assert sketch.quantile(1.0) == pytest.approx(5.0, rel=QUANTILE_RELATIVE_ERROR)
    assert Sketch().quantile(0.5) is None

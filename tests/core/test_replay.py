"""Shares of drift that replay removes, against plain sums, and what a cell makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from driftgate.bootstrap import replay_intervals
from driftgate.gateway import shape
from driftgate.mismatch import Bucket
from driftgate.pool import Pools
from driftgate.replay import ReplayPair
from driftgate.testing.traces import ENGINE, TRAINER
from driftgate.trace import Comparable, Sampling, ScoreMeta

ABS, K3 = "replay_removes_abs_log_ratio_mean", "replay_removes_kl_k3_rollout_train"


def ratios(seed: int, n: int = 40) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.1, n), rng.normal(0, 0.04, n)


def meta(seed: int, trajectory: str = "t", **fields: Any) -> ScoreMeta:
    native, under = ratios(seed)
    rollout = np.full(len(native), -1.0)
    given: dict[str, Any] = {
        "trace_id": f"{seed}.0",
        "trajectory": trajectory,
        "step": 0,
        "choice": 0,
        "model": "m",
        "engine": ENGINE,
        "trainer": TRAINER,
        "sampling": Sampling(temperature=1.0),
        "bucket": Bucket.of(rollout + native, rollout),
        "replay": Bucket.of(rollout + under, rollout),
        "replay_coverage": 0.5,
        "comparable": Comparable(verdict="yes"),
        "scored_ns": 1,
    }
    return ScoreMeta(**(given | fields))


def pair(seed: int) -> ReplayPair:
    found = ReplayPair.of(meta(seed))
    assert found is not None
    return found


def by_hand(*seeds: int) -> dict[str, float]:
    native = np.concatenate([ratios(seed)[0] for seed in seeds])
    under = np.concatenate([ratios(seed)[1] for seed in seeds])
    k3 = [float((np.exp(d) - 1 - d).mean()) for d in (native, under)]
    return {ABS: 1 - np.abs(under).mean() / np.abs(native).mean(), K3: 1 - k3[1] / k3[0]}


def test_shares_are_ratios_of_means_and_merge_exactly() -> None:
    assert pair(1).shares() == pytest.approx(by_hand(1))
    both = pair(1).merge(pair(2))
    assert both.shares() == pytest.approx(by_hand(1, 2))
    assert both.coverage == 0.5
    assert both.undefined() == {}


def test_replay_that_makes_it_worse_has_a_negative_share() -> None:
    one = pair(1)
    turned = ReplayPair(native=one.under, under=one.native, covered=one.covered)
    share = turned.shares()[ABS]
    assert share is not None
    assert share < -0.5


def test_shares_of_other_tokens_are_null_with_the_reason() -> None:
    rollout = np.full(3, -1.0)
    short = Bucket.of(np.array([-1.1, np.nan, -1.2]), rollout)
    one = ReplayPair(native=pair(1).native, under=short, covered=2.0)
    assert one.shares() == {ABS: None, K3: None}
    assert one.undefined()[ABS].startswith("40 tokens compare natively and 2 under replay")


def test_a_cell_folds_only_comparable_scores_that_were_scored_both_ways() -> None:
    pools = Pools()
    for one in (
        meta(1),
        meta(2),
        meta(3, replay=None),
        meta(4, comparable=Comparable(verdict="no")),
    ):
        pools.add(one)
    judged = pools.judge(ENGINE)
    assert judged.bucket is not None
    assert judged.bucket.n_tokens == 120
    assert judged.replay is not None
    assert judged.replay.native.n_tokens == judged.replay.under.n_tokens == 80
    assert judged.replay.shares() == pytest.approx(by_hand(1, 2))


def test_an_invalid_comparison_shows_its_numbers_and_no_share() -> None:
    view = shape.replay(pair(1), comparable=False)
    assert view is not None
    assert view.measures.metrics["abs_log_ratio_mean"] == pytest.approx(np.abs(ratios(1)[1]).mean())
    assert view.shares.metrics == {ABS: None, K3: None}
    assert "not valid" in view.shares.undefined[ABS]


def test_intervals_of_a_share_cover_it_and_come_from_whole_trajectories() -> None:
    seeds = range(40)
    pairs = {str(seed): pair(seed) for seed in seeds}
    found = replay_intervals(pairs)
    assert not found.few
    for name, share in by_hand(*seeds).items():
        low, high = found.values[name]
        assert low < share < high
        # The same draw by hand, from the raw ratios.
        assert (low, high) == pytest.approx(resampled(name, len(pairs)), abs=0.01)
    assert replay_intervals({"one": pair(1)}).values == {}
    assert replay_intervals({}).values == {}


def resampled(name: str, n: int) -> tuple[float, float]:
    rng = np.random.default_rng(1)
    shares = [by_hand(*(int(i) for i in rng.integers(0, n, n)))[name] for _ in range(1000)]
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)

"""Cluster bootstrap: against a loop that resamples trajectories, and on data with known spread."""

from __future__ import annotations

import numpy as np
import pytest

from driftgate.bootstrap import intervals, router_intervals
from driftgate.mismatch import Bucket
from driftgate.router import RouterBucket


def trajectories(n: int, seed: int = 0, tokens: int = 40) -> dict[str, Bucket]:
    """Tokens of one trajectory share an offset: they are not independent."""
    rng = np.random.default_rng(seed)
    out = {}
    for i in range(n):
        rollout = np.log(rng.uniform(0.1, 0.9, tokens))
        train = rollout + rng.normal(0, 0.05) + rng.normal(0, 0.01, tokens)
        out[f"t{i}"] = Bucket.of(train, rollout)
    return out


def test_intervals_equal_a_loop_over_resampled_trajectories() -> None:
    data = trajectories(12)
    rows = [data[name] for name in sorted(data)]
    rng = np.random.default_rng(5)
    counts = rng.multinomial(12, np.full(12, 1 / 12), size=50)
    k3, kish, seq = [], [], []
    for draw in counts:
        total = Bucket()
        for row, times in zip(rows, draw, strict=True):
            for _ in range(times):
                total = total.merge(row)
        values = total.metrics()
        k3.append(values["kl_k3_rollout_train"])
        kish.append(values["ess_kish_token"])
        seq.append(values["ess_kish_seq"])
    found = intervals(data, seed=5, resamples=50)
    for name, draws in (
        ("kl_k3_rollout_train", k3),
        ("ess_kish_token", kish),
        ("ess_kish_seq", seq),
    ):
        expected = np.quantile(np.array(draws, dtype=float), [0.025, 0.975])
        assert found.values[name] == pytest.approx(tuple(expected), rel=1e-9), name


def test_trajectories_are_the_unit_not_tokens() -> None:
    """The offset of a trajectory has std .05: with 40 of them the mean has std .05 / sqrt(40)."""
    low, high = intervals(trajectories(40)).values["log_ratio_mean"]
    assert high - low == pytest.approx(2 * 1.96 * 0.05 / np.sqrt(40), rel=0.3)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """95 % of simulated worlds, within three standard errors of a share of 150 worlds and the 2 %
    by which percentile intervals of 50 clusters are too narrow. Intervals that took tokens for
    independent would hold it in some 50 %."""
    held, worlds = 0, 150
    for world in range(worlds):
        low, high = intervals(trajectories(50, world, tokens=8), resamples=250).values[
            "log_ratio_mean"
        ]
        held += low <= 0.0 <= high
    assert held / worlds == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / worlds) ** 0.5 + 0.02)


def test_intervals_are_deterministic_and_hold_the_value() -> None:
    data = trajectories(35)
    first, again = intervals(data), intervals(dict(reversed(data.items())))
    assert first == again
    assert not first.few
    assert first != intervals(data, seed=1)
    total = Bucket()
    for bucket in data.values():
        total = total.merge(bucket)
    for name, (low, high) in first.values.items():
        value = total.metrics()[name]
        assert value is not None
        assert low - 1e-12 <= value <= high + 1e-12, name


def test_few_trajectories_are_marked_and_one_has_no_interval() -> None:
    assert intervals(trajectories(29)).few
    lonely = intervals(trajectories(1))
    assert (lonely.n_trajectories, lonely.few, lonely.values) == (1, True, {})
    assert intervals({"a": Bucket(n_bad_tokens=3)}).n_trajectories == 0


def test_overflowing_sums_have_no_interval_but_the_rest_has() -> None:
    data = trajectories(5) | {"wild": Bucket.of(np.array([-1.0]), np.array([-700.0]))}
    found = intervals(data).values
    assert "kl_k3_rollout_train" not in found
    assert "abs_log_ratio_mean" in found


def test_router_intervals_are_by_trajectory() -> None:
    rng = np.random.default_rng(0)
    data = {}
    for i in range(40):
        a = np.argsort(rng.random((30, 2, 8)), axis=-1)[..., :2].astype(np.uint8)
        b = a.copy()
        b[: i % 10] = (a[: i % 10].astype(int) + 1) % 8
        data[f"t{i}"] = RouterBucket.of(a, b)
    low, high = router_intervals(data).values["router_set_disagree_rate"]
    rates = np.arange(10) / 30
    assert low < rates.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * rates.std() / np.sqrt(40), rel=0.3)

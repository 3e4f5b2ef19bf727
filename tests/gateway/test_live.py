"""Drift over time and the alarms drawn from it, by value against records that are known."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from driftgate.gateway.alarms import alarms
from driftgate.gateway.live import BLOCK_TOKENS, CellKey, Live, Sums, stretch
from driftgate.listings import TrajectoryRow
from driftgate.mismatch import Bucket
from driftgate.storage import Activity, ScoreRow
from driftgate.testing.traces import STEP_NS, TRAINER, make_score, make_trajectory
from driftgate.trace import Comparable, Score, Trace

QUIET = Activity(
    window_s=60.0, calls=0, response_tokens=0, running=0, open_calls=0, stale_calls=0,
    with_gaps=0, waiting=0, oldest_waiting_ns=None, last_call_ns=None,
)  # fmt: skip
KEY: CellKey = ("engine", "trainer", "tiny", "drift")


def scores(steps: int, *, verdict: str = "yes", noise: float = 0.01) -> list[Score]:
    comparable = msgspec.convert({"verdict": verdict}, Comparable)
    traces = make_trajectory(steps=steps, response=30, routed=False)
    return [make_score(t, noise=noise, comparable=comparable, seed=n) for n, t in enumerate(traces)]


def live(*found: Score) -> Live:
    rows = [ScoreRow(seq=n + 1, meta=score.meta) for n, score in enumerate(found)]
    made = Live(lambda after, limit: [row for row in rows if row.seq > after][:limit])
    made.refresh()
    made.refresh()  # each score once, however often it is asked
    return made


def test_a_slot_has_the_metrics_of_its_merged_buckets() -> None:
    found = scores(4)
    (line,) = live(*found).series(2 * STEP_NS / 1e9, {})
    assert sum(point.scores for point in line.points) == 4
    for point in line.points:
        bucket = Bucket()
        for score in found:
            if 0 <= score.meta.scored_ns - point.start_ns < 2 * STEP_NS:
                assert score.meta.bucket is not None
                bucket = bucket.merge(score.meta.bucket)
        assert point.n_tokens == bucket.n_tokens
        for name in ("kl_k3_rollout_train", "abs_log_ratio_mean", "extreme_frac_tau2"):
            assert point.metrics[name] == pytest.approx(bucket.metrics()[name], rel=1e-12)


def test_what_is_not_comparable_is_counted_and_left_out() -> None:
    (line,) = live(*scores(3, verdict="no")).series(1e6, {})
    (point,) = line.points
    assert (point.scores, point.not_comparable, point.n_tokens) == (0, 3, 0)
    assert set(point.metrics.values()) == {None}
    assert live(*scores(3, verdict="no")).worst(5, {}) == []


def test_the_worst_token_of_a_trajectory_is_its_largest() -> None:
    found = scores(5)
    (worst,) = live(*found).worst(5, {})
    sizes = [abs(score.meta.worst.log_ratio) for score in found if score.meta.worst]
    assert abs(worst.worst.log_ratio) == max(sizes)
    assert worst.step == int(np.argmax(sizes))


def sums(k3: float, at: int, *, zero: int = 0, cells: int = 0) -> Sums:
    n = BLOCK_TOKENS
    return Sums(scored_ns=at, scores=1, n_tokens=n, k3=k3 * n, all_cells=cells, zero_overlap=zero)


def codes(*rows: Sums, activity: Activity = QUIET, now_ns: int = 0) -> dict[str, int | None]:
    found = alarms({KEY: rows}, [], activity, 10, now_ns=now_ns)
    return {alarm.code: alarm.since_ns for alarm in found}


def test_a_stretch_begins_where_the_condition_last_began() -> None:
    rows = [sums(0.1, 1), sums(0.0, 2), sums(0.1, 3), sums(0.3, 4)]
    now = stretch(rows, lambda total: (total.metrics()["kl_k3_rollout_train"] or 0) > 0.05)
    assert now is not None
    assert now.scored_ns == 3
    assert now.metrics()["kl_k3_rollout_train"] == pytest.approx(0.2)


def test_drift_sounds_while_it_lasts_and_falls_silent_after() -> None:
    assert codes(sums(0.0, 1), sums(0.02, 2), sums(0.03, 3)) == {"drift_red": 2}
    assert codes(sums(0.02, 1), sums(0.004, 2)) == {"drift_amber": 2}
    assert codes(sums(0.02, 1), sums(0.0, 2)) == {}


def test_routes_without_a_common_expert_are_misaligned() -> None:
    right, wrong = sums(0.0, 1, cells=1000), sums(0.0, 2, cells=1000, zero=310)
    assert codes(right, wrong) == {"routes_misaligned": 2}
    (alarm,) = alarms({KEY: [right, wrong]}, [], QUIET, 10, now_ns=0)
    assert "zero overlap 31% of 1000" in alarm.text
    assert codes(wrong, right) == {}


def test_bad_tokens_and_what_waits_are_said() -> None:
    bad = sums(0.0, 1)._replace(n_bad_tokens=2)
    assert codes(bad) == {"bad_tokens": 1}
    waits = msgspec.structs.replace(QUIET, waiting=3, oldest_waiting_ns=5)
    assert codes(activity=waits, now_ns=5 + 59 * 10**9) == {}
    assert codes(activity=waits, now_ns=5 + 61 * 10**9) == {"worker_behind": 5}
    lost = msgspec.structs.replace(QUIET, with_gaps=2, stale_calls=1)
    assert codes(activity=lost) == {"capture_gaps": None, "stale_calls": None}


def run(name: str) -> TrajectoryRow:
    counts = dict.fromkeys(("steps", "choices", "captured", "scorable", "scored", "missing"), 0)
    more = {"open_calls": 0, "failed_calls": 0, "models": [], "started_ns": 0, "ended_ns": 0}
    known = {"trajectory": name, "complete": True, "reward": None, "gaps": []}
    return msgspec.convert(known | counts | more, TrajectoryRow)


def test_a_list_of_runs_has_the_drift_of_the_furthest_pair() -> None:
    far = scores(3, noise=0.2)
    other = msgspec.structs.replace(TRAINER, dtype="float8")
    near = scores(3)
    for score in near:
        score.meta.trainer = other
    refused = scores(1, verdict="no", noise=5.0)
    (row,) = live(*near, *far, *refused).with_drift([run("t1")], {})
    assert row.drift is not None
    traces = make_trajectory(steps=3, response=30, routed=False)
    d = np.concatenate([_log_ratios(t, s) for t, s in zip(traces, far, strict=True)])
    assert (row.drift.n_tokens, row.drift.pairs) == (len(d), 2)
    assert row.drift.abs_log_ratio_mean == pytest.approx(np.abs(d).mean(), rel=1e-9)
    assert row.drift.abs_log_ratio_max == pytest.approx(np.abs(d).max(), rel=1e-9)
    assert live(*refused).with_drift([run("t1")], {})[0].drift is None


def test_what_a_cell_refutes_is_no_evidence_anywhere() -> None:
    found = scores(3)
    folded = live(*found)
    ((key, rows),) = folded.cells({}).items()
    refuted = {key: {row.pool for row in rows}}
    (line,) = folded.series(1e6, refuted)
    assert [(p.scores, p.not_comparable, p.n_tokens) for p in line.points] == [(0, 3, 0)]
    assert folded.worst(5, {})
    assert folded.worst(5, refuted) == []
    assert folded.with_drift([run("t1")], refuted)[0].drift is None
    other = {key: {"another pool"}}
    assert folded.series(1e6, other) == folded.series(1e6, {})


def _log_ratios(trace: Trace, score: Score) -> npt.NDArray[np.float64]:
    assert trace.logprobs is not None
    good = score.logprobs <= 1e-6  # others are no log-probabilities
    ratios: npt.NDArray[np.float64] = score.logprobs.astype(float) - trace.logprobs.astype(float)
    return ratios[good]

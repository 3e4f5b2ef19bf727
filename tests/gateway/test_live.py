"""Drift over time and the alarms drawn from it, by value against records that are known."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from driftgate.codes import CODES, reason
from driftgate.engine_views import EngineState
from driftgate.gateway.alarms import alarms
from driftgate.gateway.live import BLOCK_TOKENS, CellKey, Live, Sums, stretch
from driftgate.listings import TrajectoryRow
from driftgate.mismatch import Bucket
from driftgate.storage import Activity, ScoreRow
from driftgate.storage.cells import CellFold
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


def sums(k3: float, at: int, *, zero: int = 0, cells: int = 0, n: int = BLOCK_TOKENS) -> Sums:
    return Sums(scored_ns=at, scores=1, n_tokens=n, k3=k3 * n, all_cells=cells, zero_overlap=zero)


def codes(*rows: Sums, activity: Activity = QUIET, now_ns: int = 0) -> dict[str, int | None]:
    found = alarms({KEY: rows}, [], activity, 10, now_ns=now_ns)
    return {alarm.code: alarm.since_ns for alarm in found}


def test_a_stretch_begins_where_the_condition_last_began() -> None:
    rows = [sums(0.1, 1), sums(0.0, 2), sums(0.1, 3), sums(0.3, 4)]
    now = stretch(
        rows,
        lambda total: (total.metrics()["kl_k3_rollout_train"] or 0) > 0.05,
        lambda row: row.n_tokens,
    )
    assert now is not None
    assert now.scored_ns == 3
    assert now.metrics()["kl_k3_rollout_train"] == pytest.approx(0.2)


def test_drift_sounds_while_it_lasts_and_falls_silent_after() -> None:
    assert codes(sums(0.0, 1), sums(0.02, 2), sums(0.03, 3)) == {"drift_red": 2}
    assert codes(sums(0.02, 1), sums(0.0, 2)) == {}


def test_amber_goes_on_through_what_was_worse() -> None:
    rows = [sums(0.0, 1), sums(0.004, 2), sums(0.02, 3), sums(0.004, 4)]
    assert codes(*rows) == {"drift_amber": 2}


def test_an_answer_that_cannot_be_compared_does_not_end_an_alarm() -> None:
    masked = sums(0.0, 3, n=0, cells=BLOCK_TOKENS)._replace(k3=0.0, scores=0, not_comparable=1)
    red = [sums(0.1, 1, cells=24 * BLOCK_TOKENS), sums(0.1, 2, cells=24 * BLOCK_TOKENS)]
    assert codes(*red, masked) == {"drift_red": 1}
    assert codes(masked, *red) == {"drift_red": 1}


def test_routes_do_not_fill_a_block_of_tokens() -> None:
    """One lucky answer of 16 tokens and 48 layers among red ones ended the alarm."""
    red = [sums(0.1, at, n=16, cells=16 * 48) for at in range(64)]
    assert codes(*red, sums(0.0, 64, n=16, cells=16 * 48)) == {"drift_red": 0}


def test_drift_needs_a_whole_block_of_tokens() -> None:
    assert codes(sums(0.1, 1, n=BLOCK_TOKENS - 1)) == {}
    assert codes(sums(0.1, 1, n=BLOCK_TOKENS - 1), sums(0.1, 2, n=1)) == {"drift_red": 1}
    assert codes(sums(0.1, 1, n=8), sums(0.1, 2)) == {"drift_red": 1}


def test_one_token_alone_is_no_alarm() -> None:
    """D = 1.5 gives a block of 512 a k3 of .0039; F(2) wants three tokens."""
    far = sums(0.0, 1)._replace(k3=math.expm1(1.5) - 1.5, worst=1.5, over_2=1)
    assert far.metrics()["kl_k3_rollout_train"] == pytest.approx(3.88e-3, rel=1e-2)
    assert far.but_worst().metrics()["kl_k3_rollout_train"] == pytest.approx(0.0, abs=1e-12)
    assert codes(far) == {}
    assert codes(far._replace(k3=2 * far.k3 if far.k3 else None, over_2=2)) == {"drift_amber": 1}
    assert codes(sums(0.0, 1)._replace(over_2=2)) == {}
    assert codes(sums(0.0, 1)._replace(over_2=3)) == {"drift_amber": 1}


def routed(rate: float, at: int, *, n: int = BLOCK_TOKENS) -> Sums:
    """Of ``n`` tokens and 8 layers, without any other drift."""
    return sums(0.0, at, n=n, cells=8 * n)._replace(cells=8 * n, disagree=round(8 * n * rate))


def test_routes_out_of_band_sound_as_drift_does() -> None:
    assert codes(routed(0.0, 1), routed(0.4, 2), routed(0.3, 3)) == {"drift_red": 2}
    assert codes(routed(0.15, 1)) == {"drift_amber": 1}
    assert codes(routed(0.05, 1)) == codes(routed(0.4, 1), routed(0.0, 2)) == {}
    (alarm,) = alarms({KEY: [routed(0.4, 1)]}, [], QUIET, 10, now_ns=0)
    assert "router_set_disagree_rate 0.4, the band's red begins at 0.2; 512 tokens" in alarm.text


def test_layers_do_not_fill_a_block_of_routes() -> None:
    assert codes(routed(0.4, 1, n=BLOCK_TOKENS - 1)) == {}
    assert codes(routed(0.4, 1), sums(0.0, 2)) == {"drift_red": 1}, "no routes there"


def test_the_alarm_of_an_fp8_engine_has_the_wider_band() -> None:
    meta = scores(1)[0].meta
    meta.engine = msgspec.structs.replace(meta.engine, settings={"quantization": "fp8"})
    fold = CellFold(meta)
    fold.fold(meta)
    at = (meta.engine.digest, meta.trainer.digest, meta.model, meta.kind)
    found = alarms({at: [sums(0.012, 1)], KEY: [sums(0.012, 1)]}, [fold.row(1)], QUIET, 1, now_ns=0)
    assert [alarm.severity for alarm in found] == ["red", "amber"]
    assert found[1].engine_digest == meta.engine.digest


def test_the_worst_token_of_merged_sums_is_the_furthest() -> None:
    both = Sums.merge([sums(0.0, 1)._replace(worst=-2.0), sums(0.0, 2)._replace(worst=1.0)])
    assert both.worst == -2.0
    found = scores(1)[0].meta
    assert found.worst is not None
    assert Sums.of(found).worst == found.worst.log_ratio
    assert Sums.of(found).refuted().worst == 0.0


def refused(*codes: str, pooled: str | None = None) -> str:
    """What the alarm about a cell says of whose scores each carries ``codes``."""
    reasons = [reason(code, "", "") for code in codes]
    comparable = Comparable(verdict="yes" if pooled else "no", reasons=reasons)
    fold = None
    for score in scores(4):
        meta = msgspec.structs.replace(score.meta, comparable=comparable)
        fold = fold or CellFold(meta)
        fold.fold(meta)
    assert fold is not None
    findings = {"a pool": [reason(pooled, "", "")]} if pooled else {}
    row = msgspec.structs.replace(fold.row(4), verdict="no", findings=findings)
    (alarm,) = alarms({}, [row], QUIET, 1, now_ns=0)
    return alarm.text.split(". ", 1)[1]


def test_only_what_refuses_a_comparison_is_named_as_its_cause() -> None:
    noted = ("weight_version_unknown", "raw_logprobs_not_sampling_density")
    assert refused(*noted, "grammar_masked") == CODES["grammar_masked"]
    assert refused(*noted, pooled="not_sampling_density") == CODES["not_sampling_density"]
    assert refused(*noted) == "No score has numbers."


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


@pytest.mark.parametrize(
    ("seconds", "words"), [(7140, "119 min"), (7200, "2 h"), (172_800, "2 d"), (46e6, "532 d")]
)
def test_what_waits_is_said_as_the_page_says_it(seconds: float, words: str) -> None:
    waits = msgspec.structs.replace(QUIET, waiting=3, oldest_waiting_ns=0)
    (alarm,) = alarms({}, [], waits, 1, now_ns=int(seconds * 1e9))
    assert alarm.text == f"Answers that wait to be scored: 3, the oldest for {words}"


def engine(url: str, **state: object) -> EngineState:
    known = dict.fromkeys(("engine", "version", "error", "paused"))
    rest = {"models": [], "weight_version": "0", "weights_from_ns": 0, "in_flight": 2}
    return msgspec.convert({"upstream": url, **known, **rest, **state}, EngineState)


def test_an_engine_that_is_away_is_said_first() -> None:
    gone, well = engine("http://a", error="its /health did not answer"), engine("http://b")
    lost = msgspec.structs.replace(QUIET, with_gaps=2)
    first, *_ = alarms({KEY: [sums(0.1, 1)]}, [], lost, 3, now_ns=0, engines=[gone])
    assert (first.severity, first.code) == ("red", "engine_away")
    assert first.text == "Engine away: http://a: its /health did not answer"
    (one,) = alarms({}, [], QUIET, 0, now_ns=0, engines=[gone, well])
    assert (one.severity, one.fix) == ("amber", "other engines take its calls until it is back")
    assert alarms({}, [], QUIET, 0, now_ns=0, engines=[well]) == []


def test_an_engine_that_stays_paused_is_said() -> None:
    paused = engine("http://a", paused="new weights", paused_ns=5)
    assert alarms({}, [], QUIET, 0, now_ns=5 + 59 * 10**9, engines=[paused]) == []
    (alarm,) = alarms({}, [], QUIET, 0, now_ns=5 + 60 * 10**9, engines=[paused])
    assert (alarm.code, alarm.since_ns) == ("engine_paused", 5)
    assert "http://a (new weights), calls still there: 2" in alarm.text


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

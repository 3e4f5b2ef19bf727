"""What readers say of a store, against what was put in."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from driftgate.errors import NotFoundError
from driftgate.mismatch import Bucket
from driftgate.storage import Reader, Record, Writer, index, rebuild_index
from driftgate.storage.queries import GROUP, PROMPT_KEY, WINDOW
from driftgate.testing.traces import (
    ENGINE,
    EPOCH_NS,
    STEP_NS,
    TRAINER,
    make_intent,
    make_score,
    make_trace,
    make_trajectory,
)
from driftgate.trace import CallOutcome, Comparable, Reason, Reward, Sampling

WAIT_S = 20


def put(writer: Writer, *records: Record) -> None:
    for future in [writer.submit(record) for record in records]:
        future.result(WAIT_S)


def failed(call_id: str, status: str = "failed") -> CallOutcome:
    fields = {"call_id": call_id, "status": status, "reason": "HTTP 500", "ended_ns": EPOCH_NS}
    return msgspec.convert(fields, CallOutcome)


def test_what_is_unknown_is_not_found(writer: Writer, reader: Reader) -> None:
    for ask in (reader.trace, reader.score, reader.trajectory):
        with pytest.raises(NotFoundError, match="'nope'"):
            ask("nope")
    with pytest.raises(NotFoundError, match="'nope'"):
        reader.trajectories(before="nope")
    assert reader.calls("nope") == []
    assert reader.traces("nope") == []
    assert reader.scores("nope") == []
    assert reader.reward("nope") is None


def test_a_whole_trajectory(writer: Writer, reader: Reader) -> None:
    traces = list(make_trajectory(steps=3))
    for trace in traces:
        put(writer, make_intent(trace), trace)
    put(writer, make_score(traces[0]), Reward(trajectory="t1", value=0.25, given_ns=1))
    row = reader.trajectory("t1")
    assert (row.steps, row.choices, row.captured, row.scorable, row.scored) == (3, 3, 3, 3, 1)
    assert (row.complete, row.gaps, row.missing) == (True, [], 0)
    assert (row.models, row.reward) == (["tiny-moe"], 0.25)
    assert (row.started_ns, row.ended_ns) == (EPOCH_NS, EPOCH_NS + 2 * STEP_NS + STEP_NS // 2)
    assert reader.traces("t1", 1)[0].meta == traces[1].meta
    assert [call.state for call in reader.calls("t1")] == ["done"] * 3


def test_an_open_call_is_a_gap_until_its_trace_arrives(writer: Writer, reader: Reader) -> None:
    trace = make_trace()
    put(writer, make_intent(trace))
    row = reader.trajectory("t1")
    assert (row.complete, row.open_calls, row.missing) == (False, 1, 1)
    assert row.gaps == ["step 0: call t1-0 has not ended"]
    assert [call.call_id for call in reader.open_calls()] == ["t1-0"]
    put(writer, trace)
    assert reader.trajectory("t1").complete
    assert reader.open_calls() == []


def test_a_choice_that_is_missing_is_a_gap(writer: Writer, reader: Reader) -> None:
    put(writer, make_trace(n=3), make_trace(n=3, choice=2))
    row = reader.trajectory("t1")
    assert (row.choices, row.captured, row.missing, row.complete) == (3, 2, 1, False)
    assert row.gaps == ["step 0: 2 of 3 choices captured"]


def test_what_a_trace_misses_is_a_gap(writer: Writer, reader: Reader) -> None:
    put(writer, make_trace(missing=["routed_experts: engine does not stream them"]))
    put(writer, make_trace(step=1, status="partial"))
    assert reader.trajectory("t1").gaps == [
        "step 0 choice 0: routed_experts: engine does not stream them",
        "step 1 choice 0: the answer did not end",
    ]


@pytest.mark.parametrize("status", ["failed", "cancelled", "capture_failed"])
def test_a_failed_call_is_a_gap_unless_it_is_repeated(
    writer: Writer, reader: Reader, status: str
) -> None:
    lost = make_trace(call_id="lost")
    put(writer, make_intent(lost), failed("lost", status))
    row = reader.trajectory("t1")
    assert (row.complete, row.failed_calls, row.missing) == (False, 1, 1)
    assert row.gaps == [f"step 0: {status}: HTTP 500"]
    again = make_trace(call_id="again", retry=1)
    put(writer, make_intent(again), again)
    row = reader.trajectory("t1")
    assert row.complete == (status != "capture_failed")  # the agent got that answer: it stays lost
    assert row.failed_calls == 1
    assert row.missing == (status == "capture_failed")


def test_an_answer_that_was_taken_back_is_whole_and_its_delivery_uncertain(
    writer: Writer, reader: Reader
) -> None:
    """``strict`` records an answer before it is sent; what is lost is its delivery."""
    sent, unsent = make_trace(call_id="a", trace_id="a.0"), make_trace(call_id="b", trace_id="b.0")
    for trace in (sent, unsent):
        put(writer, make_intent(trace), trace)
    put(writer, failed("b", "cancelled"))
    row = reader.trajectory("t1")
    assert (row.complete, row.missing, row.gaps) == (True, 0, [])
    found = {row.meta.call_id: row.meta.delivery for row in reader.traces("t1")}
    assert found == {"a": "delivered", "b": "uncertain"}
    assert reader.trace("a.0").meta.delivery == "delivered"
    assert reader.trace("b.0").meta.delivery == "uncertain"


def test_a_prompt_group_is_of_one_prompt_and_model_and_near_in_time(
    writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = make_trace().prompt_ids
    assert prompt is not None

    def first(name: str, at: int, **changes: Any) -> None:
        made = make_trace(trajectory=name, call_id=name, trace_id=f"{name}.0", started_ns=at)
        trace = replace(made, **({"prompt_ids": prompt} | changes))
        put(writer, make_intent(trace), trace)

    for at, name in enumerate("abcdef", 1):
        first(name, at)
    first("other", 7, prompt_ids=prompt[::-1].copy())
    first("longer", 8, prompt_ids=np.append(prompt, prompt[:1]))
    first("none", 9, prompt_ids=None)
    assert reader.prompt_group("c") == list("abcdef")
    assert reader.prompt_group("other") == ["other"]
    assert reader.prompt_group("none") == []
    monkeypatch.setattr("driftgate.storage.reader.GROUP_WINDOW", 2)
    assert reader.prompt_group("c") == list("bcde")


def test_a_prompt_group_counts_runs_and_not_their_choices(
    writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("driftgate.storage.reader.GROUP_WINDOW", 4)
    for at, name in enumerate("abcd"):
        for choice in range(4):
            made = make_trace(trajectory=name, choice=choice, n=4, started_ns=1 + at)
            shared = make_trace(trajectory="a").prompt_ids
            put(writer, replace(made, prompt_ids=shared))
    assert reader.prompt_group("b") == list("abcd")


def test_a_prompt_group_is_found_without_a_scan(writer: Writer, reader: Reader) -> None:
    put(writer, make_intent(make_trace()))
    connection = reader._connections.get()
    for sql, values in (
        (PROMPT_KEY, ("t",)),
        (WINDOW, (1, 2)),
        (GROUP, ("k", 1, 0, 2, 3)),
    ):
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
        tables = [line for line in plan if "traces" in line or "trajectories" in line]
        assert tables
        assert all("SEARCH" in line and "INDEX" in line for line in tables), plan


def test_a_partial_answer_that_is_asked_for_again_stays_a_gap(
    writer: Writer, reader: Reader
) -> None:
    partial = make_trace(missing=["end: cut"], status="partial", call_id="a", trace_id="a.0")
    again = make_trace(call_id="b", trace_id="b.0", retry=1)
    for trace in (partial, again):
        writer.submit(make_intent(trace))
        writer.submit(trace)
    writer.flush()
    assert not reader.trajectory("t1").complete
    assert reader.trajectory("t1").gaps == ["step 0 choice 0: end: cut"]


def test_pages_are_newest_first(writer: Writer, reader: Reader) -> None:
    for i in range(5):
        put(writer, make_trace(trajectory=f"t{i}", step=i))
    page = reader.trajectories(limit=2)
    assert [row.trajectory for row in page] == ["t4", "t3"]
    page = reader.trajectories(limit=2, before="t3")
    assert [row.trajectory for row in page] == ["t2", "t1"]
    assert [row.trajectory for row in reader.trajectories(before="t1")] == ["t0"]
    assert reader.trajectories(before="t0") == []


def test_filters(writer: Writer, reader: Reader) -> None:
    whole, partial = make_trace(trajectory="whole"), make_trace(trajectory="partial", n=2)
    other = make_trace(trajectory="other", model="dense")
    put(writer, whole, partial, other, make_score(whole))

    def names(**asked: object) -> set[str]:
        return {row.trajectory for row in reader.trajectories(**asked)}  # type: ignore[arg-type]

    assert names(complete=True) == {"whole", "other"}
    assert names(complete=False) == {"partial"}
    assert names(scored=True) == {"whole"}
    assert names(scored=False) == {"partial", "other"}
    assert names(model="dense") == {"other"}
    assert names(model="dense", scored=True) == set()


def test_counts(writer: Writer, reader: Reader) -> None:
    traces = list(make_trajectory(steps=2))
    put(writer, *traces, make_trace(trajectory="t2", n=2), make_score(traces[0]))
    assert msgspec.structs.asdict(reader.counts()) == {
        "trajectories": 2,
        "steps": 3,
        "calls": 3,
        "traces": 3,
        "complete": 1,
        "scorable": 3,
        "scored": 1,
        "scores": 1,
    }


def test_scores_follow_a_cursor(writer: Writer, reader: Reader) -> None:
    traces = list(make_trajectory(steps=4))
    put(writer, *traces)
    put(writer, make_score(traces[0], kind="noise_floor"), *map(make_score, traces))
    assert [row.seq for row in reader.scores()] == [1, 2, 3, 4, 5]
    assert [row.seq for row in reader.scores(after=3)] == [4, 5]
    assert [row.seq for row in reader.scores("t1", after=1, limit=2)] == [2, 3]
    assert [row.seq for row in reader.scores(kind="noise_floor")] == [1]
    assert reader.scores("t2") == []
    assert reader.last_seq() == 5
    assert reader.scores(after=1)[0].meta == make_score(traces[0]).meta


def test_the_latest_score_or_that_of_a_trainer(writer: Writer, reader: Reader) -> None:
    trace = make_trace()
    other = msgspec.structs.replace(TRAINER, dtype="bfloat16")
    put(writer, trace, make_score(trace), make_score(trace, seed=1, trainer=other))
    assert reader.score("t1-0.0").meta.trainer == other
    assert reader.score("t1-0.0", TRAINER.digest).meta.trainer == TRAINER
    with pytest.raises(NotFoundError, match="nobody"):
        reader.score("t1-0.0", "nobody")


def test_a_reward_given_later_counts(writer: Writer, reader: Reader) -> None:
    for value, given in ((1.0, 2), (5.0, 1), (0.5, 3)):
        put(writer, Reward(trajectory="t1", value=value, given_ns=given))
    reward = reader.reward("t1")
    assert reward is not None
    assert reward.value == 0.5


def folded(buckets: list[Bucket | None]) -> Bucket:
    total: Bucket | None = None
    for bucket in buckets:
        assert bucket is not None
        total = bucket if total is None else total.merge(bucket)
    assert total is not None
    return total


def test_cells_fold_every_score_once(writer: Writer, reader: Reader) -> None:
    traces = [*make_trajectory("a", steps=2), *make_trajectory("b", steps=2)]
    reason = Reason(code="weight_version_unknown", detail="d", fix="f")
    no = Comparable(verdict="no", reasons=[reason])
    scores = [make_score(trace, noise=0.1, seed=i) for i, trace in enumerate(traces[:3])]
    scores.append(make_score(traces[3], noise=0.5, comparable=no))
    put(writer, *traces, scores[0], scores[1])
    assert reader.cells()[0].scored == 2  # folded now; the rest later
    put(writer, scores[2], scores[3])
    (cell,) = reader.cells()
    assert (cell.engine, cell.trainer, cell.model, cell.kind) == (
        ENGINE,
        TRAINER,
        "tiny-moe",
        "drift",
    )
    assert cell.bucket == folded([score.meta.bucket for score in scores])
    assert cell.comparable_bucket == folded([score.meta.bucket for score in scores[:3]])
    assert (cell.comparable, cell.reasons) == ({"yes": 3, "no": 1}, {"weight_version_unknown": 1})
    assert (cell.n_seqs, cell.scored, cell.captured, cell.trajectories) == (4, 4, 4, 2)
    assert cell.worst is not None
    ratios = [abs(s.meta.worst.log_ratio) for s in scores[:3] if s.meta.worst]
    assert abs(cell.worst.log_ratio) == max(ratios)  # the larger one of scores[3] is not drift


def test_cells_never_mix_fingerprints(writer: Writer, reader: Reader) -> None:
    trace = make_trace()
    other = msgspec.structs.replace(TRAINER, dtype="bfloat16")
    put(writer, trace, make_score(trace), make_score(trace, trainer=other))
    put(writer, make_score(trace, trainer=ENGINE, kind="noise_floor"))
    put(writer, make_score(make_trace(step=1), bucket=None, worst=None))
    cells = reader.cells()
    assert {(c.trainer.digest, c.kind) for c in cells} == {
        (TRAINER.digest, "drift"),
        (other.digest, "drift"),
        (ENGINE.digest, "noise_floor"),
    }
    assert sorted((c.scored, c.n_seqs) for c in cells) == [(1, 1), (1, 1), (2, 1)]


def test_twins(writer: Writer, reader: Reader) -> None:
    one = make_trace(trajectory="x", call_id="one")
    calls = [
        make_trace(trajectory="x", call_id=f"twin{i}", started_ns=EPOCH_NS + i) for i in (1, 2)
    ]
    retry = make_trace(trajectory="x", call_id="retry", retry=1)
    unseeded = make_trace(trajectory="x", call_id="free", sampling=Sampling(temperature=1.0))
    put(writer, one, *calls, retry, unseeded, make_trace(trajectory="y"))
    assert reader.twins() == [("one.0", "twin1.0"), ("twin1.0", "twin2.0")]
    put(writer, make_score(calls[0], kind="noise_floor"))
    assert reader.twins(unscored=True) == [("twin1.0", "twin2.0")]


NO_IDS = np.zeros(0, np.int32)


def test_what_cannot_be_scored_is_not_scorable(writer: Writer, reader: Reader) -> None:
    scored, open_ = make_trajectory(steps=2)
    partial = make_trace(step=2, status="partial")
    without = replace(make_trace(step=3), logprobs=None)
    nothing_said = make_trace(step=4, response=0, routed=False)
    nothing_asked = replace(make_trace(step=5, prompt=1, routed=False), prompt_ids=NO_IDS)
    put(writer, scored, open_, partial, without, nothing_said, nothing_asked, make_score(scored))
    assert reader.trajectory("t1").scorable == 3


def test_queries_use_indexes(tmp_path: Path, writer: Writer, reader: Reader) -> None:
    """No query of a page reads a whole table."""
    put(writer, make_trace())
    seen: list[str] = []
    connection = sqlite3.connect(tmp_path / "index.sqlite")
    live = reader._connections.get()
    live.set_trace_callback(seen.append)
    reader.trajectories(before="t1", model="m", complete=True, scored=False)
    reader.trajectory("t1")
    reader.calls("t1")
    reader.traces("t1", 0)
    reader.scores("t1")
    reader.scores(after=3)
    reader.open_calls()
    live.set_trace_callback(None)
    plans = [row[3] for sql in seen for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}")]
    connection.close()
    assert len(seen) >= 7
    scans = [plan for plan in plans if plan.startswith("SCAN") and "INDEX" not in plan]
    assert scans == []


def test_a_store_that_may_not_be_written_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive that is mounted read-only, or another user's."""
    with closing(Writer(tmp_path)) as writer:
        put(writer, make_trace())
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(index, "_writable", lambda path: False)
    with closing(Reader(tmp_path)) as reader:
        assert reader.counts().traces == 1
        assert sorted(tmp_path.iterdir()) == before, "no -wal, no -shm"
        with closing(Writer(tmp_path)) as writer:  # its owner's gateway starts beside it
            put(writer, make_trace(trajectory="t2"))
            assert reader.counts().traces == 2


def test_what_was_read_before_a_rebuild_is_forgotten(tmp_path: Path) -> None:
    """A segment went between: neither its scores nor its traces are there any more."""
    with closing(Writer(tmp_path)) as gateway, closing(Writer(tmp_path, name="worker")) as worker:
        one, two = make_trace(trajectory="one"), make_trace(trajectory="two")
        put(gateway, one)
        put(worker, two, make_score(two))
        put(gateway, make_score(one))
    with closing(Reader(tmp_path)) as reader:
        assert [cell.scored for cell in reader.cells()] == [2]
        assert reader.trace("two-0.0").meta.trajectory == "two"
        (segment,) = tmp_path.glob("segments/worker-*.dgs")
        segment.unlink()
        rebuild_index(tmp_path)
        assert [cell.scored for cell in reader.cells()] == [1]
        with pytest.raises(NotFoundError):
            reader.trace("two-0.0")

"""A rebuild says what is lost, and changes nothing that others rely on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from driftgate.errors import StorageError
from driftgate.storage import (
    Reader,
    Record,
    Writer,
    encoder,
    index,
    read_segment,
    rebuild_index,
    recovery,
    segments,
)
from driftgate.storage.codec import pack_record
from driftgate.storage.index import OWNER_GONE, open_index, transaction
from driftgate.storage.inserts import add_intent, add_outcome
from driftgate.storage.records import Kind, encode_score, encode_small
from driftgate.storage.segments import header_bytes, records_start
from driftgate.testing.stores import flip
from driftgate.testing.traces import make_intent, make_score, make_trace, make_trajectory
from driftgate.trace import CallOutcome, Reward

Dump = Callable[[Path], dict[str, list[tuple[Any, ...]]]]
WAIT_S = 20


def write(root: Path, *records: Record, name: str = "gateway") -> Path:
    """Records by a writer of their own; its segment."""
    with closing(Writer(root, name=name)) as writer:
        for record in records:
            writer.submit(record).result(WAIT_S)
    (segment,) = root.glob(f"segments/{name}-*.dgs")
    return segment


def away(segment: Path) -> None:
    segment.rename(segment.with_suffix(".away"))


def cut(segment: Path) -> None:
    """At the end of its header, which is no torn record."""
    segment.write_bytes(segment.read_bytes()[: records_start(segment)])


def damage(segment: Path) -> None:
    flip(segment, records_start(segment))


@pytest.mark.parametrize(("harm", "how"), [(away, "away"), (cut, "damaged"), (damage, "damaged")])
def test_it_says_what_the_index_knew_and_no_segment_has(
    tmp_path: Path, harm: Callable[[Path], None], how: str
) -> None:
    trace = make_trace()
    write(tmp_path, make_intent(trace), trace)
    scores = write(tmp_path, make_score(trace), name="teacher")
    record_bytes = scores.stat().st_size - records_start(scores)
    harm(scores)
    report = rebuild_index(tmp_path)
    assert report.lost == [f"segment {scores.name} is {how}: scores 1"]
    assert report.damaged_bytes == (0 if how == "away" else record_bytes)
    assert report.torn_bytes == 0


def test_a_reward_that_is_lost_is_named(tmp_path: Path) -> None:
    write(tmp_path, make_trace())
    damage(write(tmp_path, Reward(trajectory="t1", value=1.0, given_ns=1), name="other"))
    assert rebuild_index(tmp_path).lost == ["t1: the reward that it was given last"]


@pytest.mark.parametrize("harm", [away, cut])
def test_a_writer_that_starts_says_which_bytes_are_not_there(
    tmp_path: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    segment = write(tmp_path, make_trace())
    harm(segment)
    with caplog.at_level(logging.ERROR):
        Writer(tmp_path, name="later").close()
    assert [f"{segment}: " in message for message in caplog.messages] == [True]
    assert "bytes are not there" in caplog.text


def test_a_run_whose_traces_are_built_on_a_lost_one_is_not_complete(tmp_path: Path) -> None:
    first, second, third = make_trajectory(steps=3)
    segment = write(tmp_path, first)
    write(tmp_path, second, third, name="later")
    away(segment)
    rebuild_index(tmp_path)
    with closing(Reader(tmp_path)) as reader:
        row = reader.trajectory("t1")
        assert not row.complete
        assert row.gaps == [
            "step 1 choice 0: it is built on t1-0.0, which is lost",
            "step 2 choice 0: it is built on t1-1.0, which is lost",
        ]
    segment.with_suffix(".away").rename(segment)
    Writer(tmp_path, name="next").close()
    with closing(Reader(tmp_path)) as reader:
        assert reader.trajectory("t1").complete


@pytest.mark.parametrize("dead_first", [True, False])
def test_scores_keep_their_numbers_however_often(tmp_path: Path, dead_first: bool) -> None:
    """Of two with one number, the worker of the other one died before it was in the index."""
    one, two = make_trajectory(steps=2)
    write(tmp_path, one, two)
    names = ("dead", "living") if dead_first else ("living", "dead")
    workers = {name: Writer(tmp_path, name=name) for name in names}
    workers["dead"].submit(Reward(trajectory="t1", value=1.0, given_ns=1)).result(WAIT_S)
    workers["living"].submit(make_score(two)).result(WAIT_S)
    for worker in workers.values():
        worker.close()
    (segment,) = tmp_path.glob("segments/dead-*.dgs")
    orphan = pack_record(Kind.SCORE, encode_score(make_score(one), seq=1), time_ns=0)
    segment.write_bytes(segment.read_bytes() + orphan)
    for _ in range(3):
        rebuild_index(tmp_path)
        with closing(Reader(tmp_path)) as reader:
            numbers = [(row.seq, row.meta.trace_id) for row in reader.scores()]
        assert numbers == [(1, "t1-1.0"), (2, "t1-0.0")]


def test_a_score_is_numbered_anew_also_where_the_recovering_writer_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make_trajectory(steps=2)
    write(tmp_path, one, two, make_score(two))
    segment = write(tmp_path, Reward(trajectory="t1", value=1.0, given_ns=1), name="dead")
    orphan = pack_record(Kind.SCORE, encode_score(make_score(one), seq=1), time_ns=0)
    segment.write_bytes(segment.read_bytes() + orphan)
    with closing(open_index(tmp_path / "index.sqlite", create=False)) as connection:
        assert len(recovery.recover(tmp_path, connection)) == 1  # and nothing of it is written
    Writer(tmp_path, name="next").close()
    with closing(Reader(tmp_path)) as reader:
        assert [(row.seq, row.meta.trace_id) for row in reader.scores()] == [
            (1, "t1-1.0"),
            (2, "t1-0.0"),
        ]


def test_the_record_that_its_writer_wrote_later_is_the_trace(tmp_path: Path) -> None:
    """The earlier one is of a batch that failed, in a segment that could not be cut; built on a
    trace of that batch, nobody can read it."""
    first, second = make_trajectory(steps=2)
    full = write(tmp_path, second)
    (entry,) = read_segment(full)
    both = write(tmp_path / "other", first, second)
    (_, delta) = read_segment(both)
    assert delta.header.record_bytes < entry.header.record_bytes
    stale = header_bytes("gateway", 0) + both.read_bytes()[delta.offset : delta.end]
    full.with_name(full.name.replace("000001", "000002")).write_bytes(full.read_bytes())
    full.write_bytes(stale)
    assert rebuild_index(tmp_path).lost == []
    with closing(Reader(tmp_path)) as reader:
        assert reader.trace(second.meta.trace_id).meta == second.meta
        (row,) = reader.traces("t1")
        assert (row.base, row.size_bytes) == (None, entry.header.record_bytes)


def test_what_is_said_of_a_call_beats_what_is_inferred_in_any_order(tmp_path: Path) -> None:
    trace = make_trace()
    inferred = CallOutcome(call_id="t1-0", status="failed", reason=OWNER_GONE, ended_ns=2)
    said = CallOutcome(call_id="t1-0", status="failed", reason="too long", ended_ns=1)
    with closing(open_index(tmp_path / "index.sqlite", create=True)) as connection:
        for outcomes in ((said, inferred), (inferred, said)):
            for early in (True, False):
                connection.execute("DELETE FROM calls")
                if early:
                    add_outcome(connection, outcomes[0])
                add_intent(connection, make_intent(trace), "gateway-1-1-000001.dgs")
                for outcome in outcomes[early:]:
                    add_outcome(connection, outcome)
                rows = connection.execute("SELECT json_extract(outcome, '$.reason') FROM calls")
                assert rows.fetchall() == [("too long",)]


def test_what_happened_lately_is_so_after_a_rebuild(tmp_path: Path) -> None:
    """Whatever the order in which segments are read."""
    write(tmp_path, make_trace(trajectory="new", started_ns=2 * 10**18), name="a")
    write(
        tmp_path, *(make_trace(trajectory=f"old{n}", started_ns=10**18) for n in range(3)), name="b"
    )

    def last_call() -> int | None:
        with closing(Reader(tmp_path)) as reader:
            return reader.activity(now_ns=2 * 10**18, window_s=60, stale_s=60).last_call_ns

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("driftgate.storage.glance.RECENT_CALLS", 2)
        assert last_call() == 2 * 10**18
        rebuild_index(tmp_path)
        assert last_call() == 2 * 10**18


def test_damage_that_is_not_searched_to_its_end_is_named_and_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "MAX_RESYNC_TRIES", 3)
    segment = write(tmp_path, make_trace())
    whole = segment.read_bytes()
    segment.write_bytes(whole + b"\xd9REC" * 4 + whole[records_start(segment) :])
    size = segment.stat().st_size
    report = rebuild_index(tmp_path)
    assert report.records == 1
    assert "more than 3 markers of records that are none" in report.unreadable[0]
    Writer(tmp_path, name="later").close()
    assert segment.stat().st_size == size


def test_a_number_that_the_index_cannot_hold_stops_nothing(tmp_path: Path) -> None:
    trace = make_trace()
    segment = write(tmp_path, trace)
    intent = make_intent(make_trace(trajectory="t2", started_ns=1 << 63))
    segment.write_bytes(segment.read_bytes() + pack_record(*encode_small(intent), time_ns=0))
    assert "too large" in rebuild_index(tmp_path).unreadable[0]
    Writer(tmp_path, name="later").close()
    with closing(Reader(tmp_path)) as reader:
        assert [row.trajectory for row in reader.trajectories()] == ["t1"]


def test_a_locked_index_is_not_said_to_need_a_rebuild(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "BUSY_TIMEOUT_S", 0.01)
    Writer(tmp_path).close()
    with (
        closing(open_index(tmp_path / "index.sqlite", create=False)) as connection,
        transaction(connection),
        pytest.raises(StorageError, match="another process keeps it locked") as caught,
    ):
        open_index(tmp_path / "index.sqlite", create=True)
    assert "rebuild" not in str(caught.value)


def test_a_segment_that_may_not_be_opened_counts_as_a_living_writers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = write(tmp_path, make_intent(make_trace()))

    def refused(path: Path) -> int | None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(segments, "take_over", refused)
    monkeypatch.setattr(recovery, "take_over", refused)
    assert rebuild_index(tmp_path).lost == ["t1 step 0: no trace of call t1-0"]
    Writer(tmp_path, name="later").close()
    with closing(Reader(tmp_path)) as reader:
        assert [call.state for call in reader.calls("t1")] == ["open"]
    assert segment.exists()


def test_a_base_that_cannot_be_read_costs_its_bytes_and_not_the_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_trajectory(steps=2)
    write(tmp_path, first)

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "load_trace", broken)
        write(tmp_path, second, name="later")
    with closing(Reader(tmp_path)) as reader:
        assert [row.base for row in reader.traces("t1")] == [None, None]


def test_a_reader_of_a_store_that_it_may_not_write_sees_what_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that came and went between two looks leaves the same file, and no WAL."""
    write(tmp_path, make_trace(trajectory="one"))
    with closing(Reader(tmp_path)) as reader:
        for names in (["one"], ["one", "two"]):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(index, "_writable", lambda path: False)
                assert sorted(row.trajectory for row in reader.trajectories()) == names
            if len(names) == 1:
                write(tmp_path, make_trace(trajectory="two"), name="two")


@pytest.mark.parametrize("limit", ["MAX_IDS", "MAX_ROUTES_BYTES"])
def test_a_trace_that_nobody_could_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """However little of it a record would hold."""
    first, second = make_trajectory(steps=2)
    assert first.routes is not None
    most = {"MAX_IDS": len(first.routes) + 1, "MAX_ROUTES_BYTES": first.routes.nbytes}
    monkeypatch.setattr("driftgate.storage.delta." + limit, most[limit])
    with closing(Writer(tmp_path)) as writer:
        writer.submit(first).result(WAIT_S)
        with pytest.raises(ValueError, match=f"at most {most[limit]}"):
            writer.submit(second).result(WAIT_S)
    with closing(Reader(tmp_path)) as reader:
        assert reader.trace(first.meta.trace_id).meta == first.meta

"""After a crash and from nothing: the index says again what the segments say."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import pytest

from driftgate.codes import reason
from driftgate.errors import FormatError, NotFoundError, StorageError
from driftgate.storage import Leases, Reader, Writer, append, read_segment, rebuild_index
from driftgate.storage.codec import pack_payload, pack_record
from driftgate.storage.index import OWNER_GONE
from driftgate.storage.records import Kind, encode_score, encode_small
from driftgate.storage.segments import MAGIC
from driftgate.testing.stores import flip
from driftgate.testing.traces import (
    assert_same_trace,
    make_intent,
    make_score,
    make_trace,
    make_trajectory,
)
from driftgate.trace import CallOutcome, Comparable, Reward

Dump = Callable[[Path], dict[str, list[tuple[Any, ...]]]]
WAIT_S = 20


def fill(root: Path, *, trajectories: int = 2) -> None:
    """A store with every kind of record, by a gateway and a worker at the same time."""
    gateway, worker = Writer(root), Writer(root, name="worker")
    for i in range(trajectories):
        for trace in make_trajectory(f"t{i}", steps=3):
            gateway.submit(make_intent(trace))
            gateway.submit(trace)
            gateway.flush(WAIT_S)
            worker.submit(make_score(trace))
        failed = make_trace(trajectory=f"t{i}", step=3)
        gateway.submit(make_intent(failed))
        gateway.submit(
            CallOutcome(call_id=failed.meta.call_id, status="failed", reason="died", ended_ns=1)
        )
        gateway.submit(Reward(trajectory=f"t{i}", value=1.0, given_ns=i))
        gateway.submit(make_intent(make_trace(trajectory=f"t{i}", step=4)))
    gateway.close()
    worker.close()


def end_open_calls(root: Path) -> None:
    """As the first writer does that starts after ``fill``."""
    Writer(root, name="later").close()


def test_a_rebuilt_index_has_the_same_content(tmp_path: Path, dump_index: Dump) -> None:
    fill(tmp_path)
    before = dump_index(tmp_path)
    assert {table: len(rows) for table, rows in before.items()} == {
        "segments": 2,
        "trajectories": 2,
        "calls": 10,
        "early_outcomes": 0,
        "traces": 6,
        "scores": 6,
        "rewards": 2,
        "sqlite_sequence": 1,
    }
    for name in ("index.sqlite", "index.sqlite-wal", "index.sqlite-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    report = rebuild_index(tmp_path)
    assert (report.segments, report.records, report.torn_bytes) == (2, 26, 0)
    assert dump_index(tmp_path) == before


def test_a_rebuild_keeps_the_score_that_followed_a_refusal(
    tmp_path: Path, dump_index: Dump
) -> None:
    trace, empty = make_trace(), make_trace(step=1, response=0, routed=False)
    why = reason("scoring_failed", "out of memory", "")
    refused = make_score(trace, bucket=None, comparable=Comparable(verdict="no", reasons=[why]))
    with closing(Writer(tmp_path)) as writer:
        for record in (trace, empty, refused, make_score(trace), refused):
            writer.submit(record).result(WAIT_S)
    before = dump_index(tmp_path)
    rebuild_index(tmp_path)
    assert dump_index(tmp_path) == before
    with closing(Reader(tmp_path)) as reader:
        assert reader.score(trace.meta.trace_id).meta.bucket is not None


def test_calls_of_a_dead_writer_are_ended_and_those_of_a_living_one_are_not(
    tmp_path: Path,
) -> None:
    """Also where the living one has left the segment that holds the intent."""
    dead, living = Writer(tmp_path, name="dead"), Writer(tmp_path, name="living")
    for writer, step in ((dead, 0), (living, 1)):
        writer.submit(make_intent(make_trace(trajectory="t", step=step)))
        writer.flush(WAIT_S)
    living._appender._leave_segment()
    dead.close()
    Writer(tmp_path).close()
    reader = Reader(tmp_path)
    first, second = reader.calls("t")
    reader.close()
    assert (first.state, second.state) == ("failed", "open")
    assert first.outcome is not None
    assert "the gateway ended before the call did" in first.outcome.reason
    living.close()


def three_calls(root: Path) -> Path:
    """A whole call, a second one, and a third that its gateway did not live to end."""
    writer = Writer(root)
    for trace in make_trajectory("t", steps=2):
        writer.submit(make_intent(trace))
        writer.submit(trace).result(WAIT_S)
    writer.submit(make_intent(make_trace(trajectory="t", step=2)))
    writer.close()
    (segment,) = root.glob("segments/gateway-*.dgs")
    return segment


def states(root: Path) -> list[str]:
    with closing(Reader(root)) as reader:
        return [call.state for call in reader.calls("t")]


def test_a_call_whose_record_is_damaged_is_not_said_to_be_lost_in_a_crash(tmp_path: Path) -> None:
    segment = three_calls(tmp_path)
    first = next(entry for entry in read_segment(segment) if entry.header.kind == Kind.TRACE)
    flip(segment, first.offset)
    assert rebuild_index(tmp_path).lost == [
        f"segment {segment.name} is damaged: traces 1",
        "t step 0: no trace of call t-0",
        "t step 2: no trace of call t-2",
        "t step 1: trace t-1.0 is built on t-0.0, which is lost",
    ]
    Writer(tmp_path, name="later").close()
    assert states(tmp_path) == ["open", "done", "open"]
    flip(segment, first.offset)  # restored from a copy
    assert rebuild_index(tmp_path).lost == []
    Writer(tmp_path, name="later").close()
    assert states(tmp_path) == ["done", "done", "failed"]


def test_a_damaged_last_record_is_no_torn_tail(tmp_path: Path) -> None:
    """It was whole once, and may come back from a copy: nobody cuts it."""
    segment = three_calls(tmp_path)
    *_, before, last = read_segment(segment)
    size = segment.stat().st_size
    flip(segment, last.offset)
    report = rebuild_index(tmp_path)
    assert (report.damaged_bytes, report.torn_bytes) == (size - before.end, 0)
    Writer(tmp_path, name="later").close()
    assert segment.stat().st_size == size


def test_a_call_whose_segments_are_away_is_not_said_to_be_lost(tmp_path: Path) -> None:
    """An archiver may take the segment whose lock says that its gateway lives."""
    segment = three_calls(tmp_path)
    segment.rename(tmp_path / "away")
    Writer(tmp_path, name="later").close()
    assert states(tmp_path) == ["done", "done", "open"]


def test_an_inferred_outcome_yields_to_the_trace(tmp_path: Path, dump_index: Dump) -> None:
    """Earlier versions wrote one for a call whose trace was damaged."""
    segment = three_calls(tmp_path)
    with closing(Writer(tmp_path, name="later")) as later:
        call_id = make_trace(trajectory="t", step=0).meta.call_id
        outcome = CallOutcome(call_id=call_id, status="failed", reason=OWNER_GONE, ended_ns=9)
        later.submit(outcome).result(WAIT_S)
    assert segment.exists()
    assert states(tmp_path) == ["done", "done", "failed"]
    with closing(Reader(tmp_path)) as reader:
        assert reader.trajectory("t").gaps == [f"step 2: failed: {OWNER_GONE}"]
    before = dump_index(tmp_path)
    rebuild_index(tmp_path)
    assert dump_index(tmp_path) == before


def test_a_lost_call_ended_when_its_gateway_wrote_last(tmp_path: Path) -> None:
    """Whatever happened to the file since: a cut tail, a copy."""
    segment = three_calls(tmp_path)
    *_, last = read_segment(segment)
    with segment.open("ab") as file:
        file.write(b"torn")
    Writer(tmp_path, name="later").close()
    with closing(Reader(tmp_path)) as reader:
        outcome = reader.calls("t")[2].outcome
    assert outcome is not None
    assert outcome.ended_ns == last.header.time_ns


def test_a_writer_whose_first_segment_came_late_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(append, "SegmentFile", full)
        living = Writer(tmp_path)
    living.submit(make_intent(make_trace())).result(WAIT_S)
    Writer(tmp_path, name="another").close()
    with closing(Reader(tmp_path)) as reader:
        assert [call.state for call in reader.calls("t1")] == ["open"]
    living.close()


def test_an_outcome_that_was_written_before_its_intent_counts(
    tmp_path: Path, dump_index: Dump
) -> None:
    """Storage refused the intent at first."""
    trace = make_trace()
    outcome = CallOutcome(call_id=trace.meta.call_id, status="failed", reason="500", ended_ns=9)
    writer = Writer(tmp_path)
    writer.submit(outcome).result(WAIT_S)
    writer.submit(make_intent(trace)).result(WAIT_S)
    writer.close()
    with closing(Reader(tmp_path)) as reader:
        assert [(call.state, call.outcome) for call in reader.calls("t1")] == [("failed", outcome)]
    before = dump_index(tmp_path)
    rebuild_index(tmp_path)
    assert dump_index(tmp_path) == before


def test_a_missing_index_comes_back_when_a_writer_starts(tmp_path: Path, dump_index: Dump) -> None:
    fill(tmp_path)
    end_open_calls(tmp_path)
    before = dump_index(tmp_path)
    (tmp_path / "index.sqlite").unlink()
    with pytest.raises(StorageError, match="index rebuild"):
        Reader(tmp_path).counts()
    Writer(tmp_path).close()
    assert dump_index(tmp_path) == before


def test_a_damaged_index_says_what_to_do_and_is_replaced(tmp_path: Path, dump_index: Dump) -> None:
    fill(tmp_path)
    before = dump_index(tmp_path)
    (tmp_path / "index.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(StorageError, match="index rebuild"):
        Reader(tmp_path).counts()
    rebuild_index(tmp_path)
    assert dump_index(tmp_path) == before


def test_an_open_reader_sees_the_rebuilt_index(tmp_path: Path) -> None:
    fill(tmp_path)
    reader = Reader(tmp_path)
    counts = reader.counts()
    rebuild_index(tmp_path)
    assert reader.counts() == counts


def test_a_rebuild_waits_for_no_live_writer(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    with pytest.raises(StorageError, match="live writers"):
        rebuild_index(tmp_path)
    writer.close()
    leases = Leases(tmp_path)
    with pytest.raises(StorageError, match="live writers"):
        rebuild_index(tmp_path)
    leases.close()
    assert rebuild_index(tmp_path).records == 0


def test_a_folder_that_is_no_store_is_not_made_one(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no driftgate store"):
        rebuild_index(tmp_path)
    with pytest.raises(StorageError, match="no driftgate index"):
        Reader(tmp_path).counts()
    assert not list(tmp_path.iterdir())


def test_a_store_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for make in (Writer, Leases):
        with pytest.raises(StorageError, match="may write"):
            make(tmp_path / "file")


@pytest.mark.parametrize("make", [Writer, Leases])
def test_a_new_store_is_its_owners_alone(make: type[Writer | Leases], tmp_path: Path) -> None:
    make(tmp_path / "new").close()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def forget(root: Path, *tables: str) -> None:
    """An index that fell back to nothing, as after a power cut."""
    connection = sqlite3.connect(root / "index.sqlite")
    with connection:
        for table in tables or ("segments", "trajectories", "calls", "traces", "scores", "rewards"):
            connection.execute(f"DELETE FROM {table}")
    connection.close()


def test_what_was_synced_but_not_indexed_is_indexed_at_start(
    tmp_path: Path, dump_index: Dump
) -> None:
    fill(tmp_path)
    end_open_calls(tmp_path)
    before = dump_index(tmp_path)
    forget(tmp_path)
    Writer(tmp_path).close()
    assert dump_index(tmp_path) == before


def test_a_torn_tail_is_cut_at_the_last_whole_record(tmp_path: Path, dump_index: Dump) -> None:
    fill(tmp_path, trajectories=1)
    end_open_calls(tmp_path)
    before = dump_index(tmp_path)
    (segment,) = tmp_path.glob("segments/gateway-*.dgs")
    size = segment.stat().st_size
    torn = pack_record(Kind.TRACE, pack_payload(b"{}", {}), time_ns=0)[:-1]
    segment.write_bytes(segment.read_bytes() + torn)
    assert rebuild_index(tmp_path).torn_bytes == len(torn)
    assert segment.stat().st_size == size + len(torn)  # a rebuild changes no segment
    Writer(tmp_path).close()
    assert segment.stat().st_size == size
    assert dump_index(tmp_path) == before


def test_the_tail_of_a_live_writer_is_left_alone(tmp_path: Path) -> None:
    live = Writer(tmp_path)
    live.submit(make_trace()).result(WAIT_S)
    (segment,) = tmp_path.glob("segments/*.dgs")
    with segment.open("ab") as file:
        file.write(b"being written")
    size = segment.stat().st_size
    Writer(tmp_path, name="worker").close()
    assert segment.stat().st_size == size
    live.close()


def test_a_file_that_is_no_segment_stops_nothing(tmp_path: Path) -> None:
    fill(tmp_path, trajectories=1)
    (tmp_path / "segments" / "x.dgs").write_bytes(b"not a segment")
    (tmp_path / "segments" / "empty.dgs").write_bytes(b"")
    (tmp_path / "segments" / "folder.dgs").mkdir()
    Writer(tmp_path).close()
    report = rebuild_index(tmp_path)
    assert len(report.unreadable) == 3
    assert Reader(tmp_path).counts().traces == 3


def test_a_segment_that_cannot_be_read_yet_keeps_what_is_not_indexed(tmp_path: Path) -> None:
    """One of a newer version, and a damaged header, are no reason to cut."""
    fill(tmp_path, trajectories=1)
    (segment,) = tmp_path.glob("segments/gateway-*.dgs")
    later = encode_small(Reward(trajectory="t0", value=2.0, given_ns=9))
    whole = segment.read_bytes() + pack_record(*later, time_ns=0)
    newer = bytearray(whole)
    newer[len(MAGIC)] = 2
    segment.write_bytes(newer)
    Writer(tmp_path).close()
    assert segment.read_bytes() == newer
    segment.write_bytes(whole)  # upgraded
    Writer(tmp_path).close()
    reward = Reader(tmp_path).reward("t0")
    assert reward is not None
    assert reward.value == 2.0


def test_a_record_whose_content_breaks_the_format_is_skipped_and_named(tmp_path: Path) -> None:
    fill(tmp_path, trajectories=1)
    (segment,) = tmp_path.glob("segments/gateway-*.dgs")
    size = segment.stat().st_size
    bad = [pack_record(kind, pack_payload(b"{}", {}), time_ns=0) for kind in (1, 2, 3, 99)]
    segment.write_bytes(segment.read_bytes() + b"".join(bad))
    report = rebuild_index(tmp_path)
    assert [text.split(":")[0] for text in report.unreadable] == [
        f"{segment.name} at {size + sum(map(len, bad[:n]))}" for n in range(4)
    ]
    assert Reader(tmp_path).counts().traces == 3


def test_damage_inside_a_segment_is_reported_and_takes_its_dependants_only(tmp_path: Path) -> None:
    fill(tmp_path)
    (segment,) = tmp_path.glob("segments/gateway-*.dgs")
    entries = [entry for entry in read_segment(segment) if entry.header.kind == Kind.TRACE]
    flip(segment, entries[0].offset)
    report = rebuild_index(tmp_path)
    assert report.damaged_bytes == entries[0].header.record_bytes
    reader = Reader(tmp_path)
    with pytest.raises(NotFoundError):
        reader.trace("t0-0.0")
    with pytest.raises(FormatError, match=r"t0-2\.0 is built on t0-0\.0, which is lost"):
        reader.trace("t0-2.0")
    assert_same_trace(reader.trace("t1-2.0"), list(make_trajectory("t1", steps=3))[2])
    assert not reader.trajectory("t0").complete


def test_a_score_whose_number_was_given_away_gets_a_new_one(
    tmp_path: Path, dump_index: Dump
) -> None:
    """The worker dies between sync and index; before it is recovered another takes its number."""
    one, two = make_trajectory(steps=2)
    gateway = Writer(tmp_path)
    gateway.submit(one)
    gateway.submit(two).result(WAIT_S)
    dead = Writer(tmp_path, name="dead")
    dead.submit(make_score(one)).result(WAIT_S)
    dead.close()
    connection = sqlite3.connect(tmp_path / "index.sqlite")
    with connection:
        connection.execute("DELETE FROM scores")
        connection.execute("DELETE FROM sqlite_sequence")
        connection.execute("DELETE FROM segments WHERE name LIKE 'dead-%'")
    connection.close()
    gateway.submit(make_score(two)).result(WAIT_S)
    Writer(tmp_path, name="worker").close()
    gateway.close()
    Writer(tmp_path, name="later").close()  # knows all of the dead one's segment as indexed
    rows = [(row.seq, row.meta.trace_id) for row in Reader(tmp_path).scores()]
    assert rows == [(1, "t1-1.0"), (2, "t1-0.0")]
    before = dump_index(tmp_path)
    rebuild_index(tmp_path)
    assert dump_index(tmp_path) == before


def test_a_rebuild_numbers_a_score_that_was_never_recovered(tmp_path: Path) -> None:
    one, two = make_trajectory(steps=2)
    writer = Writer(tmp_path)
    for record in (one, two, make_score(one)):
        writer.submit(record).result(WAIT_S)
    writer.close()
    (segment,) = tmp_path.glob("segments/*.dgs")
    orphan = pack_record(Kind.SCORE, encode_score(make_score(two), seq=1), time_ns=0)
    segment.write_bytes(segment.read_bytes() + orphan)
    rebuild_index(tmp_path)
    rows = [(row.seq, row.meta.trace_id) for row in Reader(tmp_path).scores()]
    assert rows == [(1, "t1-0.0"), (2, "t1-1.0")]


def test_the_number_of_a_score_that_was_lost_is_not_given_again(tmp_path: Path) -> None:
    """Who follows the scores from there on would miss the one that takes it."""
    one, two = make_trajectory(steps=2)
    with closing(Writer(tmp_path)) as writer:
        for record in (one, two, make_score(one)):
            writer.submit(record).result(WAIT_S)
    (segment,) = tmp_path.glob("segments/*.dgs")
    *_, score = read_segment(segment)
    flip(segment, score.offset)
    for _ in range(2):
        rebuild_index(tmp_path)
    with closing(Writer(tmp_path, name="later")) as writer:
        writer.submit(make_score(two)).result(WAIT_S)
    with closing(Reader(tmp_path)) as reader:
        assert [(row.seq, row.meta.trace_id) for row in reader.scores()] == [(2, "t1-1.0")]


CHILD = """
import sys
from pathlib import Path
from driftgate.storage import Writer
from driftgate.testing.traces import make_score, make_trajectory
root, name = Path(sys.argv[1]), sys.argv[2]
writer = Writer(root, name=name)
for trace in make_trajectory(name, steps=15):
    writer.submit(trace)
    writer.submit(make_score(trace))
    writer.flush(20)
writer.close()
"""


def test_two_writing_processes_and_a_reader(tmp_path: Path, dump_index: Dump) -> None:
    Writer(tmp_path).close()
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, tmp_path, name]) for name in ("a", "b")
    ]
    reader, seen = Reader(tmp_path), list[int]()
    while len(seen) < 30:
        new = reader.scores(after=seen[-1] if seen else 0)
        seen += [row.seq for row in new]
        for row in new:
            assert reader.trace(row.meta.trace_id).meta.trajectory == row.meta.trajectory
        if not new and all(child.poll() is not None for child in children):
            break
    assert [child.wait(60) for child in children] == [0, 0]
    assert seen == list(range(1, 31))  # a follower misses nothing and sees nothing twice
    before = dump_index(tmp_path)
    rebuild_index(tmp_path)
    assert dump_index(tmp_path) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from driftgate.storage import Writer, append
from driftgate.testing.traces import make_trajectory
writer = Writer(Path(sys.argv[1]))
first, second = make_trajectory(steps=2)
writer.submit(first).result(20)
append.set_indexed = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
writer.submit(second).result(20)
"""


def test_a_kill_between_sync_and_index_loses_nothing(tmp_path: Path) -> None:
    child = subprocess.run([sys.executable, "-c", KILLED, tmp_path], timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert Reader(tmp_path).counts().traces == 1
    Writer(tmp_path).close()
    assert_same_trace(Reader(tmp_path).trace("t1-1.0"), list(make_trajectory(steps=2))[1])


def test_files_are_where_the_format_says(tmp_path: Path) -> None:
    fill(tmp_path, trajectories=1)
    names = sorted(path.name.rsplit("-", 2)[0] for path in tmp_path.glob("segments/*"))
    assert names == [f"gateway-{os.getpid()}", f"worker-{os.getpid()}"]
    assert {path.name for path in tmp_path.iterdir()} >= {"index.sqlite", "writers.lock"}

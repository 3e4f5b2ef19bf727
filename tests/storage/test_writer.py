"""The writer: what it resolves is durable, what it cannot write it says, and it goes on."""

from __future__ import annotations

import base64
import errno
import math
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest
import zstandard

from driftgate.errors import StorageError
from driftgate.storage import Reader, Record, Writer, append, delta, encoder, read_segment
from driftgate.storage.append import Appender, Submission
from driftgate.storage.inserts import Place
from driftgate.storage.segments import SegmentFile, segment_paths
from driftgate.testing.traces import (
    assert_same_score,
    assert_same_trace,
    make_intent,
    make_score,
    make_trace,
    make_trajectory,
)
from driftgate.trace import CallOutcome, Reward, Trace

WAIT_S = 20


def test_every_kind_of_record_comes_back(writer: Writer, reader: Reader) -> None:
    trace = make_trace()
    score = make_score(trace)
    failed = make_trace(step=1)
    outcome = CallOutcome(call_id="t1-1", status="failed", http_status=500, reason="x", ended_ns=9)
    reward = Reward(trajectory="t1", value=0.5, given_ns=1)
    records: list[Record] = [make_intent(trace), trace, score, make_intent(failed), outcome, reward]
    for future in [writer.submit(record) for record in records]:
        future.result(WAIT_S)
    assert_same_trace(reader.trace("t1-0.0"), trace)
    assert_same_score(reader.score("t1-0.0"), score)
    assert [call.intent for call in reader.calls("t1")] == [make_intent(trace), make_intent(failed)]
    assert [call.outcome for call in reader.calls("t1")] == [None, outcome]
    assert reader.reward("t1") == reward
    assert writer.stats.written_records == 6
    assert (writer.stats.queued_records, writer.stats.queued_bytes) == (0, 0)


def test_a_trajectory_comes_back_from_a_new_reader(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta, "MAX_DEPTH", 8)
    traces = list(make_trajectory(steps=14))
    for trace in traces:
        writer.submit(trace)
    writer.flush(WAIT_S)
    for trace in reversed(traces):
        reader = Reader(tmp_path)  # nothing cached: the whole chain is read
        assert_same_trace(reader.trace(trace.meta.trace_id), trace)
        reader.close()
    bases = [row.base for row in Reader(tmp_path).traces("t1")]
    assert bases[1:9] == [f"t1-{step}.0" for step in range(8)]
    assert (bases[0], bases[9]) == (None, None)  # the chain was as long as it may be


def test_a_restarted_writer_continues_from_the_base_on_disk(tmp_path: Path) -> None:
    traces = list(make_trajectory(steps=3))
    for trace in traces:
        writer = Writer(tmp_path)
        writer.submit(trace)
        writer.close()
    reader = Reader(tmp_path)
    assert [row.base for row in reader.traces("t1")] == [None, "t1-0.0", "t1-1.0"]
    assert_same_trace(reader.trace("t1-2.0"), traces[2])
    assert len(list(tmp_path.glob("segments/*.dgs"))) == 3


def test_samples_of_one_call_are_stored_against_the_first(writer: Writer, reader: Reader) -> None:
    parent = make_trace()
    one = make_trace(step=1, base=parent, n=2)
    two = make_trace(step=1, base=parent, n=2, choice=1)
    for trace in (parent, one, two):
        writer.submit(trace)
    writer.flush(WAIT_S)
    assert [row.base for row in reader.traces("t1")] == [None, "t1-0.0", "t1-1.0"]
    assert_same_trace(reader.trace("t1-1.1"), two)


def test_without_a_parent_the_last_trace_of_the_trajectory_is_the_base(
    writer: Writer, reader: Reader
) -> None:
    first = make_trace(prompt=50)
    second = make_trace(step=1, base=first, parent=None)
    writer.submit(first)
    writer.submit(second).result(WAIT_S)
    assert reader.traces("t1", 1)[0].base == "t1-0.0"


def test_a_base_that_is_not_there_gives_a_full_record(writer: Writer, reader: Reader) -> None:
    second = make_trace(step=1, base=make_trace())
    writer.submit(second).result(WAIT_S)
    assert reader.traces("t1")[0].base is None
    assert_same_trace(reader.trace("t1-1.0"), second)


def test_a_lazy_submission_is_made_on_the_writer_thread(writer: Writer, reader: Reader) -> None:
    threads: list[str] = []

    def make() -> Sequence[Record]:
        threads.append(threading.current_thread().name)
        return list(make_trajectory(steps=2))

    writer.submit_lazy(make, size_hint=1000).result(WAIT_S)
    assert threads == ["driftgate-writer-gateway"]
    assert reader.counts().traces == 2


def test_a_lazy_submission_that_raises_fails_alone(writer: Writer, reader: Reader) -> None:
    def make() -> NoReturn:
        raise ZeroDivisionError("in make")

    bad, good = writer.submit_lazy(make, size_hint=1), writer.submit(make_trace())
    with pytest.raises(ZeroDivisionError, match="in make"):
        bad.result(WAIT_S)
    good.result(WAIT_S)
    assert (writer.stats.failed_records, reader.counts().traces) == (1, 1)


def test_it_tells_when_a_kill_would_lose_nothing_more(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    told, failed = threading.Event(), threading.Event()
    writer.submit_lazy(lambda: [make_trace()], size_hint=1, handed_over=told.set)
    writer.submit_lazy(_fails, size_hint=1, handed_over=failed.set)
    assert told.wait(WAIT_S)
    (path,) = segment_paths(tmp_path)
    assert len(list(read_segment(path))) == 1
    assert failed.wait(WAIT_S)
    writer.close()


def _fails() -> list[Record]:
    raise ValueError("routes of another shape")


def test_a_record_that_cannot_be_encoded_fails_alone(writer: Writer, reader: Reader) -> None:
    trace = make_trace()
    nan = Reward(trajectory="t1", value=float("nan"), given_ns=0)
    bad, good = writer.submit(nan), writer.submit(trace)
    with pytest.raises(ValueError, match="JSON cannot carry"):
        bad.result(WAIT_S)
    good.result(WAIT_S)
    assert (writer.stats.failed_records, reader.counts().traces) == (1, 1)


def test_a_second_score_or_trace_of_one_key_is_not_stored(writer: Writer, reader: Reader) -> None:
    trace = make_trace()
    for record in (trace, make_score(trace), make_score(trace, seed=1)):
        writer.submit(record).result(WAIT_S)
    writer.submit(trace).result(WAIT_S)
    assert writer.stats.duplicate_records == 2
    assert len(reader.scores()) == reader.last_seq() == 1
    assert_same_score(reader.score("t1-0.0"), make_score(trace))


@contextmanager
def held(writer: Writer) -> Iterator[None]:
    """The writer thread busy in a lazy submission."""
    started, go = threading.Event(), threading.Event()

    def make() -> Sequence[Record]:
        started.set()
        go.wait(WAIT_S)
        return ()

    writer.submit_lazy(make, size_hint=0)
    assert started.wait(WAIT_S)
    try:
        yield
    finally:
        go.set()


def test_a_full_queue_refuses_and_says_so(tmp_path: Path) -> None:
    writer = Writer(tmp_path, queue_bytes=10_000)
    with held(writer):
        accepted = writer.submit_lazy(lambda: [make_trace()], size_hint=9_000)
        with pytest.raises(StorageError, match=r"full: 9000 of 10000 bytes .* raise queue_bytes"):
            writer.submit_lazy(lambda: [], size_hint=2_000)
        assert (writer.stats.refused_records, writer.stats.queued_bytes) == (1, 9_000)
    accepted.result(WAIT_S)
    writer.submit(make_trace(step=1)).result(WAIT_S)
    writer.close()


def test_flush_says_when_it_takes_too_long(writer: Writer) -> None:
    with held(writer), pytest.raises(StorageError, match="still not on disk"):
        writer.flush(0.01)


def test_what_is_queued_is_synced_together(writer: Writer) -> None:
    with held(writer):
        futures = [writer.submit(trace) for trace in make_trajectory(steps=20)]
    for future in futures:
        future.result(WAIT_S)
    assert writer.stats.fsyncs in (1, 2)  # two where the first one met them half written


def test_close_writes_what_is_queued_and_can_be_repeated(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    futures = [writer.submit(trace) for trace in make_trajectory(steps=5)]
    writer.close()
    writer.close()
    assert all(future.done() for future in futures)
    with pytest.raises(StorageError, match="closed"):
        writer.submit(make_trace())


def test_a_cancelled_waiter_does_not_lose_the_record(writer: Writer, reader: Reader) -> None:
    future = writer.submit(make_trace())
    assert not future.cancel()
    future.result(WAIT_S)
    assert reader.counts().traces == 1


def test_a_full_disk_fails_the_batch_and_the_next_one_is_written(tmp_path: Path) -> None:
    """A real EFBIG in the middle of a record, by a limit on the size of files."""
    seen: list[Exception] = []
    writer = Writer(tmp_path, on_error=seen.append)
    first, second, third = make_trajectory(steps=3, prompt=400, layers=16)
    writer.submit(first).result(WAIT_S)
    (segment,) = tmp_path.glob("segments/*.dgs")
    size = segment.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5000, hard))
    try:
        with pytest.raises(StorageError, match="could not be written"):
            writer.submit(second).result(WAIT_S)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert segment.stat().st_size == size
    assert isinstance(seen[0].__cause__, OSError)
    assert (writer.stats.write_errors, writer.stats.failed_records) == (1, 1)
    for trace in (second, third):
        writer.submit(trace).result(WAIT_S)
    writer.close()
    reader = Reader(tmp_path)
    for trace in (first, second, third):
        assert_same_trace(reader.trace(trace.meta.trace_id), trace)


def test_a_record_that_the_index_refuses_fails_alone(writer: Writer, reader: Reader) -> None:
    bad = Reward(trajectory="t1", value=math.nan, given_ns=1)
    futures = [writer.submit(record) for record in (make_trace(), bad, make_trace(step=1))]
    writer.flush(WAIT_S)
    assert [future.exception() is None for future in futures] == [True, False, True]
    assert reader.counts().traces == 2


def test_a_submission_over_several_segments_is_taken_back_from_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(tmp_path)
    first, *rest = (make_intent(make_trace(step=step)) for step in range(4))
    writer.submit(first).result(WAIT_S)
    monkeypatch.setattr(append, "SEGMENT_BYTES", 10)  # each record fills one
    put, tries = Appender._put, [True, True, False]

    def disk_full(self: Appender, data: bytes, submission: Submission) -> Place:
        if not tries.pop(0):
            raise OSError(errno.ENOSPC, "no space left")
        return put(self, data, submission)

    with monkeypatch.context() as patch:
        patch.setattr(Appender, "_put", disk_full)
        failed = writer.submit_lazy(lambda: rest, size_hint=1)
        with pytest.raises(StorageError, match="no space left"):
            failed.result(WAIT_S)
    writer.close()
    assert sum(len(list(read_segment(path))) for path in segment_paths(tmp_path)) == 1


@pytest.mark.parametrize("operation", ["append", "sync", "truncate"])
def test_a_failing_disk_is_survived_wherever_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    writer = Writer(tmp_path)
    first, second, third = make_trajectory(steps=3)
    writer.submit(first).result(WAIT_S)

    def fail(*_: object) -> NoReturn:
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(SegmentFile, operation, fail)
        if operation == "truncate":
            patch.setattr(SegmentFile, "sync", fail)
        with pytest.raises(StorageError, match="input/output error"):
            writer.submit(second).result(WAIT_S)
    writer.submit(third).result(WAIT_S)
    writer.close()
    reader = Reader(tmp_path)
    assert [row.meta.trace_id for row in reader.traces("t1")] == ["t1-0.0", "t1-2.0"]
    assert_same_trace(reader.trace("t1-2.0"), third)


@contextmanager
def syncing(monkeypatch: pytest.MonkeyPatch, error: OSError | None = None) -> Iterator[None]:
    """The next sync is under way for the length of the block, and then fails with ``error``."""
    started, go = threading.Event(), threading.Event()
    sync = SegmentFile.sync

    def hang(segment: SegmentFile) -> None:
        first = not started.is_set()
        started.set()
        assert go.wait(WAIT_S)
        if first and error is not None:
            raise error
        sync(segment)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentFile, "sync", hang)
        try:
            yield
        finally:
            go.set()


def wait_for_records(root: Path, count: int) -> None:
    """Until the segments hold so many whole records, synced or not."""
    deadline = time.monotonic() + WAIT_S
    while sum(len(list(read_segment(path))) for path in segment_paths(root)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_slow_sync_holds_up_no_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(tmp_path)
    first, second, third = make_trajectory(steps=3)
    with syncing(monkeypatch):
        futures = [writer.submit(first)]
        wait_for_records(tmp_path, 1)
        futures += [writer.submit(second), writer.submit(third)]
        wait_for_records(tmp_path, 3)
        assert not any(future.done() for future in futures)  # none of them is durable
    writer.close()
    assert Reader(tmp_path).counts().traces == 3


def test_a_sync_that_fails_takes_back_what_was_written_on_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(tmp_path)
    traces = list(make_trajectory(steps=3))
    with syncing(monkeypatch, OSError(errno.EIO, "input/output error")):
        futures = [writer.submit(traces[0])]
        wait_for_records(tmp_path, 1)
        futures += [writer.submit(trace) for trace in traces[1:]]  # differences to the first
        wait_for_records(tmp_path, 3)
    for future in futures:
        future.result(WAIT_S)  # each was written once more, alone
    writer.close()
    reader = Reader(tmp_path)
    for trace in traces:
        assert_same_trace(reader.trace(trace.meta.trace_id), trace)
    assert sum(len(list(read_segment(path))) for path in segment_paths(tmp_path)) == 3


def test_scores_and_traces_of_one_writer_are_synced_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written while a score waits for its number lies before it, and is indexed with it."""
    writer = Writer(tmp_path)
    first, second, third = make_trajectory(steps=3)
    with syncing(monkeypatch):
        writer.submit(first)
        wait_for_records(tmp_path, 1)
        for record in (make_score(first), second, make_score(second), third):
            writer.submit(record)
        wait_for_records(tmp_path, 3)
    writer.close()
    reader = Reader(tmp_path)
    assert [score.meta.trace_id for score in reader.scores()] == ["t1-0.0", "t1-1.0"]
    assert reader.counts().traces == 3
    (segment,) = segment_paths(tmp_path)
    with sqlite3.connect(tmp_path / "index.sqlite") as connection:
        (end,) = connection.execute("SELECT indexed_bytes FROM segments").fetchone()
    assert end == segment.stat().st_size


def test_an_index_that_fails_takes_the_batch_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(tmp_path)

    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(append, "set_indexed", fail)
        with pytest.raises(StorageError, match="no space left"):
            writer.submit(make_trace()).result(WAIT_S)
    writer.submit(make_trace()).result(WAIT_S)
    writer.close()
    assert Reader(tmp_path).counts().traces == 1


@pytest.mark.parametrize("kind", ["trace", "score"])
def test_a_locked_index_is_waited_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    """A teacher that was suspended in its transaction costs no record, however long it takes."""
    monkeypatch.setattr("driftgate.storage.index.BUSY_TIMEOUT_S", 0.01)
    writer = Writer(tmp_path)
    first, second = make_trajectory(steps=2)
    writer.submit(first).result(WAIT_S)
    with closing(sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        future = writer.submit(second if kind == "trace" else make_score(first))
        deadline = time.monotonic() + WAIT_S
        while caplog.text.count("keeps the index locked") < 2:
            assert not future.done()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        other.execute("ROLLBACK")
    future.result(WAIT_S)
    writer.close()
    counts = Reader(tmp_path).counts()
    assert (counts.traces, counts.scores) == ((2, 0) if kind == "trace" else (1, 1))
    assert (writer.stats.failed_records, writer.stats.written_records) == (0, 2)


def test_segments_rotate_between_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append, "SEGMENT_BYTES", 4000)
    writer = Writer(tmp_path)
    traces = list(make_trajectory(steps=8))
    for trace in traces:
        writer.submit(trace).result(WAIT_S)
    writer.close()
    assert len(list(tmp_path.glob("segments/*.dgs"))) > 1
    reader = Reader(tmp_path)
    for trace in traces:
        assert_same_trace(reader.trace(trace.meta.trace_id), trace)


def test_a_base_that_left_the_cache_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "CACHE_BYTES", 1)
    writer = Writer(tmp_path)
    traces = list(make_trajectory(steps=4))
    for trace in traces:
        writer.submit(trace).result(WAIT_S)
    writer.close()
    reader = Reader(tmp_path)
    assert [row.base for row in reader.traces("t1")] == [None, "t1-0.0", "t1-1.0", "t1-2.0"]
    assert_same_trace(reader.trace("t1-3.0"), traces[3])


CHILD = """
import os, signal, sys
from pathlib import Path
from driftgate.storage import Writer
from driftgate.testing.traces import make_trajectory
writer = Writer(Path(sys.argv[1]), durability=sys.argv[2])
for trace in make_trajectory(steps=3):
    writer.submit(trace).result(20)
os.kill(os.getpid(), signal.SIGKILL)
"""


UNSYNCED = """
import os, signal, sys, threading, time
from pathlib import Path
from driftgate.storage import Writer, read_segment
from driftgate.storage.segments import SegmentFile, segment_paths
from driftgate.testing.traces import make_trajectory
root = Path(sys.argv[1])
writer = Writer(root)
SegmentFile.sync = lambda segment: threading.Event().wait()
for trace in make_trajectory(steps=3):
    writer.submit(trace)
while sum(len(list(read_segment(path))) for path in segment_paths(root)) < 3:
    time.sleep(0.001)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_written_survives_a_kill_without_a_sync(tmp_path: Path) -> None:
    child = subprocess.run([sys.executable, "-c", UNSYNCED, tmp_path], timeout=60)
    assert child.returncode == -signal.SIGKILL
    Writer(tmp_path).close()  # the next start
    reader = Reader(tmp_path)
    for trace in make_trajectory(steps=3):
        assert_same_trace(reader.trace(trace.meta.trace_id), trace)


@pytest.mark.parametrize("durability", ["strict", "group"])
def test_what_was_resolved_survives_a_kill(tmp_path: Path, durability: str) -> None:
    child = subprocess.run([sys.executable, "-c", CHILD, tmp_path, durability], timeout=60)
    assert child.returncode == -signal.SIGKILL
    reader = Reader(tmp_path)
    for trace in make_trajectory(steps=3):
        assert_same_trace(reader.trace(trace.meta.trace_id), trace)


def test_strict_does_not_wait_for_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("driftgate.storage.writer.GROUP_INTERVAL_S", 3600.0)
    writer = Writer(tmp_path, durability="strict")
    for trace in make_trajectory(steps=3):
        writer.submit(trace).result(WAIT_S)
    assert writer.stats.fsyncs == 3
    writer.close()


def test_group_waits_for_its_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("driftgate.storage.writer.GROUP_INTERVAL_S", 3600.0)
    writer = Writer(tmp_path)
    first, second, third = make_trajectory(steps=3)
    writer.submit(first).result(WAIT_S)
    futures = [writer.submit(second), writer.submit(third)]
    assert not any(future.done() for future in futures)
    writer.flush(WAIT_S)
    assert writer.stats.fsyncs in (2, 3)  # as above
    writer.close()


def json_line(trace: Trace) -> bytes:
    assert trace.prompt_ids is not None
    assert trace.response_ids is not None
    assert trace.logprobs is not None
    assert trace.routes is not None
    return msgspec.json.encode(
        {
            "meta": trace.meta,
            "prompt_ids": trace.prompt_ids.tolist(),
            "response_ids": trace.response_ids.tolist(),
            "logprobs": trace.logprobs.tolist(),
            "routes": base64.b64encode(trace.routes.tobytes()).decode(),
            "request": trace.request.decode(),
            "response": trace.response.decode(),
        }
    )


def test_a_growing_trajectory_takes_a_fraction_of_json_lines(
    writer: Writer, reader: Reader
) -> None:
    """Ten turns against the same traces as JSON lines, one zstd frame each."""
    traces = list(make_trajectory(steps=10, prompt=60, response=40, layers=24, experts=128, k=8))
    for trace in traces:
        writer.submit(trace)
    writer.flush(WAIT_S)
    theirs = sum(len(zstandard.compress(json_line(trace), 3)) for trace in traces)
    ours = sum(row.size_bytes for row in reader.traces("t1"))
    assert ours * 5 < theirs


def test_the_process_is_not_kept_alive_by_a_forgotten_writer(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from driftgate.storage import Writer\n"
        "Writer(Path(sys.argv[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], timeout=30).returncode == 0
    assert os.path.exists(tmp_path / "index.sqlite")

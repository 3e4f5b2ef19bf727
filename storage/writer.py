"""The writer: a bounded queue in front of two threads, one that writes and one that syncs.

``submit`` never blocks and does no work on the caller's thread. The first thread makes, encodes and
writes what is queued, and is held up by no sync: from then on a record survives the process. The
second syncs and indexes what was written meanwhile, and resolves its futures: from then on a record
survives the machine.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Literal

import msgspec

from driftgate.errors import StorageError
from driftgate.storage.append import Appender, Submission
from driftgate.storage.delta import trace_bytes
from driftgate.storage.index import INDEX_NAME, open_index
from driftgate.storage.records import Record
from driftgate.storage.recovery import StoreLock, recover
from driftgate.trace import Score, Trace

__all__ = ["Writer", "WriterStats"]

log = logging.getLogger(__name__)

QUEUE_BYTES = 256 << 20
"""Default bound of the queue: about 60 answers with 4.4 MB of routes, seconds of a busy gateway."""

WRITE_INTERVAL_S = 0.005
"""``group``: from one look into the queue to the next. A thread that wakes for each of thousands of
records a second takes the interpreter from the event loop as often; a tenth of GROUP_INTERVAL_S."""

GROUP_INTERVAL_S = 0.05
"""``group``: from one sync to the next (DESIGN 4)."""

BATCH_BYTES = 32 << 20
"""Queued memory that is made into records and synced at once: a full queue must not be in memory
twice, nor its first futures wait for its last."""

UNSYNCED_BYTES = 2 * BATCH_BYTES
"""Written records that wait for a sync, kept for a second try: one batch being synced, the next one
being written. A disk that syncs no faster holds up writing."""

RECORD_BYTES = 4096
"""Counted per queued record besides its arrays and bodies."""


class WriterStats(msgspec.Struct):
    """Counters since the writer started; queued ones are of now. Copied for every call, which a
    Struct does in a twentieth of a dataclass's time."""

    queued_records: int = 0
    """Submissions not yet resolved."""
    queued_bytes: int = 0
    written_records: int = 0
    written_bytes: int = 0
    """On disk, headers included."""
    duplicate_records: int = 0
    """Scores and traces that the store already had: not written, and not an error."""
    refused_records: int = 0
    """Submissions refused because the queue was full."""
    failed_records: int = 0
    """Submissions whose future failed."""
    write_errors: int = 0
    """Submissions of those that the disk or the index did not take."""
    fsyncs: int = 0
    last_fsync_s: float = 0.0


class Writer:
    """One directory, one series of segments. Thread-safe.

    Records are shared with the writer's threads and its cache: do not change them after ``submit``.
    """

    def __init__(
        self,
        root: Path,
        *,
        durability: Literal["group", "strict"] = "group",
        name: str = "gateway",
        queue_bytes: int = QUEUE_BYTES,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        """Open or create the store at ``root`` and recover what dead writers left.

        ``on_error`` is called on the syncing thread for every failed submission.
        """
        self._durability = durability
        self._limit = queue_bytes
        self._on_error = on_error
        self._stats = WriterStats()
        self._lock = threading.Lock()
        self._queued = threading.Condition(self._lock)
        self._written = threading.Condition(self._lock)
        self._resolved = threading.Condition(self._lock)
        self._queue: deque[Submission] = deque()
        self._submitted = self._done = 0
        self._unsynced_records = self._unsynced_bytes = 0
        self._wanted = 0
        """Somebody waits for so many to be done."""
        self._closing = self._drained = False
        """Nothing more comes; nothing more is written."""
        self._store_lock = StoreLock(root)
        try:
            self._connection = open_index(root / INDEX_NAME, create=True)
        except BaseException:
            self._store_lock.close()
            raise
        try:
            orphans = recover(root, self._connection)
            self._appender = Appender(root, self._connection, name=name)
        except BaseException:
            self._connection.close()
            self._store_lock.close()
            raise
        # Daemons: a forgotten close must not keep the process; close() joins them.
        self._threads = [
            threading.Thread(target=run, name=f"driftgate-{job}-{name}", daemon=True)
            for job, run in (("writer", self._write_all), ("sync", self._sync_all))
        ]
        for thread in self._threads:
            thread.start()
        for orphan in orphans:
            self.submit(orphan)
        self.flush()  # who reads the store from here on sees how those calls ended

    @property
    def stats(self) -> WriterStats:
        """A copy of the counters."""
        with self._lock:
            return copy.copy(self._stats)

    def submit(self, record: Record) -> Future[None]:
        """Queue a record. The future resolves when it is durable, and fails when it could not be
        written.

        StorageError when the queue is full or the writer is closed.
        """
        return self.submit_lazy(lambda: (record,), size_hint=_size(record))

    def submit_lazy(
        self,
        make: Callable[[], Sequence[Record]],
        *,
        size_hint: int,
        handed_over: Callable[[], None] | None = None,
    ) -> Future[None]:
        """Queue ``make``, which gives the records on the writer thread; ``size_hint`` is its memory
        in bytes.

        One future for all of them: it fails with the first error, whatever else could be written
        is. ``handed_over`` is called on the writer thread, long before that, when a kill of this
        process can lose nothing of them any more, or they could not be written.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # a waiter that leaves does not take it along
        with self._lock:
            if self._closing:
                raise StorageError("the writer is closed")
            stats = self._stats
            if stats.queued_records and stats.queued_bytes + size_hint > self._limit:
                stats.refused_records += 1
                raise StorageError(
                    f"write queue is full: {stats.queued_bytes} of {self._limit} bytes wait and "
                    f"{size_hint} more came; the disk is too slow for this, or raise queue_bytes"
                )
            stats.queued_records += 1
            stats.queued_bytes += size_hint
            self._submitted += 1
            self._queue.append(Submission(make, size_hint, future, handed_over))
            if len(self._queue) == 1:
                self._queued.notify()
        return future

    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until everything submitted so far is resolved; StorageError after ``timeout_s``."""
        with self._lock:
            self._wanted = target = self._submitted
            self._press()
            if not self._resolved.wait_for(lambda: self._done >= target, timeout_s):
                left = target - self._done
                raise StorageError(f"{left} records are still not on disk after {timeout_s} s")

    def close(self) -> None:
        """Write what is queued, then release everything; idempotent."""
        with self._lock:
            self._closing = True
            self._press()
        for thread in self._threads:
            thread.join()
        self._store_lock.close()

    def _press(self) -> None:
        """Let both threads look whether they may still wait; called with the lock held."""
        self._queued.notify()
        self._written.notify()

    @property
    def _at_once(self) -> bool:
        return self._durability == "strict" or self._done < self._wanted or self._closing

    # The writing thread.

    def _write_all(self) -> None:
        next_look = 0.0
        while submissions := self._take(next_look):
            next_look = time.monotonic() + WRITE_INTERVAL_S
            self._write(submissions)
            submissions.clear()  # nothing of them is kept while there is nothing to do
        with self._lock:
            self._drained = True
            self._written.notify()

    def _write(self, submissions: list[Submission]) -> None:
        for submission in submissions:
            try:
                submission.records = submission.make()
            except Exception as error:  # the caller's code, at the edge of one submission
                submission.error = error
            submission.make = _made  # it may hold a whole answer
            self._appender.write(submission)
            if submission.handed_over is not None:
                submission.handed_over()
        with self._lock:
            self._unsynced_records += len(submissions)
            self._unsynced_bytes += sum(one.size_bytes for one in submissions)
            self._written.notify()

    def _take(self, next_look: float) -> list[Submission]:
        """The next to write; empty when the writer is closed and all is written."""
        with self._lock:
            while True:
                delay_s = next_look - time.monotonic()
                if self._unsynced_bytes >= UNSYNCED_BYTES:
                    self._queued.wait()
                elif self._queue and (self._at_once or delay_s <= 0):
                    return self._batch()
                elif self._queue:
                    self._queued.wait(delay_s)
                elif self._closing:
                    return []
                else:
                    self._queued.wait()

    def _batch(self) -> list[Submission]:
        """The oldest of the queue, at least one; called with the lock held."""
        submissions = [self._queue.popleft()]
        size = submissions[0].size_bytes
        while self._queue and size + self._queue[0].size_bytes <= BATCH_BYTES:
            submissions.append(self._queue.popleft())
            size += submissions[-1].size_bytes
        return submissions

    # The syncing thread.

    def _sync_all(self) -> None:
        next_sync = 0.0
        while self._wait_for_written(next_sync):
            # From its start: what is written while this sync lasts waits for no more than it.
            next_sync = time.monotonic() + GROUP_INTERVAL_S
            self._resolve(self._appender.commit())
        self._appender.close()
        self._connection.close()

    def _wait_for_written(self, next_sync: float) -> bool:
        """False when the writer is closed and all is resolved."""
        with self._lock:
            while True:
                delay_s = next_sync - time.monotonic()
                if self._unsynced_records > 0:  # below: one is synced that is not counted yet
                    large = self._unsynced_bytes >= BATCH_BYTES
                    if self._at_once or large or delay_s <= 0:
                        return True
                    self._written.wait(delay_s)
                elif self._drained:
                    return False
                else:
                    self._written.wait()

    def _resolve(self, submissions: list[Submission]) -> None:
        """Tell ``on_error``, then the futures."""
        with self._lock:
            self._count(submissions)
        for one in submissions:
            if one.error is None:
                one.future.set_result(None)
                continue
            self._report(one.error)
            one.future.set_exception(one.error)
        with self._lock:
            self._done += len(submissions)
            self._resolved.notify_all()

    def _count(self, submissions: list[Submission]) -> None:
        stats, size = self._stats, sum(one.size_bytes for one in submissions)
        stats.queued_records -= len(submissions)
        stats.queued_bytes -= size
        self._unsynced_records -= len(submissions)
        self._unsynced_bytes -= size
        self._queued.notify()  # there is room for more
        for one in submissions:
            stats.failed_records += one.error is not None
            stats.write_errors += isinstance(one.error, StorageError)
            stats.written_records += one.written_records
            stats.written_bytes += one.written_bytes
            stats.duplicate_records += one.duplicates
        stats.fsyncs, stats.last_fsync_s = self._appender.fsyncs, self._appender.last_fsync_s

    def _report(self, error: Exception) -> None:
        log.warning("records lost: %s", error)
        if self._on_error is None:
            return
        try:
            self._on_error(error)
        except Exception:  # the caller's code must not end the syncing thread
            log.exception("on_error failed")


def _made() -> Sequence[Record]:
    raise AssertionError("a submission is made once")


def _size(record: Record) -> int:
    """Memory of a record while it is queued."""
    if isinstance(record, Trace):
        return trace_bytes(record) + RECORD_BYTES
    if isinstance(record, Score):
        arrays = (record.logprobs, record.entropy, record.logprobs_at_temperature, record.routes)
        return sum(a.nbytes for a in arrays if a is not None) + RECORD_BYTES
    return RECORD_BYTES

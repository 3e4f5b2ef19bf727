"""The writer: a bounded queue in front of one thread that appends, syncs and indexes in groups.

``submit`` never blocks and does no work on the caller's thread. A batch is what is queued, up to a
bound; its futures are resolved when it is synced and indexed. A batch that cannot be written is
taken back as a whole and its submissions are tried one by one, so that a bad one fails alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from driftgate.errors import StorageError
from driftgate.storage.append import Appender, Result
from driftgate.storage.delta import trace_bytes
from driftgate.storage.index import INDEX_NAME, open_index
from driftgate.storage.records import Record
from driftgate.storage.recovery import StoreLock, recover
from driftgate.trace import Score, Trace

__all__ = ["Writer", "WriterStats"]

log = logging.getLogger(__name__)

QUEUE_BYTES = 256 << 20
"""Default bound of the queue: about 60 answers with 4.4 MB of routes, seconds of a busy gateway."""

GROUP_INTERVAL_S = 0.025
"""``group``: from one batch to the next. Half of the 50 ms that may be lost (DESIGN 4); folding and
writing what came meanwhile needs the other half."""

BATCH_BYTES = 32 << 20
"""Queued memory that is made into records at once: a full queue must not be in memory twice, nor
its first futures wait for its last."""

RECORD_BYTES = 4096
"""Counted per queued record besides its arrays and bodies."""


@dataclass(slots=True)
class WriterStats:
    """Counters since the writer started; queued ones are of now."""

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
    """Batches that could not be written."""
    fsyncs: int = 0
    last_fsync_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Item:
    make: Callable[[], Sequence[Record]]
    size_bytes: int
    future: Future[None]


class Writer:
    """One directory, one writer thread, one series of segments. Thread-safe.

    Records are shared with the writer thread and its cache: do not change them after ``submit``.
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

        ``on_error`` is called on the writer thread for every failed batch or record.
        """
        self._durability = durability
        self._limit = queue_bytes
        self._on_error = on_error
        self._stats = WriterStats()
        self._wake = threading.Condition()
        self._queue: deque[_Item] = deque()
        self._submitted = self._done = 0
        self._hurry = self._closing = False
        self._next_sync = 0.0
        root.mkdir(parents=True, exist_ok=True)
        self._lock = StoreLock(root)
        try:
            self._connection = open_index(root / INDEX_NAME, create=True)
        except BaseException:
            self._lock.close()
            raise
        try:
            orphans = recover(root, self._connection)
            self._appender = Appender(root, self._connection, name=name)
        except BaseException:
            self._connection.close()
            self._lock.close()
            raise
        self._thread = threading.Thread(target=self._run, name=f"driftgate-writer-{name}")
        self._thread.daemon = True  # a forgotten close must not keep the process; close() joins
        self._thread.start()
        for orphan in orphans:
            self.submit(orphan)
        self.flush()  # who reads the store from here on sees how those calls ended

    @property
    def stats(self) -> WriterStats:
        """A copy of the counters."""
        with self._wake:
            return replace(self._stats)

    def submit(self, record: Record) -> Future[None]:
        """Queue a record. The future resolves when it is durable, and fails when it could not be
        written.

        StorageError when the queue is full or the writer is closed.
        """
        return self.submit_lazy(lambda: (record,), size_hint=_size(record))

    def submit_lazy(self, make: Callable[[], Sequence[Record]], *, size_hint: int) -> Future[None]:
        """Queue ``make``, which gives the records on the writer thread; ``size_hint`` is its memory
        in bytes.

        One future for all of them: it fails with the first error, whatever else could be written
        is.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # a waiter that leaves does not take it along
        with self._wake:
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
            self._queue.append(_Item(make, size_hint, future))
            if len(self._queue) == 1:
                self._wake.notify_all()
        return future

    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until everything submitted so far is resolved; StorageError after ``timeout_s``."""
        with self._wake:
            target = self._submitted
            self._hurry = True
            self._wake.notify_all()
            if not self._wake.wait_for(lambda: self._done >= target, timeout_s):
                left = target - self._done
                raise StorageError(f"{left} records are still not on disk after {timeout_s} s")

    def close(self) -> None:
        """Write what is queued, then release everything; idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join()
        self._lock.close()

    def _run(self) -> None:
        while items := self._take():
            # From its start: what comes while this batch is written waits for no more than it.
            self._next_sync = time.monotonic() + GROUP_INTERVAL_S
            errors = self._process(items)
            self._resolve(items, errors)
        self._appender.close()
        self._connection.close()

    def _take(self) -> list[_Item]:
        """The next batch; empty when the writer is closed and drained."""
        with self._wake:
            while True:
                if self._queue:
                    delay = self._next_sync - time.monotonic()
                    at_once = self._durability == "strict" or self._hurry or self._closing
                    if at_once or delay <= 0 or self._stats.queued_bytes >= BATCH_BYTES:
                        return self._batch()
                    self._wake.wait(delay)
                elif self._closing:
                    return []
                else:
                    self._hurry = False
                    self._wake.wait()

    def _batch(self) -> list[_Item]:
        """The oldest of the queue, at least one; called with the lock held."""
        items = [self._queue.popleft()]
        size = items[0].size_bytes
        while self._queue and size + self._queue[0].size_bytes <= BATCH_BYTES:
            items.append(self._queue.popleft())
            size += items[-1].size_bytes
        self._hurry = self._hurry and bool(self._queue)
        return items

    def _process(self, items: list[_Item]) -> list[Exception | None]:
        """Write a batch; the error of each item, None where it is durable."""
        groups: list[Sequence[Record]] = []
        errors: list[Exception | None] = [None] * len(items)
        for i, item in enumerate(items):
            try:
                groups.append(item.make())
            except Exception as error:  # the caller's code, at the edge of one item
                errors[i] = error
                groups.append(())
        return [mine or its for mine, its in zip(errors, self._commit(groups), strict=True)]

    def _commit(self, groups: Sequence[Sequence[Record]]) -> Sequence[Exception | None]:
        """Write groups together; where that fails, each alone: one must not take others along."""
        try:
            result = self._appender.commit(groups)
        except Exception as error:  # the edge of one batch: OSError, sqlite3.Error or our own bug
            if len(groups) > 1:
                log.warning("%d submissions together: %s; writing each alone", len(groups), error)
                return [failed for group in groups for failed in self._commit([group])]
            failure = StorageError(f"could not be written: {error}")
            failure.__cause__ = error
            with self._wake:
                self._stats.write_errors += 1
            log.error("a submission %s", failure)
            return [failure]
        self._count(result)
        return result.errors

    def _count(self, result: Result) -> None:
        with self._wake:
            self._stats.written_records += result.records
            self._stats.written_bytes += result.size_bytes
            self._stats.duplicate_records += result.duplicates
            self._stats.fsyncs += result.records > 0
            self._stats.last_fsync_s = result.fsync_s or self._stats.last_fsync_s

    def _resolve(self, items: list[_Item], errors: list[Exception | None]) -> None:
        """Tell ``on_error``, once per distinct error, then the futures."""
        with self._wake:
            self._stats.failed_records += sum(error is not None for error in errors)
            self._stats.queued_records -= len(items)
            self._stats.queued_bytes -= sum(item.size_bytes for item in items)
        for distinct in {id(error): error for error in errors if error is not None}.values():
            self._report(distinct)
        for item, error in zip(items, errors, strict=True):
            if error is None:
                item.future.set_result(None)
            else:
                item.future.set_exception(error)
        with self._wake:
            self._done += len(items)
            self._wake.notify_all()

    def _report(self, error: Exception) -> None:
        log.warning("records lost: %s", error)
        if self._on_error is None:
            return
        try:
            self._on_error(error)
        except Exception:  # the caller's code must not end the writer thread
            log.exception("on_error failed")


def _size(record: Record) -> int:
    """Memory of a record while it is queued."""
    if isinstance(record, Trace):
        return trace_bytes(record) + RECORD_BYTES
    if isinstance(record, Score):
        arrays = (record.logprobs, record.entropy, record.logprobs_at_temperature, record.routes)
        return sum(a.nbytes for a in arrays if a is not None) + RECORD_BYTES
    return RECORD_BYTES

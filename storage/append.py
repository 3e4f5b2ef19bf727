"""Records to a segment and the index: written at once, made durable and indexed in batches.

``Appender.write`` hands a submission's records to the operating system, so that they survive the
process. ``Appender.commit`` syncs and indexes all that was written meanwhile, on another thread: a
slow sync holds up no write. A batch is durable as a whole or taken back as a whole; then each of
its submissions is tried alone, so that a bad one fails alone. An index that another process keeps
locked takes nothing back: what is on disk waits for it.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from driftgate.errors import StorageError
from driftgate.storage.codec import pack_record
from driftgate.storage.encoder import AddRow, Encoder
from driftgate.storage.index import BUSY_TIMEOUT_S, transaction
from driftgate.storage.inserts import Place, add_score, has_score, next_seq, set_indexed
from driftgate.storage.records import Kind, Record, ScoreHead, Small, encode_score
from driftgate.storage.segments import FIRST_SERIAL, SegmentFile
from driftgate.trace import Score, Trace

__all__ = ["Appender", "Submission"]

log = logging.getLogger(__name__)

SEGMENT_BYTES = 256 << 20
"""A segment that has grown past this is closed: small enough to copy and scan, large enough that a
million agent-typical traces are a few hundred files."""


@dataclass(slots=True, eq=False)
class Submission:
    """Records that were submitted together, and what became of them so far."""

    make: Callable[[], Sequence[Record]]
    size_bytes: int
    """Memory, as its submitter says."""
    future: Future[None]
    handed_over: Callable[[], None] | None = None
    """Called on the writing thread when the operating system has all that could be written."""
    records: Sequence[Record] = ()
    """What ``make`` gave; kept until they are durable, for a second try."""
    error: Exception | None = None
    """The first; a StorageError where the disk or the index is to blame."""
    rows: list[tuple[AddRow, Place]] = field(default_factory=list)
    """Written and not indexed."""
    scores: list[Score] = field(default_factory=list)
    """Not written: they are numbered and synced under the index's lock (FORMAT.md, Score)."""
    traces: list[str] = field(default_factory=list)
    """Trace ids that were written."""
    written_records: int = 0
    written_bytes: int = 0
    duplicates: int = 0
    """Scores and traces that the store already had, which were not written again."""

    def forget(self) -> None:
        """Nothing of it is in a segment."""
        self.rows, self.scores, self.traces = [], [], []
        self.written_records = self.written_bytes = self.duplicates = 0


@dataclass(slots=True)
class _Batch:
    """What is made durable at once."""

    submissions: list[Submission] = field(default_factory=list)
    ends: dict[SegmentFile, int] = field(default_factory=dict)
    """How far each segment was written when its last submission was taken."""


class Appender:
    """The segments being written and the recent traces of one writer.

    One thread calls ``write``, one ``commit``. What both touch is under a lock that is never held
    during a sync, except where a failed batch is taken back.
    """

    def __init__(self, root: Path, connection: sqlite3.Connection, *, name: str) -> None:
        """``connection`` is for ``commit`` alone."""
        self._root = root
        self._connection = connection
        self._encoder = Encoder(root)
        self._name = name
        self._start_ns = time.time_ns()
        self._lock = threading.RLock()
        self._serial = FIRST_SERIAL - 1
        self._segment: SegmentFile | None = None
        self._spare: SegmentFile | None = None
        """The next one: creating it takes two syncs."""
        self._first_segment: SegmentFile | None = None
        """Stays locked as long as this writer lives: FORMAT.md, *Segment*."""
        self._left: list[SegmentFile] = []
        """Full, and not yet committed to their end."""
        self._written: list[Submission] = []
        self.fsyncs = 0
        self.last_fsync_s = 0.0
        self._prepare()

    def write(self, submission: Submission) -> None:
        """Append what can be encoded; what cannot is said in ``error``. Nothing is durable yet.

        A disk that refuses takes nothing of the submission.
        """
        with self._lock:
            self._write(submission)
            self._written.append(submission)

    def commit(self) -> list[Submission]:
        """Sync and index all that was written: durable where ``error`` says nothing else."""
        batch = _Batch()
        self._take(batch)
        try:
            self._commit(batch)
        except Exception as error:  # one batch's edge: OSError, sqlite3.Error or our own bug
            self._take_back(batch, error)
        self._prepare()
        return batch.submissions

    def close(self) -> None:
        """Release every segment; what was committed is on disk."""
        self._leave_segment()
        for segment in {*self._left, self._first_segment} - {None}:
            assert segment is not None
            segment.close()
        if self._spare is not None:
            self._spare.path.unlink(missing_ok=True)
            self._spare.close()
        self._left.clear()
        self._first_segment = self._spare = None
        self._encoder.close()

    def _leave_segment(self) -> None:
        """Write no more into the open segment."""
        if self._segment is not None:
            self._left.append(self._segment)
        self._segment = None

    def _write(self, submission: Submission) -> None:
        """With the lock held."""
        segment, left = self._segment, len(self._left)
        size = segment.size if segment else 0
        try:
            for record in submission.records:
                if isinstance(record, Score):
                    submission.scores.append(record)
                else:
                    self._append(record, submission)
        except Exception as error:  # one submission's edge: OSError, sqlite3.Error or our own bug
            submission.error = _not_written(error)
            self._forget(submission)
            for one in filter(None, (*self._left[left:], self._segment)):  # all that it wrote to
                keep = size if one is segment else one.start
                if one.size > keep:
                    self._truncate(one, keep)

    def _forget(self, submission: Submission) -> None:
        self._encoder.lost(submission.traces)
        submission.forget()

    def _truncate(self, segment: SegmentFile, size: int) -> bool:
        """Where that fails, nothing more is written behind what could not be taken back."""
        try:
            segment.truncate(size)
        except OSError as error:
            log.warning("%s: an unfinished batch stays at its end: %s", segment.path, error)
            segment.size = size
            if segment is self._segment:
                self._leave_segment()
            return False
        return True

    def _take(self, batch: _Batch) -> None:
        """All that was written up to now goes into the batch."""
        with self._lock:
            batch.submissions += self._written
            self._written = []
            self._note_ends(batch)

    def _note_ends(self, batch: _Batch) -> None:
        for segment in (*self._left, self._segment):
            if segment is not None and segment.size > segment.committed:
                batch.ends[segment] = segment.size

    def _commit(self, batch: _Batch) -> None:
        if any(submission.scores for submission in batch.submissions):
            with transaction(self._connection, on_busy=_say_locked):
                with self._lock:
                    self._take(batch)  # lies before the scores in the segment
                    for submission in batch.submissions:
                        for score in submission.scores:
                            self._append_score(score, submission)
                    self._note_ends(batch)
                self._sync(batch)
                self._index(batch)
        elif batch.ends:
            self._sync(batch)
            with transaction(self._connection, on_busy=_say_locked):
                self._index(batch)
        with self._lock:
            self._settle(batch)

    def _sync(self, batch: _Batch) -> None:
        started = time.perf_counter()
        for segment in batch.ends:
            segment.sync()
        self.fsyncs += bool(batch.ends)
        self.last_fsync_s = time.perf_counter() - started

    def _index(self, batch: _Batch) -> None:
        for submission in batch.submissions:
            for add_row, place in submission.rows:
                add_row(self._connection, place)
        for segment, end in batch.ends.items():
            set_indexed(self._connection, segment.name, end)

    def _settle(self, batch: _Batch) -> None:
        """The batch is durable."""
        for segment, end in batch.ends.items():
            segment.committed = end
        for submission in batch.submissions:
            self._encoder.indexed(submission.traces)
        for segment in [one for one in self._left if one.committed >= one.size]:
            self._left.remove(segment)
            if segment is not self._first_segment:
                segment.close()

    def _take_back(self, batch: _Batch, error: Exception) -> None:
        """Nothing of the batch is kept; each submission is tried alone where there are several."""
        with self._lock:
            self._take(batch)  # what was written meanwhile may build on it
            self._undo()
            alone = len(batch.submissions) == 1
            if not alone:
                log.warning(
                    "%d submissions together: %s; writing each alone", len(batch.submissions), error
                )
            for submission in batch.submissions:
                self._forget(submission)
            for submission in batch.submissions:
                if submission.error is None and alone:
                    submission.error = _not_written(error)
                elif submission.error is None:
                    self._try_alone(submission)

    def _try_alone(self, submission: Submission) -> None:
        batch = _Batch([submission])
        self._write(submission)
        self._note_ends(batch)
        try:
            self._commit(batch)
        except Exception as error:  # as in commit
            self._undo()
            self._forget(submission)
            submission.error = _not_written(error)

    def _undo(self) -> None:
        """Take back all that is not committed."""
        for segment in (*self._left, self._segment):
            if segment is None or segment.size == segment.committed:
                continue
            cut = self._truncate(segment, segment.committed)
            # An empty one is kept: a full disk must not collect files.
            if cut and segment is self._segment and segment.committed > segment.start:
                self._leave_segment()

    def _prepare(self) -> None:
        """Create the first segment, and the next one when the open one is half full.

        No write has to wait for it then."""
        with self._lock:
            size = SEGMENT_BYTES if self._segment is None else self._segment.size
            if size < SEGMENT_BYTES // 2 or self._spare is not None:
                return
            if self._serial < FIRST_SERIAL:
                self._spare = self._ahead()  # under the lock: no other one may be the first
                return
        spare = self._ahead()
        with self._lock:
            self._spare = spare

    def _ahead(self) -> SegmentFile | None:
        try:
            return self._create()
        except OSError as error:
            log.info("no segment could be created ahead: %s", error)
            return None

    def _create(self) -> SegmentFile:
        """The next of the series. One that cannot be made uses up no number: by the first one's
        lock others know that this writer lives."""
        with self._lock:
            self._serial += 1
            serial = self._serial
        try:
            return SegmentFile(self._root, name=self._name, serial=serial, start_ns=self._start_ns)
        except OSError:
            with self._lock:
                if self._serial == serial:
                    self._serial -= 1
            raise

    def _writable_segment(self) -> SegmentFile:
        """The open segment; the next one after a full one."""
        if self._segment is not None and self._segment.size >= SEGMENT_BYTES:
            self._leave_segment()
        if self._segment is None and self._spare is not None:
            self._segment, self._spare = self._spare, None
        if self._segment is None:
            self._segment = self._create()
        self._first_segment = self._first_segment or self._segment
        return self._segment

    def _append(self, record: Trace | Small, submission: Submission) -> None:
        try:
            encoded = self._encoder.encode(record)
        except sqlite3.Error:
            raise
        except (
            Exception
        ) as error:  # one record's edge: it fails, is counted and logged by the writer
            submission.error = submission.error or error
            return
        if encoded is None:
            submission.duplicates += 1
            return
        data, add_row = encoded
        if isinstance(record, Trace):
            submission.traces.append(record.meta.trace_id)
        submission.rows.append((add_row, self._put(data, submission)))

    def _append_score(self, score: Score, submission: Submission) -> None:
        """Inside a transaction."""
        head = ScoreHead(meta=score.meta, seq=next_seq(self._connection))
        if has_score(self._connection, head):
            submission.duplicates += 1
            return
        try:
            payload = encode_score(score, seq=head.seq)
        except Exception as error:  # as above
            submission.error = submission.error or error
            return
        data = pack_record(Kind.SCORE, payload, time_ns=time.time_ns())
        outcome = add_score(self._connection, head, self._put(data, submission))
        assert outcome == "added", outcome

    def _put(self, data: bytes, submission: Submission) -> Place:
        segment = self._writable_segment()
        offset = segment.append(data)
        submission.written_records += 1
        submission.written_bytes += len(data)
        return Place(segment.name, offset, len(data))


def _say_locked() -> None:
    log.warning(
        "another process keeps the index locked for longer than %.0f s: records are on disk and "
        "wait for it; look for a stopped `driftgate teach` or `serve` on this store",
        BUSY_TIMEOUT_S,
    )


def _not_written(error: Exception) -> StorageError:
    failure = StorageError(f"could not be written: {error}")
    failure.__cause__ = error
    return failure

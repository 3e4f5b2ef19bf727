"""Records to a segment and the index, one batch at a time: all of it durable, or none of it.

Runs on the writer thread only. Chooses what a trace is stored as a difference to.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from driftgate.errors import FormatError, NotFoundError
from driftgate.storage.codec import pack_record
from driftgate.storage.delta import diff
from driftgate.storage.index import transaction
from driftgate.storage.inserts import (
    Place,
    add_intent,
    add_outcome,
    add_reward,
    add_score,
    add_trace,
    has_score,
    next_seq,
    set_indexed,
)
from driftgate.storage.load import CachedTrace, TraceCache, load_trace
from driftgate.storage.records import (
    Kind,
    Record,
    ScoreHead,
    Small,
    encode_score,
    encode_small,
    encode_trace,
    prompt_key,
    twin_key,
)
from driftgate.storage.segments import FIRST_SERIAL, SegmentFile
from driftgate.trace import CallIntent, CallOutcome, Score, Trace

__all__ = ["Appender", "Result"]

log = logging.getLogger(__name__)

SEGMENT_BYTES = 256 << 20
"""A segment that has grown past this is closed: small enough to copy and scan, large enough that a
million agent-typical traces are a few hundred files."""

CACHE_BYTES = 24 << 20
"""Decoded traces kept as bases: about 5 with 4.4 MB of routes, 240 without. Others are read back
from disk, in 5 ms at worst; most of a larger cache would be trajectories that have ended."""

CACHE_TRACES = 512
"""As many as agents that are thought of as running at once: small traces stay few as well."""

LAST_TRACES = 4096
"""Trajectories whose last trace is remembered here; older ones are looked up in the index."""

AddRow = Callable[[sqlite3.Connection, Place], None]


@dataclass(slots=True)
class Result:
    """What became of a batch that was written."""

    errors: list[Exception | None]
    """Per group of records: the first error in it, None where all were taken."""
    records: int = 0
    size_bytes: int = 0
    duplicates: int = 0
    """Scores and traces that the store already had, which were not written again."""
    fsync_s: float = 0.0
    rows: list[tuple[AddRow, Place]] = field(default_factory=list)


class Appender:
    """The segment being written, the index connection and the recent traces of one writer."""

    def __init__(self, root: Path, connection: sqlite3.Connection, *, name: str) -> None:
        self._root = root
        self._connection = connection
        self._name = name
        self._start_ns = time.time_ns()
        self._serial = FIRST_SERIAL - 1
        self._segment: SegmentFile | None = None
        self._first_segment: SegmentFile | None = None
        """Stays locked as long as this writer lives: FORMAT.md, *Segment*."""
        self._first = self._committed = 0
        self._cache = TraceCache(CACHE_BYTES, CACHE_TRACES)
        self._last: OrderedDict[str, str] = OrderedDict()

    def commit(self, groups: Sequence[Sequence[Record]]) -> Result:
        """Append, sync and index. A record that cannot be encoded fails its group only.

        OSError and sqlite3.Error mean that nothing of the batch was kept.
        """
        try:
            return self._commit(groups)
        except BaseException:
            self._undo()
            raise

    def close(self) -> None:
        """Release every segment; what was committed is on disk."""
        self._leave_segment()
        if self._first_segment is not None:
            self._first_segment.close()
            self._first_segment = None

    def _leave_segment(self) -> None:
        """Write no more into the open segment."""
        if self._segment is not None and self._segment is not self._first_segment:
            self._segment.close()
        self._segment = None

    def _commit(self, groups: Sequence[Sequence[Record]]) -> Result:
        result = Result([None] * len(groups))
        scores = [(i, r) for i, group in enumerate(groups) for r in group if isinstance(r, Score)]
        for i, group in enumerate(groups):
            for record in group:
                if not isinstance(record, Score):
                    self._append(i, record, result)
        if not scores:
            self._sync(result)
        with transaction(self._connection):
            if scores:  # numbered and synced under the index's lock: FORMAT.md, Score
                for i, score in scores:
                    self._append_score(i, score, result)
                self._sync(result)
            for add_row, place in result.rows:
                add_row(self._connection, place)
            if self._segment is not None and self._segment.size > self._committed:
                set_indexed(self._connection, self._segment.name, self._segment.size)
        if self._segment is not None:
            self._committed = self._segment.size
        return result

    def _append(self, i: int, record: Trace | Small, result: Result) -> None:
        try:
            encoded = self._encode(record)
        except (
            Exception
        ) as error:  # one record's edge: it fails, is counted and logged by the writer
            result.errors[i] = result.errors[i] or error
            return
        if encoded is None:
            result.duplicates += 1
            return
        data, add_row = encoded
        result.rows.append((add_row, self._write(data, result)))

    def _append_score(self, i: int, score: Score, result: Result) -> None:
        head = ScoreHead(meta=score.meta, seq=next_seq(self._connection))
        if has_score(self._connection, head):
            result.duplicates += 1
            return
        try:
            payload = encode_score(score, seq=head.seq)
        except Exception as error:  # as above
            result.errors[i] = result.errors[i] or error
            return
        data = pack_record(Kind.SCORE, payload, time_ns=time.time_ns())
        outcome = add_score(self._connection, head, self._write(data, result))
        assert outcome == "added", outcome

    def _write(self, data: bytes, result: Result) -> Place:
        segment = self._writable_segment()
        offset = segment.append(data)
        result.records += 1
        result.size_bytes += len(data)
        return Place(segment.name, offset, len(data))

    def _writable_segment(self) -> SegmentFile:
        """The open segment; a new one after a full one, but never in the middle of a batch."""
        full = self._committed >= SEGMENT_BYTES
        if self._segment is not None and full and self._segment.size == self._committed:
            self._leave_segment()
        if self._segment is None:
            self._serial += 1
            self._segment = SegmentFile(
                self._root, name=self._name, serial=self._serial, start_ns=self._start_ns
            )
            self._first_segment = self._first_segment or self._segment
            self._committed = self._first = self._segment.size
        return self._segment

    def _sync(self, result: Result) -> None:
        if self._segment is None or self._segment.size == self._committed:
            return
        started = time.perf_counter()
        self._segment.sync()
        result.fsync_s = time.perf_counter() - started

    def _undo(self) -> None:
        """Take the batch back; where even that fails, leave the segment and start another."""
        self._cache.clear()
        self._last.clear()
        if self._segment is None:
            return
        try:
            self._segment.truncate(self._committed)
        except OSError as error:
            log.warning("%s: an unfinished batch stays at its end: %s", self._segment.path, error)
            self._leave_segment()
            return
        if (
            self._committed > self._first
        ):  # an empty one is kept: a full disk must not collect files
            self._leave_segment()

    def _encode(self, record: Trace | Small) -> tuple[bytes, AddRow] | None:
        """Bytes of a record and how to index it; None for a trace that the store has."""
        if isinstance(record, Trace):
            return self._encode_trace(record)
        kind, payload = encode_small(record)
        return pack_record(kind, payload, time_ns=time.time_ns()), _row_of(record)

    def _encode_trace(self, trace: Trace) -> tuple[bytes, AddRow] | None:
        trace_id, trajectory = trace.meta.trace_id, trace.meta.trajectory
        if self._has_trace(trace_id):
            return None
        base = self._base(trace)
        stored = diff(
            trace,
            base.trace if base else None,
            base_depth=base.depth if base else 0,
            twin_key=twin_key(trace),
        )
        if (group := prompt_key(trace)) is not None:
            head = msgspec.structs.replace(stored.head, prompt_key=group)
            stored = replace(stored, head=head)
        data = pack_record(Kind.TRACE, encode_trace(stored), time_ns=time.time_ns())
        if base is not None and base.trace.meta.call_id != trace.meta.call_id:
            self._cache.drop(base.trace.meta.trace_id)  # the next step builds on this one
        self._cache.put(trace, stored.head.depth)
        self._last[trajectory] = trace_id
        self._last.move_to_end(trajectory)
        if len(self._last) > LAST_TRACES:
            self._last.popitem(last=False)

        def add_row(connection: sqlite3.Connection, place: Place) -> None:
            add_trace(
                connection,
                stored.head,
                place,
                has_logprobs=stored.logprobs is not None,
                has_routes=stored.routes is not None,
            )

        return data, add_row

    def _has_trace(self, trace_id: str) -> bool:
        query = "SELECT 1 FROM traces WHERE trace_id = ?"
        return self._connection.execute(query, (trace_id,)).fetchone() is not None

    def _base(self, trace: Trace) -> CachedTrace | None:
        """The first of the trace's possible bases that can be read."""
        for trace_id in self._candidates(trace):
            try:
                return load_trace(self._connection, self._root, trace_id, self._cache)
            except NotFoundError:
                continue
            except FormatError as error:
                log.warning("trace %s cannot be a base: %s", trace_id, error)
        return None

    def _candidates(self, trace: Trace) -> Iterator[str]:
        """Trace ids, best first: a sample of the same call shares the whole prompt and request."""
        meta = trace.meta
        if meta.choice:
            yield f"{meta.call_id}.0"
        if meta.parent is not None:
            yield meta.parent
        last = self._last.get(meta.trajectory)
        if last is None:
            row = self._connection.execute(
                "SELECT trace_id FROM traces WHERE trajectory = ? "
                "ORDER BY step DESC, started_ns DESC, choice DESC LIMIT 1",
                (meta.trajectory,),
            ).fetchone()
            last = row[0] if row else None
        if last is not None:
            yield last


def _row_of(record: Small) -> AddRow:
    def add_row(connection: sqlite3.Connection, place: Place) -> None:
        if isinstance(record, CallIntent):
            add_intent(connection, record, place.segment)
        elif isinstance(record, CallOutcome):
            add_outcome(connection, record)
        else:
            add_reward(connection, record)

    return add_row

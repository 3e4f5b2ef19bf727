"""Bringing the index in line with the segments: after a crash, and from nothing.

Recovery runs when a writer starts. It touches only segments whose writer is gone (it holds their
lock), indexes what the index does not have, and cuts torn tails. A rebuild reads every segment into
a new index beside the old one and renames it; it needs every writer and lease holder of the store
to be closed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from driftgate.errors import FormatError, StorageError
from driftgate.storage.delta import TraceHead
from driftgate.storage.index import INDEX_NAME, OWNER_GONE, open_index, transaction
from driftgate.storage.inserts import (
    Place,
    add_intent,
    add_outcome,
    add_reward,
    add_score,
    add_trace,
    indexed_bytes,
    next_seq,
    set_indexed,
)
from driftgate.storage.records import Kind, ScoreHead, decode_score, decode_small, head_of
from driftgate.storage.rows import RebuildReport
from driftgate.storage.segments import (
    Entry,
    fsync_dir,
    has_living_writer,
    read_entry,
    scan,
    segment_paths,
    segments_dir,
    serial_of,
    series_of,
    take_over,
)
from driftgate.trace import CallIntent, CallOutcome, Score

__all__ = ["StoreLock", "rebuild_index", "recover"]

log = logging.getLogger(__name__)

LOCK_NAME = "writers.lock"

_BASELESS = (
    "WITH RECURSIVE lost (trace_id) AS ("
    "  SELECT trace_id FROM traces WHERE base NOT IN (SELECT trace_id FROM traces) "
    "  UNION SELECT t.trace_id FROM traces t JOIN lost ON t.base = lost.trace_id) "
    "SELECT trajectory, step, trace_id, base FROM traces JOIN lost USING (trace_id) "
    "ORDER BY trajectory, step, trace_id"
)


class StoreLock:
    """Shared while something writes to the index, exclusive while it is rebuilt."""

    def __init__(self, root: Path, *, exclusive: bool = False) -> None:
        """Create the store's folders if missing, for their owner alone, and lock it; StorageError
        where that is taken or not allowed."""
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not segments_dir(root).is_dir():
                segments_dir(root).mkdir(exist_ok=True)
                fsync_dir(root)
            self._fd = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageError(
                f"the store {root} cannot be written ({error}): it takes a folder that this user "
                "may write"
            ) from error
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise StorageError(
                f"{root} has live writers (a gateway or a worker): stop them, then rebuild"
                if exclusive
                else f"the index of {root} is being rebuilt: try again when that is done"
            ) from None

    def close(self) -> None:
        """Release the lock; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def recover(root: Path, connection: sqlite3.Connection) -> list[Score | CallOutcome]:
    """Index what dead writers synced but did not index, and cut their torn tails.

    Returns what the caller has to write: scores whose number was given away meanwhile, and how the
    calls ended that were open when their writer died.
    """
    again: list[Score | CallOutcome] = []
    for path in segment_paths(root):
        try:
            fd = take_over(path)
        except OSError as error:
            log.error("%s: %s", path, error)
            continue
        if fd is None:
            continue
        try:
            with transaction(connection):
                again += _catch_up(path, fd, connection)
        finally:
            os.close(fd)
    return again + _lost_calls(root, connection)


def _lost_calls(root: Path, connection: sqlite3.Connection) -> list[Score | CallOutcome]:
    """An outcome for each open call that nobody serves any more.

    None where a part of what its writer wrote after it is damaged or missing: the trace may be
    there.
    """
    lost: list[Score | CallOutcome] = []
    for calls in _open_calls(connection):
        first = calls[0].segment
        if has_living_writer(root, first):
            continue
        ended_ns = _last_write_ns(root, connection, first)
        if ended_ns is None:
            log.error(
                "%d calls stay open: segments %s-* are not whole; put back what is missing or "
                "damaged there, then run `driftgate index rebuild`",
                len(calls),
                series_of(first),
            )
            continue
        log.warning("%d calls were open when their gateway ended: marked as failed", len(calls))
        lost += [
            CallOutcome(call_id=call.call_id, status="failed", reason=OWNER_GONE, ended_ns=ended_ns)
            for call in calls
        ]
    return lost


def _damaged_calls(root: Path, connection: sqlite3.Connection) -> Iterator[str]:
    """While nobody writes: what damage and missing segments may have cost."""
    for calls in _open_calls(connection):
        first = calls[0].segment
        if has_living_writer(root, first) or _last_write_ns(root, connection, first) is None:
            for call in calls:
                yield f"{call.trajectory} step {call.step}: no trace of call {call.call_id}"
    for trajectory, step, trace_id, base in connection.execute(_BASELESS):
        yield f"{trajectory} step {step}: trace {trace_id} is built on {base}, which is lost"


class _OpenCall(NamedTuple):
    segment: str
    call_id: str
    trajectory: str
    step: int


def _open_calls(connection: sqlite3.Connection) -> Iterator[list[_OpenCall]]:
    """Those with neither trace nor outcome, by writer, in order of their segments."""
    rows = connection.execute(
        "SELECT segment, call_id, trajectory, step FROM calls "
        "WHERE captured = 0 AND status IS NULL AND segment IS NOT NULL ORDER BY segment, call_id"
    ).fetchall()
    for _, calls in groupby(map(_OpenCall._make, rows), lambda call: series_of(call.segment)):
        yield list(calls)


def _last_write_ns(root: Path, connection: sqlite3.Connection, first: str) -> int | None:
    """When the writer of ``first`` wrote its last record; None where not all that it wrote from
    there on is whole.

    Reads all of it, up to the first damage: a crash leaves open calls in the last segments.
    """
    names = {name for (name,) in connection.execute("SELECT name FROM segments")}
    names |= {path.name for path in segment_paths(root)}
    series = series_of(first)
    mine = sorted(name for name in names if series_of(name) == series and name >= first)
    if len(mine) != serial_of(mine[-1]) - serial_of(first) + 1:
        return None
    last_ns = 0
    try:
        for name in mine:
            end = 0
            for item in scan(segments_dir(root) / name):
                if not isinstance(item, Entry):
                    return None
                last_ns, end = item.header.time_ns, item.end
            if end < indexed_bytes(connection, name):
                return None
    except (FormatError, OSError):
        return None
    return last_ns


def rebuild_index(root: Path) -> RebuildReport:
    """Make the index anew from the segments; leases are dropped. StorageError while writers live.

    The old index stays until the new one is whole.
    """
    if not segments_dir(root).is_dir():
        raise StorageError(f"{root} has no segments folder: it is no driftgate store")
    with _exclusive(root):
        path, new = root / INDEX_NAME, root / (INDEX_NAME + ".rebuild")
        _unlink(new)
        connection = open_index(new, create=True)
        try:
            with transaction(connection):
                # A number of a score that damage took must not name another one to who follows.
                for given in _told(path, "SELECT * FROM sqlite_sequence WHERE name = 'scores'"):
                    connection.execute("INSERT INTO sqlite_sequence VALUES (?, ?)", given)
                ends = dict(_told(path, "SELECT name, indexed_bytes FROM segments"))
                report = _index_all(root, connection, ends)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            connection.close()
        _sync(new)
        _unlink(Path(f"{path}-wal"), Path(f"{path}-shm"))
        os.replace(new, path)
        fsync_dir(root)
    return report


def _catch_up(path: Path, fd: int, connection: sqlite3.Connection) -> list[Score]:
    start, size = indexed_bytes(connection, path.name), os.fstat(fd).st_size
    if start == size:
        return []
    again: list[Score] = []
    found = _Found()
    end = start
    for entry in _entries(path, start, found):
        if _index(connection, path.name, entry, found) == "seq_taken":
            again.append(decode_score(entry.payload())[1])
        end = entry.end
    if end > start:
        set_indexed(connection, path.name, end)
    if 0 < end < size and found.scanned:
        log.warning("%s: cut %d bytes of an unfinished batch", path, size - end)
        os.ftruncate(fd, end)
        os.fsync(fd)
    return again


def _told(index: Path, sql: str) -> list[tuple[Any, ...]]:
    """Rows of an index that is to be replaced; nothing where it is not well itself."""
    if not index.exists():
        return []
    try:
        with closing(sqlite3.connect(index)) as connection:
            return connection.execute(sql).fetchall()
    except sqlite3.Error:
        return []


def _index_all(
    root: Path, connection: sqlite3.Connection, ends: Mapping[str, int]
) -> RebuildReport:
    """``ends``: how far each segment was whole once. What is no record there is damage and stays,
    no torn tail, which the next writer cuts."""
    found = _Found()
    taken: list[tuple[int, Path, int]] = []
    paths = segment_paths(root)
    for path in paths:
        end = 0
        for entry in _entries(path, None, found):
            if _index(connection, path.name, entry, found) == "seq_taken":
                taken.append((entry.header.time_ns, path, entry.offset))
            end = entry.end
        if end:
            size = path.stat().st_size
            once = max(end, min(ends.get(path.name, 0), size))
            set_indexed(connection, path.name, once)
            found.damaged_bytes += once - end
            found.torn_bytes += size - once
    for _, path, offset in sorted(taken):
        entry = read_entry(path, offset)
        head = head_of(entry.payload(), ScoreHead)
        place = Place(path.name, offset, entry.header.record_bytes)
        if add_score(connection, head, place) == "seq_taken":
            add_score(connection, ScoreHead(meta=head.meta, seq=next_seq(connection)), place)
    return RebuildReport(
        segments=len(paths),
        records=found.records,
        damaged_bytes=found.damaged_bytes,
        torn_bytes=found.torn_bytes,
        unreadable=found.unreadable,
        lost=list(_damaged_calls(root, connection)),
    )


def _entries(path: Path, start: int | None, found: _Found) -> Iterator[Entry]:
    """Whole records of a segment; damage, and a file that is no segment or cannot be read, is
    noted."""
    try:
        for item in scan(path, start):
            if isinstance(item, Entry):
                found.records += 1
                yield item
            else:
                found.damaged_bytes += item.end - item.start
                log.warning("%s: bytes %d to %d are no record", path, item.start, item.end)
    except (FormatError, OSError) as error:
        found.scanned = False
        found.skip(str(error))


def _index(connection: sqlite3.Connection, segment: str, entry: Entry, found: _Found) -> str:
    """Insert one record; ``seq_taken`` for a score whose number another score has."""
    try:
        return _insert(connection, Place(segment, entry.offset, entry.header.record_bytes), entry)
    except FormatError as error:
        found.skip(f"{segment} at {entry.offset}: {error}")
        return "skipped"


def _insert(connection: sqlite3.Connection, place: Place, entry: Entry) -> str:
    payload, kind = entry.payload(), entry.header.kind
    if kind == Kind.TRACE:
        columns = payload.columns
        add_trace(
            connection,
            head_of(payload, TraceHead),
            place,
            has_logprobs="logprobs" in columns,
            has_routes="routes" in columns,
        )
        return "added"
    if kind == Kind.SCORE:
        return add_score(connection, head_of(payload, ScoreHead), place)
    small = decode_small(kind, payload)
    if isinstance(small, CallIntent):
        add_intent(connection, small, place.segment)
    elif isinstance(small, CallOutcome):
        add_outcome(connection, small)
    else:
        add_reward(connection, small)
    return "added"


@dataclass(slots=True)
class _Found:
    """What was met on the way through segments."""

    records: int = 0
    scanned: bool = True
    """Every file was a segment of a known version: what was not met in it is no record."""
    damaged_bytes: int = 0
    torn_bytes: int = 0
    unreadable: list[str] = field(default_factory=list)

    def skip(self, what: str) -> None:
        """Go on: one bad file or record must not keep the store from opening."""
        log.error("%s", what)
        self.unreadable.append(what)


@contextmanager
def _exclusive(root: Path) -> Iterator[None]:
    lock = StoreLock(root, exclusive=True)
    try:
        yield
    finally:
        lock.close()


def _unlink(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

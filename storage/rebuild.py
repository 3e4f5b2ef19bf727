"""Making the index anew from the segments.

Every segment is read into a new index beside the old one, which is then renamed; every writer and
lease holder of the store must be closed. The old index, where it can be read, says what no segment
does: how far each was whole, which scores have which numbers, and so what is not there any more.
"""

from __future__ import annotations

import os
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from driftgate.errors import StorageError
from driftgate.storage.index import INDEX_NAME, open_index, transaction
from driftgate.storage.indexing import Found, entries, index_entry
from driftgate.storage.inserts import (
    SCORE_KEY,
    Place,
    add_score,
    mark_baseless,
    next_seq,
    score_key,
    set_indexed,
)
from driftgate.storage.records import ScoreHead, head_of
from driftgate.storage.recovery import StoreLock, damaged_calls
from driftgate.storage.rows import RebuildReport
from driftgate.storage.segments import (
    fsync_dir,
    read_entry,
    records_start,
    segment_paths,
    segments_dir,
)

__all__ = ["rebuild_index"]


def rebuild_index(root: Path) -> RebuildReport:
    """Make the index anew from the segments; leases are dropped. StorageError while writers live.

    The old index stays until the new one is whole.
    """
    if not segments_dir(root).is_dir():
        raise StorageError(f"{root} has no segments folder: it is no driftgate store")
    path, new = root / INDEX_NAME, root / (INDEX_NAME + ".rebuild")
    with closing(StoreLock(root, exclusive=True)):
        new.unlink(missing_ok=True)
        with closing(_Replaced(path)) as old, closing(open_index(new, create=True)) as connection:
            with transaction(connection):
                report = _index_all(root, connection, old)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        _sync(new)
        for beside in (f"{path}-wal", f"{path}-shm"):
            Path(beside).unlink(missing_ok=True)
        os.replace(new, path)
        fsync_dir(root)
    return report


class _Replaced:
    """The index that a rebuild replaces; it knows nothing where it is not there or not well."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path) if path.exists() else None
        self.ends = dict(self.rows("SELECT name, indexed_bytes FROM segments"))
        """How far each segment was whole."""

    def close(self) -> None:
        """Leave it as it is."""
        if self._connection is not None:
            self._connection.close()

    def rows(self, sql: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """What it answers."""
        if self._connection is None:
            return
        try:
            yield from self._connection.execute(sql, values)
        except sqlite3.Error:
            return

    def owner(self, seq: int) -> tuple[str, ...] | None:
        """The key of the score that has a number."""
        sql = "SELECT trace_id, engine, trainer, kind FROM scores WHERE seq = ?"
        return next(self.rows(sql, seq), None)

    def number(self, key: tuple[str, ...]) -> int | None:
        """Of a score, by its key."""
        rows = self.rows(f"SELECT seq FROM scores WHERE {SCORE_KEY}", *key)
        return next((seq for (seq,) in rows), None)


class _Taken(NamedTuple):
    """A score whose number is another one's: written by a worker that died before it indexed it."""

    time_ns: int
    path: Path
    offset: int


def _index_all(root: Path, connection: sqlite3.Connection, old: _Replaced) -> RebuildReport:
    # A number of a score that damage took must not name another one to who follows.
    for given in old.rows("SELECT name, seq FROM sqlite_sequence WHERE name = 'scores'"):
        connection.execute("INSERT INTO sqlite_sequence VALUES (?, ?)", given)
    found, taken = Found(), list[_Taken]()
    paths = segment_paths(root)
    for path in paths:
        start = end = records_start(path)
        for entry in entries(path, None, found):
            if index_entry(connection, path.name, entry, found, old.owner) == "seq_taken":
                taken.append(_Taken(entry.header.time_ns, path, entry.offset))
            end = entry.end
        once = max(start, old.ends.get(path.name, 0))
        if max(end, once) > start:
            set_indexed(connection, path.name, max(end, once))
        # What is no record up to where it was whole is damage and stays; behind that it is a torn
        # tail, which the next writer cuts.
        found.damaged_bytes += max(0, once - end)
        found.torn_bytes += max(0, path.stat().st_size - max(end, once))
    for one in sorted(taken):
        _number_anew(connection, one, old)
    mark_baseless(connection)
    gone = _gone(connection, old, {path.name for path in paths})
    return RebuildReport(
        segments=len(paths),
        records=found.records,
        damaged_bytes=found.damaged_bytes,
        torn_bytes=found.torn_bytes,
        unreadable=found.unreadable,
        lost=[*gone, *damaged_calls(root, connection)],
    )


def _number_anew(connection: sqlite3.Connection, one: _Taken, old: _Replaced) -> None:
    """The number that the old index gave it, else the next."""
    entry = read_entry(one.path, one.offset)
    head = head_of(entry.payload(), ScoreHead)
    seq = old.number(score_key(head)) or next_seq(connection)
    place = Place(one.path.name, one.offset, entry.header.record_bytes)
    add_score(connection, ScoreHead(meta=head.meta, seq=seq), place)


_KNOWN = {
    "calls": ("call_id",),
    "traces": ("trace_id",),
    "scores": ("trace_id", "engine", "trainer", "kind"),
}
"""Tables of what lies in segments, and what names a row."""


def _gone(connection: sqlite3.Connection, old: _Replaced, there: set[str]) -> Iterator[str]:
    """What the old index knew and no segment holds any more."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for table, names in _KNOWN.items():
        where = " AND ".join(f"{name} = ?" for name in names)
        query = f"SELECT 1 FROM {table} WHERE {where}"
        rows = old.rows(f"SELECT segment, {', '.join(names)} FROM {table} WHERE segment NOT NULL")
        for segment, *key in rows:
            if connection.execute(query, key).fetchone() is None:
                counts[segment][table] += 1
    for segment, lost in sorted(counts.items()):
        told = ", ".join(f"{table} {count}" for table, count in lost.items())
        yield f"segment {segment} is {'damaged' if segment in there else 'away'}: {told}"
    for trajectory, reward in old.rows("SELECT trajectory, reward FROM rewards"):
        query = "SELECT 1 FROM rewards WHERE trajectory = ? AND reward = ?"
        if connection.execute(query, (trajectory, reward)).fetchone() is None:
            yield f"{trajectory}: the reward that it was given last"


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

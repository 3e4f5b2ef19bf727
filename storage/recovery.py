"""Bringing the index in line with the segments after a crash.

Runs when a writer starts. It touches only segments whose writer is gone (it holds their lock),
indexes what the index does not have, and cuts torn tails.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from driftgate.errors import FormatError, StorageError
from driftgate.storage.index import OWNER_GONE, transaction
from driftgate.storage.indexing import Found, entries, index_entry
from driftgate.storage.inserts import indexed_bytes, mark_baseless, set_indexed
from driftgate.storage.records import decode_score
from driftgate.storage.segments import (
    Entry,
    fsync_dir,
    has_living_writer,
    scan,
    segment_paths,
    segments_dir,
    serial_of,
    series_of,
    take_over,
)
from driftgate.trace import CallOutcome, Score

__all__ = ["StoreLock", "damaged_calls", "recover"]

log = logging.getLogger(__name__)

LOCK_NAME = "writers.lock"


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
    before = connection.total_changes
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
    if connection.total_changes > before:  # else no base has come, or gone
        with transaction(connection):
            mark_baseless(connection)
    _say_missing(root, connection)
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


def damaged_calls(root: Path, connection: sqlite3.Connection) -> Iterator[str]:
    """While nobody writes: what damage and missing segments may have cost."""
    for calls in _open_calls(connection):
        first = calls[0].segment
        if has_living_writer(root, first) or _last_write_ns(root, connection, first) is None:
            for call in calls:
                yield f"{call.trajectory} step {call.step}: no trace of call {call.call_id}"
    for trajectory, step, trace_id, base in connection.execute(
        "SELECT trajectory, step, trace_id, base FROM traces WHERE baseless "
        "ORDER BY trajectory, step, trace_id"
    ):
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


def _catch_up(path: Path, fd: int, connection: sqlite3.Connection) -> list[Score]:
    start, size = indexed_bytes(connection, path.name), os.fstat(fd).st_size
    if start == size:
        return []
    again: list[Score] = []
    found = Found()
    end = indexed = start
    for entry in entries(path, start, found):
        if index_entry(connection, path.name, entry, found) == "seq_taken":
            again.append(decode_score(entry.payload())[1])
        end = entry.end
        # Up to the first that is to be written again: it is found once more if that fails.
        indexed = indexed if again else end
    if indexed > start:
        set_indexed(connection, path.name, indexed)
    if 0 < end < size and found.scanned:
        log.warning("%s: cut %d bytes of an unfinished batch", path, size - end)
        os.ftruncate(fd, end)
        os.fsync(fd)
    return again


def _say_missing(root: Path, connection: sqlite3.Connection) -> None:
    """Segments that have less than the index knows of them."""
    for name, end in connection.execute("SELECT name, indexed_bytes FROM segments ORDER BY name"):
        path = segments_dir(root) / name
        size = path.stat().st_size if path.exists() else 0
        if size < end:
            log.error(
                "%s: %d of %d bytes are not there: put them back, or run "
                "`driftgate index rebuild`, which says what is lost",
                path,
                end - size,
                end,
            )

"""From a segment's bytes into the index: whole records in order, and what was met on the way.

Recovery and rebuild share it. One bad file or record is noted and passed over: it must not keep the
store from opening.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from driftgate.errors import FormatError
from driftgate.storage.delta import TraceHead
from driftgate.storage.inserts import Place, add_score, add_small, add_trace, score_key
from driftgate.storage.records import Kind, ScoreHead, decode_small, head_of
from driftgate.storage.segments import Entry, scan

__all__ = ["Found", "entries", "index_entry"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Found:
    """What was met on the way through segments."""

    records: int = 0
    scanned: bool = True
    """Every file was read to its end: what was not met in it is no record."""
    damaged_bytes: int = 0
    torn_bytes: int = 0
    unreadable: list[str] = field(default_factory=list)

    def skip(self, what: str) -> None:
        """Go on without it."""
        log.error("%s", what)
        self.unreadable.append(what)


def entries(path: Path, start: int | None, found: Found) -> Iterator[Entry]:
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


def index_entry(
    connection: sqlite3.Connection,
    segment: str,
    entry: Entry,
    found: Found,
    owner: Callable[[int], tuple[str, ...] | None] = lambda seq: None,
) -> str:
    """Insert one record; ``seq_taken`` for a score whose number another score has, or had by
    ``owner``, which gives the key of a number's score."""
    place = Place(segment, entry.offset, entry.header.record_bytes)
    try:
        return _insert(connection, place, entry, owner)
    except (FormatError, OverflowError) as error:  # SQLite's integers have 64 bits, JSON's any
        found.skip(f"{segment} at {entry.offset}: {error}")
        return "skipped"


def _insert(
    connection: sqlite3.Connection,
    place: Place,
    entry: Entry,
    owner: Callable[[int], tuple[str, ...] | None],
) -> str:
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
        head = head_of(payload, ScoreHead)
        if owner(head.seq) not in (None, score_key(head)):
            return "seq_taken"
        return add_score(connection, head, place)
    add_small(connection, decode_small(kind, payload), place.segment)
    return "added"

"""One trace from disk, its bases included, with a cache bounded in bytes.

Used by readers and by the writer (which needs the base of the next delta). Decoded traces are
shared between their readers, so their arrays are read-only.
"""

from __future__ import annotations

import sqlite3
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from driftgate.errors import FormatError, NotFoundError
from driftgate.storage.codec import Payload
from driftgate.storage.delta import MAX_DEPTH, StoredTrace, resolve, trace_bytes
from driftgate.storage.records import Kind, decode_trace
from driftgate.storage.segments import read_entry, segments_dir
from driftgate.trace import Trace

__all__ = ["CachedTrace", "TraceCache", "load_payload", "load_trace"]

ENTRY_BYTES = 8192
"""Counted per cached trace besides its arrays: metadata, array headers, the dictionary."""


@dataclass(frozen=True, slots=True)
class CachedTrace:
    """A decoded trace and how deep its record is."""

    trace: Trace
    depth: int


class TraceCache:
    """Least recently used traces, at most ``limit_bytes`` and ``limit_traces``. Thread-safe."""

    def __init__(self, limit_bytes: int, limit_traces: int = sys.maxsize) -> None:
        self._limit = limit_bytes
        self._limit_traces = limit_traces
        self._lock = threading.Lock()
        self._traces: OrderedDict[str, CachedTrace] = OrderedDict()
        self.size_bytes = 0

    def get(self, trace_id: str) -> CachedTrace | None:
        """The trace, now the most recently used; None where it is not here."""
        with self._lock:
            cached = self._traces.get(trace_id)
            if cached is not None:
                self._traces.move_to_end(trace_id)
            return cached

    def put(self, trace: Trace, depth: int) -> None:
        """Keep a trace, unless it alone is over the limit, and drop the least recently used."""
        size = _size(trace)
        with self._lock:
            self._drop(trace.meta.trace_id)
            if size > self._limit:
                return
            self._traces[trace.meta.trace_id] = CachedTrace(trace, depth)
            self.size_bytes += size
            while self.size_bytes > self._limit or len(self._traces) > self._limit_traces:
                self._drop(next(iter(self._traces)))

    def drop(self, trace_id: str) -> None:
        """Forget one trace."""
        with self._lock:
            self._drop(trace_id)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._traces.clear()
            self.size_bytes = 0

    def _drop(self, trace_id: str) -> None:
        old = self._traces.pop(trace_id, None)
        if old is not None:
            self.size_bytes -= _size(old.trace)


def load_payload(root: Path, segment: str, offset: int, kind: Kind) -> Payload:
    """The payload of a record that the index points to; FormatError where it is not there."""
    path = segments_dir(root) / segment
    try:
        entry = read_entry(path, offset)
    except FileNotFoundError as error:
        fix = "put it back or run `driftgate index rebuild`"
        raise FormatError(f"{path} is gone: {fix}") from error
    if entry.header.kind != kind:
        raise FormatError(f"{path} at {offset}: kind {entry.header.kind}, the index says {kind}")
    return entry.payload()


def load_trace(
    connection: sqlite3.Connection, root: Path, trace_id: str, cache: TraceCache
) -> CachedTrace:
    """A trace, from the cache or from disk; NotFoundError where the index has none of that id.

    FormatError where it, or a record that it is built on, is damaged or lost.
    """
    cached = cache.get(trace_id)
    if cached is not None:
        return cached
    chain: list[StoredTrace] = []
    wanted: str | None = trace_id
    base: CachedTrace | None = None
    while wanted is not None and base is None:
        if len(chain) > MAX_DEPTH:
            raise FormatError(f"trace {trace_id}: more than {MAX_DEPTH} records to its full record")
        stored = _read(connection, root, wanted)
        if stored is None and chain:
            raise FormatError(f"trace {trace_id} is built on {wanted}, which is lost")
        if stored is None:
            raise NotFoundError(f"no trace {trace_id!r} in {root}")
        chain.append(stored)
        wanted = stored.head.delta.base if stored.head.delta else None
        base = cache.get(wanted) if wanted is not None else None
    trace = resolve(chain, base.trace if base else None)
    cache.put(trace, chain[0].head.depth)
    return CachedTrace(trace, chain[0].head.depth)


def _read(connection: sqlite3.Connection, root: Path, trace_id: str) -> StoredTrace | None:
    row = connection.execute(
        "SELECT segment, offset FROM traces WHERE trace_id = ?", (trace_id,)
    ).fetchone()
    return decode_trace(load_payload(root, row[0], row[1], Kind.TRACE)) if row else None


def _size(trace: Trace) -> int:
    return trace_bytes(trace) + ENTRY_BYTES

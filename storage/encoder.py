"""A record to its bytes and its place in the index, on the writer thread.

Chooses what a trace is stored as a difference to: something written before it, by this writer or an
earlier one.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec

from driftgate.errors import FormatError, NotFoundError
from driftgate.storage.codec import pack_record
from driftgate.storage.delta import diff
from driftgate.storage.index import INDEX_NAME, open_index
from driftgate.storage.inserts import Place, add_small, add_trace
from driftgate.storage.load import CachedTrace, TraceCache, load_trace
from driftgate.storage.records import Kind, Small, encode_small, encode_trace, prompt_key, twin_key
from driftgate.trace import Trace

__all__ = ["AddRow", "Encoder"]

log = logging.getLogger(__name__)

CACHE_BYTES = 20 << 20
"""Decoded traces kept as bases: about 4 with 4.4 MB of routes, 200 without. Others are read back
from disk, in 5 ms at worst; most of a larger cache would be trajectories that have ended."""

CACHE_TRACES = 512
"""As many as agents that are thought of as running at once: small traces stay few as well."""

LAST_TRACES = 4096
"""Trajectories whose last trace is remembered here; older ones are looked up in the index."""

AddRow = Callable[[sqlite3.Connection, Place], None]


class Encoder:
    """What one writer remembers of what it wrote. Used under the appender's lock."""

    def __init__(self, root: Path) -> None:
        """``root`` has an index. A connection of its own: encoding waits for no transaction."""
        self._root = root
        self._connection = open_index(root / INDEX_NAME, create=False)
        self._unindexed: set[str] = set()
        """Ids of traces that are written, and not in the index yet."""
        self._cache = TraceCache(CACHE_BYTES, CACHE_TRACES)
        self._last: OrderedDict[str, str] = OrderedDict()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def indexed(self, trace_ids: Iterable[str]) -> None:
        """The index has these traces now."""
        self._unindexed.difference_update(trace_ids)

    def lost(self, trace_ids: Iterable[str]) -> None:
        """These traces are not in a segment after all, and nothing may build on them."""
        self._unindexed.difference_update(trace_ids)
        self._cache.clear()
        self._last.clear()

    def encode(self, record: Trace | Small) -> tuple[bytes, AddRow] | None:
        """Bytes of a record and how to index it; None for a trace that the store has.

        sqlite3.Error where the index cannot be read; any other error is the record's own.
        """
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
        self._unindexed.add(trace_id)
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
        if trace_id in self._unindexed:
            return True
        query = "SELECT 1 FROM traces WHERE trace_id = ?"
        return self._connection.execute(query, (trace_id,)).fetchone() is not None

    def _base(self, trace: Trace) -> CachedTrace | None:
        """The first of the trace's possible bases that can be read."""
        for trace_id in self._candidates(trace):
            try:
                return load_trace(self._connection, self._root, trace_id, self._cache)
            except NotFoundError:
                continue
            except (FormatError, OSError) as error:
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
    return lambda connection, place: add_small(connection, record, place.segment)

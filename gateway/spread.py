"""How sure a cell's numbers are: its scores folded by trajectory, for the cluster bootstrap.

The index folds a cell as a whole; intervals need it by trajectory. This reads each score once, as
it comes, and keeps the newest trajectories of each cell. Derived, in memory, rebuilt by reading
again.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TypeAlias

from driftgate import bootstrap
from driftgate.mismatch import Bucket
from driftgate.router import RouterBucket
from driftgate.storage import CellRow, Reader, ScoreRow
from driftgate.views import Interval

__all__ = ["Spread"]

Key: TypeAlias = tuple[str, str, str, str]

MAX_TRAJECTORIES = 1000
"""Per cell: an interval over more clusters is no wider in its second digit, and costs memory."""

PAGE = 1000
"""Scores read from the index at once."""


@dataclass(slots=True)
class _Cell:
    """One cell by trajectory; the oldest trajectory comes first."""

    buckets: dict[str, Bucket] = field(default_factory=dict)
    """Over the comparable scores only, as the cell's headline."""
    routers: dict[str, RouterBucket] = field(default_factory=dict)
    intervals: dict[str, Interval] | None = None
    """Forgotten when a score arrives."""


class Spread:
    """Intervals of a store's cells. Thread-safe."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._cells: dict[Key, _Cell] = {}
        self._seq = 0
        self._lock = threading.Lock()

    def intervals(self, row: CellRow) -> dict[str, Interval]:
        """95 % intervals by metric; empty with fewer than two trajectories."""
        with self._lock:
            self._catch_up()
            cell = self._cells.get((row.engine.digest, row.trainer.digest, row.model, row.kind))
            if cell is None:
                return {}
            if cell.intervals is None:
                found = bootstrap.intervals(cell.buckets).values
                found |= bootstrap.router_intervals(cell.routers).values
                cell.intervals = {
                    name: Interval(low=low, high=high) for name, (low, high) in found.items()
                }
            return cell.intervals

    def _catch_up(self) -> None:
        while rows := self._reader.scores(after=self._seq, limit=PAGE):
            for row in rows:
                self._add(row)
            self._seq = rows[-1].seq

    def _add(self, row: ScoreRow) -> None:
        meta = row.meta
        key = (meta.engine.digest, meta.trainer.digest, meta.model, meta.kind)
        cell = self._cells.setdefault(key, _Cell())
        cell.intervals = None
        if meta.bucket is not None and meta.comparable.verdict != "no":
            before = cell.buckets.pop(meta.trajectory, None)
            cell.buckets[meta.trajectory] = before.merge(meta.bucket) if before else meta.bucket
        if meta.router is not None:
            earlier = cell.routers.pop(meta.trajectory, None)
            cell.routers[meta.trajectory] = earlier.merge(meta.router) if earlier else meta.router
        for known in (cell.buckets, cell.routers):
            if len(known) > MAX_TRAJECTORIES:
                known.pop(next(iter(known)))

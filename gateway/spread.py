"""How sure a cell's numbers are: its scores folded by trajectory, for the cluster bootstrap.

The index folds a cell as a whole; intervals need it by trajectory. This reads each score once, as
it comes. No trajectory is left out, so that an interval is of what its headline is of: beyond
`MAX_GROUPS` they share groups, by their names, and groups are what is drawn. Derived, in memory,
rebuilt by reading again.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import TypeAlias, TypeVar

from driftgate import bootstrap
from driftgate.codes import SPOILS_ROUTES
from driftgate.mismatch import Bucket
from driftgate.pool import Findings, pool_of, refutes
from driftgate.replay import ReplayPair
from driftgate.router import RouterBucket
from driftgate.storage import CellRow, Reader, ScoreRow
from driftgate.views import Interval

__all__ = ["Spread"]

B = TypeVar("B", Bucket, RouterBucket, ReplayPair)

Key: TypeAlias = tuple[str, str, str, str]

MAX_GROUPS = 1000
"""Per cell: the width of an interval over so many clusters is known to 2 %, and each costs memory.
A group holds whole trajectories, and which ones has nothing to do with their drift."""

PAGE = 1000
"""Scores read from the index at once."""


@dataclass(slots=True)
class _Run:
    """One group of trajectories of a cell, by pool."""

    buckets: dict[str, Bucket] = field(default_factory=dict)
    """Over the comparable scores only, as the cell's headline."""
    routers: dict[str, RouterBucket] = field(default_factory=dict)
    """Over the scores with no reason against their routes."""
    replays: dict[str, ReplayPair] = field(default_factory=dict)
    """As ``buckets``, over those scored under the rollout's routes too."""


@dataclass(slots=True)
class _Cell:
    """One cell by group."""

    runs: dict[str, _Run] = field(default_factory=dict)
    """By the trajectory that came first to the group."""
    names: list[str] = field(default_factory=list)
    """Keys of ``runs`` in the order they came."""
    pools: set[str] = field(default_factory=set)
    """Known so far; scores come in the order in which the index folds them."""
    refuted: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
    """Pools whose logprobs and whose routes ``intervals`` leave out."""
    intervals: dict[str, Interval] | None = None
    """Forgotten when a score arrives."""

    def run(self, trajectory: str) -> _Run:
        """The group of a trajectory: its own, while there are fewer than `MAX_GROUPS`."""
        if trajectory not in self.runs:
            if len(self.names) >= MAX_GROUPS:
                return self.runs[self.names[zlib.crc32(trajectory.encode()) % MAX_GROUPS]]
            self.names.append(trajectory)
            self.runs[trajectory] = _Run()
        return self.runs[trajectory]


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
            refuted = _refuted(row.findings)
            if cell.intervals is None or cell.refuted != refuted:
                cell.intervals, cell.refuted = _intervals(cell, *refuted), refuted
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
        pool = pool_of(meta, cell.pools)
        cell.pools.add(pool)
        run = cell.run(meta.trajectory)
        if meta.bucket is not None and meta.comparable.verdict != "no":
            _add(run.buckets, pool, meta.bucket)
            if (pair := ReplayPair.of(meta)) is not None:
                _add(run.replays, pool, pair)
        if meta.router is not None and not refutes(meta.comparable.reasons, SPOILS_ROUTES):
            _add(run.routers, pool, meta.router)


def _add(sums: dict[str, B], pool: str, bucket: B) -> None:
    sums[pool] = sums[pool].merge(bucket) if pool in sums else bucket


def _refuted(findings: Findings) -> tuple[frozenset[str], frozenset[str]]:
    logprobs = frozenset(pool for pool, found in findings.items() if refutes(found))
    routes = frozenset(pool for pool in logprobs if refutes(findings[pool], SPOILS_ROUTES))
    return logprobs, routes


def _intervals(
    cell: _Cell, logprobs: frozenset[str], routes: frozenset[str]
) -> dict[str, Interval]:
    """Of what the two sets of refuted pools leave."""
    buckets = _by_run({run: sums.buckets for run, sums in cell.runs.items()}, logprobs)
    routers = _by_run({run: sums.routers for run, sums in cell.runs.items()}, routes)
    replays = _by_run({run: sums.replays for run, sums in cell.runs.items()}, logprobs)
    found = (
        bootstrap.intervals(buckets).values
        | bootstrap.router_intervals(routers).values
        | bootstrap.replay_intervals(replays).values
    )
    return {name: Interval(low=low, high=high) for name, (low, high) in found.items()}


def _by_run(runs: Mapping[str, Mapping[str, B]], refuted: frozenset[str]) -> dict[str, B]:
    """The sum of each group over the pools that stand; one without any is left out."""
    kept = {
        run: [bucket for pool, bucket in sums.items() if pool not in refuted]
        for run, sums in runs.items()
    }
    return {run: reduce(lambda a, b: a.merge(b), parts) for run, parts in kept.items() if parts}

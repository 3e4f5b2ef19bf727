"""Which noise floors are still to be measured: each side against itself, exactly once per pair."""

from __future__ import annotations

from collections.abc import Iterator

from driftgate.storage import Reader
from driftgate.trace import Engine, ScoreMeta

__all__ = ["Floors"]

PAGE = 1000
"""Scores read at once when looking at what a store already has."""

TWINS = 10_000
"""Pairs looked at, oldest first: the most that the store gives at once, and enough for a floor."""


class Floors:
    """Remembers what has been measured; starts from what the store holds."""

    def __init__(self, reader: Reader, trainer: str, *, trajectories: int) -> None:
        """``trainer``: its digest. ``trajectories``: how many it scores twice, over all its
        workers' lives."""
        self._reader = reader
        self._limit = trajectories
        self._repeated: set[str] = set()
        self._compared: set[str] = set()
        for meta in self._stored():
            if meta.trainer.digest == trainer:
                self._repeated.add(meta.trajectory)
            if isinstance(meta.engine, Engine):
                self._compared.add(meta.trace_id)

    def takes(self, trajectory: str) -> bool:
        """True if the trainer is to score ``trajectory`` twice."""
        if len(self._repeated) < self._limit:
            self._repeated.add(trajectory)
        return trajectory in self._repeated

    def new_twins(self) -> Iterator[tuple[str, str]]:
        """Pairs of traces that one engine sampled from one request, not compared yet."""
        for first, second in self._reader.twins(limit=TWINS):
            if second not in self._compared:
                self._compared.add(second)
                yield first, second

    def _stored(self) -> Iterator[ScoreMeta]:
        after = 0
        while rows := self._reader.scores(kind="noise_floor", after=after, limit=PAGE):
            after = rows[-1].seq
            yield from (row.meta for row in rows)

"""Which noise floors are still to be measured: each side against itself, exactly once per pair.

The trainer's floor is to be the variation that its drift scores have. A trace that was scored
inside a longer sequence is therefore scored again alone, which differs in the last bits
(``driftgate.teacher.sequences``); one with a forward of its own is scored by the same forward
again, which is 0 to the bit unless the trainer's kernels do not repeat themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq

from driftgate.storage import Reader
from driftgate.teacher.sequences import Sequence, alone
from driftgate.trace import Engine, ScoreMeta

__all__ = ["Floors", "repeats"]

PAGE = 1000
"""Scores read at once when looking at what a store already has."""

TWINS = 10_000
"""Pairs looked at, oldest first: the most that the store gives at once, and enough for a floor."""

ALONE = 8
"""Forwards of single traces at most that one floor adds to a sequence: all steps of a long
trajectory alone would cost as many times the trajectory as it has steps, over two."""


def repeats(sequences: Seq[Sequence], traces: Collection[str]) -> list[Sequence]:
    """The second runs over ``traces`` (ids): alone where the first was inside a longer sequence,
    evenly spread over it, else the same forward again, whose other results are of no use."""
    again = []
    for sequence in sequences:
        wanted = [part for part in sequence.slices if part.trace_id in traces]
        if any(not part.one_pass for part in wanted):
            again.append(sequence)
        inside = [part for part in wanted if part.one_pass]
        step = max(1, -(-len(inside) // ALONE))
        again += [alone(sequence, part) for part in inside[::step]]
    return again


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

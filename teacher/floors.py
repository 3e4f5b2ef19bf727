"""Which noise floors are still to be measured: each side against itself, exactly once per pair.

The trainer's floor is to be the variation that its drift scores have. A trace that was scored
inside a longer sequence is therefore scored again alone, which differs in the last bits
(``driftgate.teacher.sequences``); one with a forward of its own is scored by the same forward
again, which is 0 to the bit unless the trainer's kernels do not repeat themselves.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as Seq
from itertools import islice, zip_longest

from driftgate.storage import Reader
from driftgate.teacher.base import Backend, SliceResult
from driftgate.teacher.scores import trainer_floor
from driftgate.teacher.sequences import Sequence, alone, is_scorable
from driftgate.trace import Engine, Score, ScoreMeta, Trace, TraceMeta

__all__ = ["Floors", "choose", "repeats", "trainer_floors"]

PAGE = 1000
"""Scores read at once when looking at what a store already has."""

TWINS = 10_000
"""Pairs looked at, oldest first: the most that the store gives at once, and enough for a floor."""

MAX_TRAJECTORIES = 500
"""The newest that are looked at for traces to run again."""

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


def trainer_floors(
    backend: Backend,
    traces: Seq[Trace],
    sequences: Seq[Sequence],
    results: Mapping[str, SliceResult],
) -> list[Score]:
    """Second runs over ``traces`` against their first ``results``, those of ``sequences``."""
    by_id = {trace.meta.trace_id: trace for trace in traces}
    again = repeats(sequences, by_id)
    floors = []
    for second in backend.score(again) if again else []:
        # Inside a longer sequence again: that trace's second run is the one alone.
        if second.trace_id in by_id and not second.one_pass:
            first, now_ns = results[second.trace_id], time.time_ns()
            trace = by_id[second.trace_id]
            floors.append(
                trainer_floor(trace, first, second, trainer=backend.trainer, now_ns=now_ns)
            )
    return floors


def choose(reader: Reader, *, model: str | None, limit: int) -> list[Trace]:
    """At most ``limit`` of the newest scorable traces of one engine and weight version.

    Over as many trajectories as there are, of each its last step first: tokens of one trajectory
    say less than those of several.
    """
    pages = [
        [row for row in reversed(reader.traces(item.trajectory)) if row.scorable]
        for item in reader.trajectories(model=model, limit=MAX_TRAJECTORIES)
    ]
    rows = [row for tier in zip_longest(*pages) for row in tier if row is not None]
    rows = [row for row in rows if model in (None, row.meta.model)]
    alike = [row for row in rows if _version(row.meta) == _version(rows[0].meta)]
    traces = (reader.trace(row.meta.trace_id) for row in alike)
    return list(islice((trace for trace in traces if is_scorable(trace)), limit))


def _version(meta: TraceMeta) -> tuple[str, str, str]:
    return meta.engine.digest, meta.model, meta.weight_version


class Floors:
    """Remembers what has been measured; starts from what the store holds."""

    def __init__(self, reader: Reader, trainer: str, *, trajectories: int) -> None:
        """``trainer``: its digest. ``trajectories``: how many it scores twice, over all its
        workers' lives."""
        self._reader = reader
        self._limit = trajectories
        self._repeated: set[str] = set()
        self._compared: set[str] = set()
        self.traces: set[str] = set()
        """Those that this trainer has a floor of."""
        for meta in self._stored():
            if meta.trainer.digest == trainer:
                self._repeated.add(meta.trajectory)
                self.traces.add(meta.trace_id)
            # A floor of another kind stands for no pair of answers.
            if isinstance(meta.engine, Engine) and meta.engine == meta.trainer:
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

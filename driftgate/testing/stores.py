"""Stores written through the real ``Writer``, for tests of everything that reads one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from driftgate.storage import Record, Writer
from driftgate.testing.traces import ENGINE, TRAINER, make_intent, make_score, make_trajectory
from driftgate.trace import Comparable, Reason, Reward, Score, Trace

__all__ = [
    "BAD_TRAINER",
    "SLASHED",
    "example_records",
    "flip",
    "make_scores",
    "write_store",
]

SLASHED = "runs/one é"
"""A trajectory whose name needs percent-encoding."""

BAD_TRAINER = msgspec.structs.replace(TRAINER, dtype="bfloat16")
"""A trainer whose scores are not comparable."""


def write_store(root: Path, records: Iterable[Record]) -> Path:
    """Write ``records`` in order; they are durable and indexed when this returns."""
    writer = Writer(root)
    try:
        for pending in [writer.submit(record) for record in records]:
            pending.result(timeout=30)
    finally:
        writer.close()
    return root


def example_records() -> Iterator[Record]:
    """Two trajectories: one whole, scored by two trainers, rewarded; one with gaps, unscored."""
    one = list(make_trajectory(SLASHED, steps=3))
    yield from _called(one)
    yield from make_scores(one)
    why = Reason(code="precision_differs", detail="bfloat16", fix="score in float32")
    verdict = Comparable(verdict="no", reasons=[why])
    yield make_score(one[0], noise=0.5, trainer=BAD_TRAINER, comparable=verdict)
    yield make_score(one[1], noise=0.0, kind="noise_floor", trainer=ENGINE)
    yield Reward(trajectory=SLASHED, value=0.5, source="verifier", given_ns=1)
    two = list(make_trajectory("two", steps=2, missing=["routed_experts: not asked for"]))
    yield from _called(two[:1])
    yield make_intent(two[1])


def make_scores(traces: Iterable[Trace], *, noise: float = 0.01) -> Iterator[Score]:
    """A comparable score of each trace."""
    return (make_score(trace, noise=noise, seed=n) for n, trace in enumerate(traces))


def _called(traces: Iterable[Trace]) -> Iterator[Record]:
    for trace in traces:
        yield make_intent(trace)
        yield trace


def flip(segment: Path, record: int) -> None:
    """Damage the record at offset ``record``: one bit of its frame."""
    data = bytearray(segment.read_bytes())
    data[record + 40] ^= 1
    segment.write_bytes(data)

"""Two cells on the same prompts: what one engine build drifts beside another. Blocking.

A cell's own numbers are of whatever its engine was asked. Here only answers count whose prompt, by
its token ids, both engines were given; so a difference is the engines', not the prompts'.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from driftgate.errors import FormatError, NotFoundError
from driftgate.gateway import shape
from driftgate.live_views import PairedAnswer, PairedCells, PairedSide
from driftgate.mismatch import Bucket
from driftgate.pool import Findings, refusals
from driftgate.storage import CellRow, Reader
from driftgate.trace import I32, ScoreMeta

__all__ = ["CellName", "Pairing"]

log = logging.getLogger("driftgate.api")

LOOKED = 300
"""Answers of each engine that are looked at, the newest: their prompts are read from segments."""

REMEMBERED = 16_384
"""Prompts' digests: 1 MB."""

LISTED = 100
"""Pairs in an answer, the largest difference first; ``prompts`` counts all."""


class CellName(NamedTuple):
    """A cell of drift."""

    engine: str
    trainer: str
    model: str


class _Known(NamedTuple):
    """What an answer is compared by."""

    prompt: bytes
    sampled: I32


class _Scored(NamedTuple):
    """A score, and its sums where they are evidence."""

    meta: ScoreMeta
    bucket: Bucket | None


class Pairing:
    """Asked of one store. Thread-safe as far as its reader is."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._known = functools.lru_cache(REMEMBERED)(self._read)

    def pair(self, a: CellName, b: CellName) -> PairedCells:
        """Both cells over the prompts that they share."""
        cells = self._reader.cells()
        found = [self._answers(cell, _findings(cell, cells)) for cell in (a, b)]
        shared = found[0].keys() & found[1].keys()
        sides = [
            PairedSide(
                looked=sum(map(len, by_prompt.values())),
                answers=sum(len(by_prompt[prompt]) for prompt in shared),
                measures=shape.measures(_merged(s for p in sorted(shared) for s in by_prompt[p])),
            )
            for by_prompt in found
        ]
        pairs = [
            self._paired(x, y)
            for prompt in shared
            for x, y in zip(found[0][prompt], found[1][prompt], strict=False)
        ]
        pairs.sort(key=lambda pair: (-_apart(pair), pair.trajectories, pair.steps))
        return PairedCells(
            prompts=len(shared), limit=LOOKED, a=sides[0], b=sides[1], items=pairs[:LISTED]
        )

    def _answers(self, cell: CellName, findings: Findings) -> dict[bytes, list[_Scored]]:
        """Scores of a cell by the digest of their prompt, oldest first."""
        by_prompt: defaultdict[bytes, list[_Scored]] = defaultdict(list)
        for trace_id in self._reader.answers_of(cell.engine, cell.model, limit=LOOKED):
            try:
                score = self._reader.score(trace_id, cell.trainer).meta
                bucket = None if refusals(score, findings) else score.bucket
                by_prompt[self._known(trace_id).prompt].append(_Scored(score, bucket))
            except NotFoundError:  # not scored by this trainer
                continue
            except FormatError as error:
                log.warning("%s", error)
        return dict(by_prompt)

    def _read(self, trace_id: str) -> _Known:
        trace = self._reader.trace(trace_id)
        assert trace.prompt_ids is not None  # it is scorable
        assert trace.response_ids is not None
        return _Known(hashlib.sha256(trace.prompt_ids.tobytes()).digest(), trace.response_ids)

    def _paired(self, one: _Scored, other: _Scored) -> PairedAnswer:
        a, b = one.meta, other.meta
        first, second = (self._known(score.trace_id).sampled for score in (a, b))
        same = next(
            (i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y),
            min(len(first), len(second)),
        )
        return PairedAnswer(
            trajectories=[a.trajectory, b.trajectory],
            steps=[a.step, b.step],
            choices=[a.choice, b.choice],
            tokens=[len(first), len(second)],
            alike=same,
            kl_k3_rollout_train=[_k3(one.bucket), _k3(other.bucket)],
        )


def _findings(cell: CellName, cells: Sequence[CellRow]) -> Findings:
    """What the cell's scores together refute."""
    for row in cells:
        named = CellName(row.engine.digest, row.trainer.digest, row.model)
        if named == cell and row.kind == "drift":
            return row.findings
    return {}


def _k3(bucket: Bucket | None) -> float | None:
    measures = shape.measures(bucket)
    return measures.metrics["kl_k3_rollout_train"] if measures else None


def _apart(pair: PairedAnswer) -> float:
    a, b = pair.kl_k3_rollout_train
    return -1.0 if a is None or b is None else abs(a - b)


def _merged(scores: Iterable[_Scored]) -> Bucket | None:
    """The comparable ones' sums; None where there is none."""
    buckets = [score.bucket for score in scores if score.bucket is not None]
    return functools.reduce(Bucket.merge, buckets) if buckets else None

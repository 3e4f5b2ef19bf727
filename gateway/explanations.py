"""Reads a store into explanations. Blocking: handlers run it on a thread."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from driftgate.anatomy import Response
from driftgate.causes import Floor
from driftgate.errors import FormatError, NotFoundError
from driftgate.explain import Explanation, TrajectoryExplanation, explain
from driftgate.gateway.verdicts import scores_of
from driftgate.storage import CellRow, Reader, TraceRow
from driftgate.trace import ScoreMeta

__all__ = ["Explanations"]

log = logging.getLogger("driftgate.api")


class Explanations:
    """Why trainer and engine differ, asked of one store. Thread-safe as far as its reader is."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def trajectory(self, trajectory: str, *, trainer: str | None = None) -> TrajectoryExplanation:
        """One explanation for each (engine, trainer); ``trainer``: only of this digest.
        NotFoundError."""
        self.reader.trajectory(trajectory)
        pairs: dict[tuple[str, str, str], list[ScoreMeta]] = {}
        for meta in scores_of(self.reader, trajectory):
            if trainer in (None, meta.trainer.digest):
                key = (meta.model, meta.engine.digest, meta.trainer.digest)
                pairs.setdefault(key, []).append(meta)
        traces, cells = self.reader.traces(trajectory), self.reader.cells()
        found = [self._explain(metas, traces, cells) for _, metas in sorted(pairs.items())]
        items = [item for item in found if item is not None]
        why = None
        if not items:
            why = "no score has a comparable token" if pairs else "it is not scored yet"
        return TrajectoryExplanation(trajectory=trajectory, items=items, why_empty=why)

    def _explain(
        self, metas: Sequence[ScoreMeta], traces: Sequence[TraceRow], cells: Sequence[CellRow]
    ) -> Explanation | None:
        first = metas[0]
        responses = [r for meta in metas if (r := self._response(meta)) is not None]
        if not responses:
            return None
        sides = (first.model, first.engine)
        captured = sum((row.meta.model, row.meta.engine) == sides for row in traces)
        return explain(responses, captured=captured, scored=len(metas), floor=_floor(first, cells))

    def _response(self, meta: ScoreMeta) -> Response | None:
        """None where nothing can be compared, or where the trace is lost or damaged."""
        try:
            trace = self.reader.trace(meta.trace_id)
            score = self.reader.score(meta.trace_id, meta.trainer.digest)
        except (NotFoundError, FormatError) as error:
            log.warning("%s", error)
            return None
        return Response.of(trace, score, score.logprobs_replay)


def _floor(meta: ScoreMeta, cells: Sequence[CellRow]) -> Floor | None:
    """The larger of the two sides' measured floors."""
    found = []
    for row in cells:
        if row.kind != "noise_floor" or row.bucket is None or not row.bucket.n_tokens:
            continue
        for side, own in (("engine", meta.engine), ("trainer", meta.trainer)):
            if row.engine == own and row.model == meta.model:
                found.append(Floor(row.bucket.sum_abs / row.bucket.n_tokens, side))
    return max(found, default=None)

"""Reads a store into explanations. Blocking: handlers run it on a thread."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from driftgate.anatomy import DIVERGENT, Response
from driftgate.baseline import BASELINE_MIN_TOKENS, Floor
from driftgate.errors import FormatError, NotFoundError
from driftgate.explain import Explanation, Refusal, TrajectoryExplanation, explain
from driftgate.pool import refusals
from driftgate.storage import CellRow, Reader, TraceRow
from driftgate.storage.subjects import findings_of, scores_of, standing
from driftgate.trace import Reason, ScoreMeta

__all__ = ["Explanations", "chosen"]

MAX_TOKENS = 1 << 17
"""Compared tokens read for one explanation, about 2 s and 100 MB. Of a longer run answers are taken
evenly over it, and what is left out is said."""

MAX_RESPONSES = 1024
"""Answers read for one explanation: each has its whole prompt decoded."""

log = logging.getLogger("driftgate.api")


class Explanations:
    """Why trainer and engine differ, asked of one store. Thread-safe as far as its reader is."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def trajectory(self, trajectory: str, *, trainer: str | None = None) -> TrajectoryExplanation:
        """One explanation for each (engine, trainer); ``trainer``: only of this digest.
        NotFoundError."""
        self.reader.trajectory(trajectory)
        rows = {row.meta.trace_id: row for row in standing(self.reader.traces(trajectory))}
        pairs: dict[tuple[str, str, str], list[ScoreMeta]] = {}
        for meta in scores_of(self.reader, trajectory):
            if meta.trace_id in rows and trainer in (None, meta.trainer.digest):
                key = (meta.model, meta.engine.digest, meta.trainer.digest)
                pairs.setdefault(key, []).append(meta)
        cells = self.reader.cells()
        return TrajectoryExplanation(
            trajectory=trajectory,
            items=[self._explain(metas, rows, cells) for _, metas in sorted(pairs.items())],
            why_empty=None if pairs else "it is not scored yet",
        )

    def _explain(
        self, metas: Sequence[ScoreMeta], rows: Mapping[str, TraceRow], cells: Sequence[CellRow]
    ) -> Explanation:
        first, findings = metas[0], findings_of(metas, cells)
        refused, sound, verdicts = list[Refusal](), list[ScoreMeta](), Counter[str]()
        for meta in metas:
            found = refusals(meta, findings)
            verdicts["no" if found else meta.comparable.verdict] += 1
            if found:
                refused.append(_refusal(meta, found[0], rows))
            else:
                sound.append(meta)
        sound.sort(key=lambda meta: _order(meta, rows))
        read = chosen(sound)
        responses = [r for at in read if (r := self._response(sound[at])) is not None]
        sides = (first.model, first.engine)
        return explain(
            responses,
            sides=first,
            captured=sum((row.meta.model, row.meta.engine) == sides for row in rows.values()),
            comparable={v: verdicts[v] for v in ("yes", "converted", "no") if verdicts[v]},
            refusals=refused,
            floor=_floor(first, cells),
            left_out=[_tokens(meta) for at, meta in enumerate(sound) if at not in read],
            unreadable=len(read) - len(responses),
        )

    def _response(self, meta: ScoreMeta) -> Response | None:
        """None where nothing can be compared, or where the trace is lost or damaged."""
        try:
            trace = self.reader.trace(meta.trace_id)
            score = self.reader.score(meta.trace_id, meta.trainer.digest)
        except (NotFoundError, FormatError) as error:
            log.warning("%s", error)
            return None
        return Response.of(trace, score, score.logprobs_replay)


def chosen(metas: Sequence[ScoreMeta]) -> set[int]:
    """Which of the comparable scores, in order, are read: all, or some evenly over the run.

    Always the first with a token whose ratio leaves [1/2, 2], and the one with the worst.
    """
    sizes = [_tokens(meta) for meta in metas]
    stride = max(1, math.ceil(sum(sizes) / MAX_TOKENS), math.ceil(len(sizes) / MAX_RESPONSES))
    while sum(sizes[::stride]) > MAX_TOKENS and stride < len(sizes):
        stride += 1
    read = set(range(0, len(metas), stride))
    worst = [_worst(meta) for meta in metas]
    if worst:
        read.add(worst.index(max(worst)))
    read.update([at for at, size in enumerate(worst) if size > DIVERGENT][:1])
    return read


def _tokens(meta: ScoreMeta) -> int:
    return meta.bucket.n_tokens if meta.bucket else 0


def _worst(meta: ScoreMeta) -> float:
    found = meta.bucket.worst if meta.bucket else None
    return abs(found.log_ratio) if found else 0.0


def _order(meta: ScoreMeta, rows: Mapping[str, TraceRow]) -> tuple[int, int, int]:
    row = rows.get(meta.trace_id)
    return meta.step, row.meta.started_ns if row else 0, meta.choice


def _refusal(meta: ScoreMeta, reason: Reason, rows: Mapping[str, TraceRow]) -> Refusal:
    row, bucket = rows.get(meta.trace_id), meta.bucket
    counted = bucket.n_tokens + bucket.n_bad_tokens if bucket else 0
    return Refusal(
        step=meta.step,
        reason=reason,
        tokens=(row.response_len if row else None) or counted,
        sum_abs=bucket.sum_abs if bucket else 0.0,
    )


def _floor(meta: ScoreMeta, cells: Sequence[CellRow]) -> Floor | None:
    """The larger of the two sides' measured floors; of too few tokens is none."""
    found = []
    for row in cells:
        if row.kind != "noise_floor" or row.bucket is None:
            continue
        if row.bucket.n_tokens < BASELINE_MIN_TOKENS:
            continue
        for side, own in (("engine", meta.engine), ("trainer", meta.trainer)):
            if row.engine == own and row.model == meta.model:
                found.append(Floor(row.bucket.sum_abs / row.bucket.n_tokens, side))
    return max(found, default=None)

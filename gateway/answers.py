"""Reads a store into the API's answers. Blocking: handlers run it on a thread.

It folds and it never invents: fingerprints are not mixed, a number that is not finite becomes None,
and every fold says how many scores, tokens and trajectories stand behind it.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from driftgate.bands import slack_of
from driftgate.bodies import json_of
from driftgate.bootstrap import FEW_TRAJECTORIES
from driftgate.comparable import CODES
from driftgate.errors import FormatError, NotFoundError
from driftgate.floor import label_of
from driftgate.gateway import shape
from driftgate.gateway.spread import Spread
from driftgate.gateway.verdicts import Verdicts, of_response
from driftgate.mismatch import Worst
from driftgate.replay import ReplayPair
from driftgate.storage import CellRow, Reader, ScoreRow, TraceRow, TrajectoryRow
from driftgate.storage.cells import CellFold
from driftgate.tops import alternatives
from driftgate.trace import Score, ScoreMeta, Trace
from driftgate.views import (
    CallView,
    CellMismatch,
    Cells,
    CellView,
    ChoiceView,
    Coverage,
    DriftEvent,
    FloorView,
    Kind,
    Measures,
    MismatchView,
    ReasonCount,
    ScoreView,
    StepDetail,
    StepMismatch,
    StepView,
    TraceView,
    TrajectoryDetail,
    TrajectoryPage,
    WorstView,
)

__all__ = ["Answers"]

log = logging.getLogger("driftgate.api")

T = TypeVar("T")

CONTEXT_TOKENS = 24
"""Tokens shown on either side of the worst one: about two lines of text."""

CONTEXTS = 4096
"""Worst tokens whose text is remembered, so that a second follower reads no trace again."""

SCORES_PAGE = 1000
"""Rows read from the index at once while folding a trajectory."""


class Answers:
    """The API's questions, asked of one store. Thread-safe as far as its reader is."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._context = functools.lru_cache(CONTEXTS)(self._read_context)
        self._spread = Spread(reader)

    def trajectories(
        self,
        *,
        limit: int,
        before: str | None = None,
        model: str | None = None,
        complete: bool | None = None,
        scored: bool | None = None,
    ) -> TrajectoryPage:
        """A page, newest first. NotFoundError where ``before`` is no trajectory."""
        rows = self.reader.trajectories(
            limit=limit + 1, before=before, model=model, complete=complete, scored=scored
        )
        more = len(rows) > limit
        items = rows[:limit]
        return TrajectoryPage(items=items, next=items[-1].trajectory if more else None)

    def trajectory(self, trajectory: str) -> TrajectoryDetail:
        """One agent run, step by step. NotFoundError where there is none of that name."""
        row = self.reader.trajectory(trajectory)
        scores: defaultdict[str, list[ScoreView]] = defaultdict(list)
        for score in self._scores(trajectory):
            scores[score.meta.trace_id].append(self._score(score.meta))
        calls: defaultdict[int, list[CallView]] = defaultdict(list)
        for call in self.reader.calls(trajectory):
            calls[call.step].append(_copy(call, CallView))
        choices: defaultdict[int, list[ChoiceView]] = defaultdict(list)
        for trace in self.reader.traces(trajectory):
            choices[trace.meta.step].append(_choice(trace, scores[trace.meta.trace_id]))
        return TrajectoryDetail(
            trajectory=row,
            reward=self.reader.reward(trajectory),
            verdicts=Verdicts(self.reader).briefs(trajectory),
            steps=[
                StepView(step=step, calls=calls[step], choices=choices[step])
                for step in sorted(calls.keys() | choices.keys())
            ],
        )

    def step(self, trajectory: str, step: int, *, routes: bool = False) -> StepDetail:
        """One step's answers in full. NotFoundError where the step has no answer."""
        rows = self.reader.traces(trajectory, step)
        if not rows:
            raise NotFoundError(
                f"trajectory {trajectory!r} has no stored answer at step {step}; "
                f"GET /api/trajectories/{trajectory} lists its steps"
            )
        choices = [self._trace(row.meta.trace_id, routes=routes) for row in rows]
        return StepDetail(trajectory=trajectory, step=step, choices=choices)

    def mismatch(
        self, trajectory: str, *, tokens: bool = False, trainer: str | None = None
    ) -> MismatchView:
        """Where trainer and engine differ, per (engine, trainer), whole and per scored trace."""
        row = self.reader.trajectory(trajectory)
        groups: dict[tuple[str, str, str], list[ScoreMeta]] = {}
        for score in self._scores(trajectory, "drift"):
            meta = score.meta
            key = (meta.engine.digest, meta.trainer.digest, meta.model)
            if trainer in (None, meta.trainer.digest):
                groups.setdefault(key, []).append(meta)
        engines = Counter(
            (trace.meta.engine.digest, trace.meta.model) for trace in self.reader.traces(trajectory)
        )
        cells = self.reader.cells()
        return MismatchView(
            trajectory=trajectory,
            capture="COMPLETE" if row.complete else "INCOMPLETE_CAPTURE",
            gaps=row.gaps,
            coverage=_coverage(row, groups.values(), asked=trainer is not None),
            cells=[
                CellMismatch(
                    whole=self._fold(group, engines[engine, model], cells),
                    steps=[self._step_mismatch(meta, tokens) for meta in group],
                )
                for (engine, _, model), group in sorted(groups.items())
            ],
        )

    def cells(self) -> Cells:
        """The matrix."""
        rows = self.reader.cells()
        return Cells(items=[self._cell(row, rows) for row in rows])

    def drift(
        self, after: int, limit: int, trajectory: str | None, kind: Kind | None
    ) -> list[DriftEvent]:
        """Scores with a cursor above ``after``, in order, with their worst token in its text."""
        rows = self.reader.scores(trajectory, after=after, limit=limit, kind=kind)
        return [
            DriftEvent(
                cursor=row.seq,
                score=self._score(row.meta, text=True),
                verdict=of_response(row.meta),
            )
            for row in rows
        ]

    def worst_token(self, worst: Worst | None) -> WorstView | None:
        """A worst token with its place and text; None where its trace is not there any more."""
        found = self._context(worst.trace_id, worst.token_index) if worst else None
        if worst is None or found is None:
            return None
        return self._in_context(shape.placed(worst, worst.trace_id, found["step"], found["choice"]))

    def _scores(self, trajectory: str, kind: Kind | None = None) -> Iterator[ScoreRow]:
        after, page = 0, SCORES_PAGE
        while page == SCORES_PAGE:
            rows = self.reader.scores(trajectory, after=after, limit=SCORES_PAGE, kind=kind)
            yield from rows
            page, after = len(rows), rows[-1].seq if rows else after

    def _score(self, meta: ScoreMeta, *, text: bool = False) -> ScoreView:
        worst = (
            shape.placed(meta.worst, meta.trace_id, meta.step, meta.choice) if meta.worst else None
        )
        return ScoreView(
            trace_id=meta.trace_id,
            trajectory=meta.trajectory,
            step=meta.step,
            choice=meta.choice,
            model=meta.model,
            kind=meta.kind,
            engine=meta.engine,
            engine_digest=meta.engine.digest,
            trainer=meta.trainer,
            trainer_digest=meta.trainer.digest,
            temperature=meta.temperature,
            comparable=meta.comparable,
            measures=shape.measures(meta.bucket),
            at_requested_temperature=shape.measures(meta.at_requested_temperature),
            router=shape.router(meta.router),
            router_reason=meta.router_reason,
            replay=shape.replay(ReplayPair.of(meta), comparable=meta.comparable.verdict != "no"),
            replay_reason=meta.replay_reason,
            worst=self._in_context(worst) if worst and text else worst,
            k3_slack=slack_of(meta.engine, routed=meta.router is not None),
            one_pass=meta.one_pass,
            forward_s=meta.forward_s,
            scored_ns=meta.scored_ns,
        )

    def _in_context(self, worst: WorstView) -> WorstView:
        """With the text around it, where the store has it."""
        found = self._context(worst.trace_id, worst.token_index)
        return msgspec.structs.replace(worst, **found) if found else worst

    def _read_context(self, trace_id: str, index: int) -> dict[str, Any] | None:
        """The fields of ``WorstView`` that only the trace knows."""
        try:
            trace = self.reader.answer_text(trace_id)
        except (NotFoundError, FormatError) as error:
            log.warning("%s", error)
            return None
        meta = trace.meta
        found: dict[str, Any] = {
            "trajectory": meta.trajectory,
            "step": meta.step,
            "choice": meta.choice,
        }
        if trace.prompt_len is not None:
            found["position"] = trace.prompt_len + index
        if trace.token_offsets is not None:
            last = len(trace.token_offsets) - 1
            first, upto = max(0, index - CONTEXT_TOKENS), min(last, index + 1 + CONTEXT_TOKENS)
            found["text"] = shape.text(trace, index, index + 1)
            found["before"] = shape.text(trace, first, index)
            found["after"] = shape.text(trace, index + 1, upto)
        return found

    def _trace(self, trace_id: str, *, routes: bool) -> TraceView:
        trace = self.reader.trace(trace_id)
        try:
            score: Score | None = self.reader.score(trace_id)
        except NotFoundError:
            score = None
        return TraceView(
            meta=trace.meta,
            request=json_of(trace.request),
            response=json_of(trace.response),
            prompt_ids=None if trace.prompt_ids is None else trace.prompt_ids.tolist(),
            tokens=shape.tokens(trace, score),
            alternatives=alternatives(trace.response, tokens=trace.response_ids),
            routes=shape.routes(trace.routes, routes),
            trainer_routes=shape.routes(score.routes, routes) if score else None,
            score=self._score(score.meta, text=True) if score else None,
        )

    def _step_mismatch(self, meta: ScoreMeta, tokens: bool) -> StepMismatch:
        trace = self._readable(meta.trace_id) if tokens else None
        if trace is None:
            return StepMismatch(score=self._score(meta, text=True))
        score = self.reader.score(meta.trace_id, meta.trainer.digest)
        return StepMismatch(score=self._score(meta, text=True), tokens=shape.tokens(trace, score))

    def _readable(self, trace_id: str) -> Trace | None:
        """A trace whose score stands without it; None where it is lost or damaged."""
        try:
            return self.reader.trace(trace_id)
        except (NotFoundError, FormatError) as error:
            log.warning("%s", error)
            return None

    def _fold(
        self, metas: Sequence[ScoreMeta], captured: int, cells: Sequence[CellRow]
    ) -> CellView:
        """One trajectory's scores of one cell as the cell they would be by themselves."""
        fold = CellFold(metas[0])
        for meta in metas:
            fold.fold(meta)
        whole = next((row.findings for row in cells if _same_pair(row, metas[0])), None)
        cell = fold.row(captured, wider=whole)
        return self._cell(cell, cells, intervals=False)

    def _cell(self, row: CellRow, rows: Sequence[CellRow], *, intervals: bool = True) -> CellView:
        headline = row.comparable_bucket or row.bucket
        return CellView(
            engine=row.engine,
            engine_digest=row.engine.digest,
            trainer=row.trainer,
            trainer_digest=row.trainer.digest,
            model=row.model,
            kind=row.kind,
            verdict=row.verdict,
            findings=[
                msgspec.structs.replace(reason, detail=f"{settings}: {reason.detail}")
                for settings, reasons in row.findings.items()
                for reason in reasons
            ],
            trajectories=row.trajectories,
            n_tokens=headline.n_tokens if headline else 0,
            n_seqs=headline.n_seqs if headline else 0,
            few=row.trajectories < FEW_TRAJECTORIES,
            scored=row.scored,
            captured=row.captured,
            partial=row.kind == "drift" and row.scored < row.captured,
            comparable=row.comparable,
            reasons=[
                ReasonCount(code=code, meaning=CODES.get(code, ""), scores=count)
                for code, count in sorted(row.reasons.items())
            ],
            measures=shape.measures(row.comparable_bucket),
            all_measures=shape.measures(row.bucket),
            router=shape.router(row.router),
            replay=shape.replay(row.replay),
            by_lag=shape.lags(row.by_lag),
            worst=self.worst_token(row.worst),
            intervals=self._spread.intervals(row) if intervals else {},
            floors=list(_floors(row, rows)),
            k3_slack=slack_of(row.engine, routed=row.router is not None),
        )


def _same_pair(row: CellRow, meta: ScoreMeta) -> bool:
    return (row.engine, row.trainer, row.model, row.kind) == (
        meta.engine,
        meta.trainer,
        meta.model,
        meta.kind,
    )


def _copy(row: msgspec.Struct, kind: type[T]) -> T:
    """A storage row as the view of the same names."""
    return msgspec.convert(row, kind, from_attributes=True)


def _choice(row: TraceRow, scores: list[ScoreView]) -> ChoiceView:
    return ChoiceView(
        meta=row.meta,
        prompt_len=row.prompt_len,
        response_len=row.response_len,
        has_routes=row.has_routes,
        scorable=row.scorable,
        size_bytes=row.size_bytes,
        scores=scores,
    )


def _coverage(
    row: TrajectoryRow, groups: Iterable[Sequence[ScoreMeta]], *, asked: bool
) -> Coverage:
    traces = {meta.trace_id for group in groups for meta in group}
    return Coverage(
        captured=row.captured,
        scorable=row.scorable,
        scored=len(traces) if asked else row.scored,
        missing=row.missing,
        open=row.open_calls,
    )


def _floors(row: CellRow, rows: Sequence[CellRow]) -> Iterator[FloorView]:
    """What is known of the row's two sides against themselves."""
    if row.kind == "noise_floor":
        return
    for floor in rows:
        if floor.kind != "noise_floor" or floor.bucket is None:
            continue
        if floor.engine.digest not in (row.engine.digest, row.trainer.digest):
            continue
        yield FloorView(
            side="engine" if floor.engine.digest == row.engine.digest else "trainer",
            label=label_of(floor.trainer),
            n_tokens=floor.bucket.n_tokens,
            n_seqs=floor.bucket.n_seqs,
            measures=Measures(metrics=floor.bucket.metrics(), undefined=floor.bucket.undefined()),
            router=shape.router(floor.router),
        )

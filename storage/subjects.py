"""A run's traces and scores as what is judged: one subject for each engine and trainer. Reads only.

Fingerprints are not mixed: a run that two engines sampled, or that two trainers scored, has a
subject for each pair. Verdicts, explanations and exports all ask here which scores are evidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from driftgate.lag import Lag, policy_lag
from driftgate.pool import Findings, refusals
from driftgate.storage.cells import CellFold
from driftgate.storage.reader import Reader
from driftgate.storage.rows import CellRow, TraceRow
from driftgate.subject import Refused, Subject
from driftgate.trace import Engine, ScoreMeta, Trainer
from driftgate.tree import retried_calls
from driftgate.weights import sampled_under

__all__ = ["Pair", "findings_of", "pairs", "scores_of", "standing", "unscored"]

SCORES_PAGE = 1000
"""Rows read from the index at once."""


class Pair(NamedTuple):
    """One engine and one trainer on one trajectory."""

    model: str
    engine: Engine
    trainer: Engine | Trainer | None
    """None where no trainer has scored any of the trajectory."""
    versions: tuple[str, ...]
    """Weight versions that its tokens were sampled under."""
    traces: Sequence[TraceRow]
    """The engine's, scored or not."""
    scored: frozenset[str]
    """Traces that the trainer has scored."""
    compared: frozenset[str]
    """Of them, those whose every sampled token has numbers that are evidence."""
    subject: Subject

    @property
    def key(self) -> tuple[str, str, str]:
        """Model, engine digest, trainer digest or nothing."""
        trainer = self.trainer.digest if self.trainer else ""
        return self.model, self.engine.digest, trainer


def scores_of(reader: Reader, trajectory: str) -> Iterator[ScoreMeta]:
    """Every drift score of a trajectory in order of arrival."""
    after, page = 0, SCORES_PAGE
    while page == SCORES_PAGE:
        rows = reader.scores(trajectory, after=after, limit=SCORES_PAGE, kind="drift")
        yield from (row.meta for row in rows)
        page, after = len(rows), rows[-1].seq if rows else after


def pairs(reader: Reader, trajectory: str, cells: Sequence[CellRow]) -> list[Pair]:
    """Every engine that sampled for it with every trainer that scored any of it, or alone.

    ``cells``: of the store, whose findings hold here too. An answer that a retry replaced is none
    of the run's. NotFoundError.
    """
    row = reader.trajectory(trajectory)
    engines: dict[tuple[str, str], list[TraceRow]] = {}
    for trace in standing(reader.traces(trajectory)):
        engines.setdefault((trace.meta.model, trace.meta.engine.digest), []).append(trace)
    metas: dict[str, dict[str, ScoreMeta]] = {}
    trainers: dict[str, Engine | Trainer] = {}
    for meta in scores_of(reader, trajectory):
        digest = meta.trainer.digest
        trainers[digest] = meta.trainer
        metas.setdefault(digest, {})[meta.trace_id] = meta
    out = []
    for (model, _), traces in sorted(engines.items(), key=lambda item: item[0]):
        versions = tuple(sorted({v for trace in traces for v in sampled_under(trace.meta)}))
        for trainer in sorted(trainers) or [""]:
            known = metas.get(trainer, {})
            scores = {t.meta.trace_id: m for t in traces if (m := known.get(t.meta.trace_id))}
            subject = _subject(traces, scores, cells, gaps=row.gaps, open_calls=row.open_calls)
            out.append(
                Pair(
                    model=model,
                    engine=traces[0].meta.engine,
                    trainer=trainers.get(trainer),
                    versions=versions,
                    traces=traces,
                    scored=frozenset(scores),
                    compared=_compared(subject, scores.values()),
                    subject=subject,
                )
            )
    return out


def unscored(pair: Pair) -> Pair:
    """The pair as it is for a trainer that has scored nothing of it."""
    subject = _subject(
        pair.traces, {}, (), gaps=pair.subject.gaps, open_calls=pair.subject.open_calls
    )
    nothing = frozenset[str]()
    return pair._replace(trainer=None, scored=nothing, compared=nothing, subject=subject)


def standing(traces: Sequence[TraceRow]) -> list[TraceRow]:
    """Without the answers that a retry replaced."""
    retried = retried_calls([row.meta for row in traces])
    return [row for row in traces if row.meta.call_id not in retried]


def findings_of(metas: Sequence[ScoreMeta], cells: Sequence[CellRow]) -> Findings:
    """What refutes scores of one run and pair together, by pool, besides what each says itself."""
    return _fold(metas, len(metas), cells).findings


def _subject(
    traces: Sequence[TraceRow],
    metas: Mapping[str, ScoreMeta],
    cells: Sequence[CellRow],
    *,
    gaps: Sequence[str],
    open_calls: int,
) -> Subject:
    """``metas``: one trainer's scores by trace. Only traces that can be scored count as scored."""
    rows = [row for row in traces if row.scorable and row.meta.trace_id in metas]
    scores = [metas[row.meta.trace_id] for row in rows]
    folded = _fold(scores, len(traces), cells) if scores else None
    lags = [
        (version, meta.trainer_weight_version)
        for row, meta in zip(rows, scores, strict=True)
        for version in sampled_under(row.meta)
    ]
    return Subject(
        captured=len(traces),
        scorable=sum(trace.scorable for trace in traces),
        scored=len(scores),
        open_calls=open_calls,
        gaps=gaps,
        bucket=folded.comparable_bucket if folded else None,
        tokens=sum(row.response_len or 0 for row in rows),
        refused=list(_refused(rows, scores, folded.findings)) if folded else [],
        router=folded.router if folded else None,
        router_reason=next((meta.router_reason for meta in scores if meta.router_reason), None),
        lag=policy_lag(lags) if lags else Lag(steps=None, reason="not scored"),
    )


def _compared(subject: Subject, metas: Iterable[ScoreMeta]) -> frozenset[str]:
    refused = {one.trace_id for one in subject.refused}
    return frozenset(
        meta.trace_id
        for meta in metas
        if meta.bucket is not None and not meta.bucket.n_bad_tokens and meta.trace_id not in refused
    )


def _refused(
    rows: Sequence[TraceRow], scores: Sequence[ScoreMeta], findings: Findings
) -> Iterator[Refused]:
    for row, meta in zip(rows, scores, strict=True):
        if found := refusals(meta, findings):
            yield Refused(
                trace_id=meta.trace_id,
                step=meta.step,
                choice=meta.choice,
                tokens=row.response_len or 0,
                codes=[reason.code for reason in found],
            )


def _fold(scores: Sequence[ScoreMeta], captured: int, cells: Sequence[CellRow]) -> CellRow:
    """One trajectory's scores as the cell they would be, refuted by what the whole cell refutes."""
    first = scores[0]
    fold = CellFold(first)
    for meta in scores:
        fold.fold(meta)
    same = (first.engine, first.trainer, first.model, first.kind)
    wider = next(
        (row for row in cells if (row.engine, row.trainer, row.model, row.kind) == same), None
    )
    return fold.row(captured, wider=wider.findings if wider else None)

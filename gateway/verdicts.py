"""Reads a store into verdicts. Blocking: handlers run it on a thread.

Fingerprints are not mixed: a run that two engines sampled, or that two trainers scored, has a
verdict for each pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from driftgate.codes import SEVERITY
from driftgate.judgements import (
    Feedback,
    FeedbackRow,
    GroupMember,
    GroupVerdict,
    PairVerdict,
    TrajectoryVerdict,
    TrajectoryVerdicts,
)
from driftgate.mismatch import Bucket
from driftgate.pool import merged
from driftgate.profiles import PROFILES, Profile, ProfileName
from driftgate.router import RouterBucket
from driftgate.storage import CellRow, Reader, TraceRow
from driftgate.storage.cells import CellFold
from driftgate.sums import LogSum, kish
from driftgate.trace import Engine, ScoreMeta, Trainer
from driftgate.verdict import Brief, Lag, Subject, Verdict, brief, judge, policy_lag
from driftgate.weights import sampled_under

__all__ = ["MAX_FEEDBACK", "Verdicts", "of_response", "scores_of"]

MAX_FEEDBACK = 1000
"""Trajectories behind one roll-up: each is read and folded, about 1 ms."""

SCORES_PAGE = 1000
"""Rows read from the index at once."""


class _Pair(NamedTuple):
    """One engine and one trainer on one trajectory."""

    model: str
    engine: Engine
    trainer: Engine | Trainer | None
    versions: tuple[str, ...]
    subject: Subject

    @property
    def key(self) -> tuple[str, str, str]:
        trainer = self.trainer.digest if self.trainer else ""
        return self.model, self.engine.digest, trainer


class Verdicts:
    """The questions about verdicts, asked of one store. Thread-safe as far as its reader is."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def trajectory(self, trajectory: str, profile: ProfileName = "default") -> TrajectoryVerdicts:
        """Every verdict on one run and on its prompt group. NotFoundError."""
        budget, cells = PROFILES[profile], self.reader.cells()
        return TrajectoryVerdicts(
            trajectory=trajectory,
            items=self._items(trajectory, budget, cells),
            groups=list(self._groups(trajectory, budget, cells)),
        )

    def briefs(self, trajectory: str) -> list[PairVerdict]:
        """The verdicts on one run under the default profile, a line each. NotFoundError."""
        return [
            PairVerdict(
                model=item.model,
                engine_digest=item.engine_digest,
                trainer_digest=item.trainer_digest,
                verdict=brief(item.verdict),
            )
            for item in self._items(trajectory, PROFILES["default"], self.reader.cells())
        ]

    def feedback(self, profile: ProfileName = "default", limit: int = 200) -> Feedback:
        """Verdicts on the newest ``limit`` trajectories by engine and weight version."""
        budget, cells = PROFILES[profile], self.reader.cells()
        rows = self.reader.trajectories(limit=min(limit, MAX_FEEDBACK))
        tallies: dict[tuple[str, ...], _Tally] = {}
        for row in rows:
            for pair in self._pairs(row.trajectory, cells):
                key = (*pair.key, *pair.versions)
                tallies.setdefault(key, _Tally(pair)).add(pair, judge(pair.subject, budget))
        return Feedback(
            profile=budget,
            trajectories=len(rows),
            of=self.reader.counts().trajectories,
            items=[tallies[key].row() for key in sorted(tallies)],
        )

    def _items(
        self, trajectory: str, profile: Profile, cells: Sequence[CellRow]
    ) -> list[TrajectoryVerdict]:
        pairs = self._pairs(trajectory, cells)
        if pairs:
            return [_item(pair, profile) for pair in pairs]
        row = self.reader.trajectory(trajectory)
        empty = Subject(captured=0, scorable=0, scored=0, open_calls=row.open_calls, gaps=row.gaps)
        return [
            TrajectoryVerdict(
                model=None,
                engine_digest=None,
                trainer_digest=None,
                weight_versions=[],
                captured=0,
                scorable=0,
                scored=0,
                n_tokens=0,
                verdict=judge(empty, profile),
            )
        ]

    def _groups(
        self, trajectory: str, profile: Profile, cells: Sequence[CellRow]
    ) -> Iterator[GroupVerdict]:
        names = self.reader.prompt_group(trajectory)
        if len(names) < 2:
            return
        members = {name: {pair.key: pair for pair in self._pairs(name, cells)} for name in names}
        for key, own in members[trajectory].items():
            if own.trainer is None:
                continue
            pairs = {name: pairs[key] for name, pairs in members.items() if key in pairs}
            yield GroupVerdict(
                model=own.model,
                engine_digest=own.engine.digest,
                trainer_digest=own.trainer.digest,
                members=[
                    GroupMember(trajectory=name, verdict=brief(judge(pair.subject, profile)))
                    for name, pair in pairs.items()
                ],
                verdict=judge(_together(pairs), profile),
                ess_kish_trajectory=_kish([pair.subject for pair in pairs.values()]),
            )

    def _pairs(self, trajectory: str, cells: Sequence[CellRow]) -> list[_Pair]:
        """Every engine that sampled for it with every trainer that scored any of it, or alone."""
        row = self.reader.trajectory(trajectory)
        engines: dict[tuple[str, str], list[TraceRow]] = {}
        for trace in self.reader.traces(trajectory):
            engines.setdefault((trace.meta.model, trace.meta.engine.digest), []).append(trace)
        metas: dict[str, dict[str, ScoreMeta]] = {}
        trainers: dict[str, Engine | Trainer] = {}
        for meta in scores_of(self.reader, trajectory):
            digest = meta.trainer.digest
            trainers[digest] = meta.trainer
            metas.setdefault(digest, {})[meta.trace_id] = meta
        out = []
        for _, traces in sorted(engines.items()):
            for trainer in sorted(trainers) or [""]:
                scores = [
                    metas[trainer][trace.meta.trace_id]
                    for trace in traces
                    if trace.meta.trace_id in metas.get(trainer, {})
                ]
                subject = _subject(traces, scores, cells, gaps=row.gaps, open_calls=row.open_calls)
                first = traces[0].meta
                versions = tuple(sorted({v for trace in traces for v in sampled_under(trace.meta)}))
                out.append(
                    _Pair(first.model, first.engine, trainers.get(trainer), versions, subject)
                )
        return out


def of_response(meta: ScoreMeta) -> Brief | None:
    """The default profile's verdict on one response by its score alone; None for a noise floor."""
    if meta.kind != "drift":
        return None
    refused = [r.code for r in meta.comparable.reasons if SEVERITY.get(r.code) == "no"]
    subject = Subject(
        captured=1,
        scorable=1,
        scored=1,
        bucket=meta.bucket,
        comparable=int(meta.comparable.verdict != "no"),
        codes=refused,
        router=meta.router,
        router_reason=meta.router_reason,
        lag=Lag(steps=None, reason="a score does not say under which version was sampled"),
    )
    return brief(judge(subject, PROFILES["default"]))


def scores_of(reader: Reader, trajectory: str) -> Iterator[ScoreMeta]:
    """Every drift score of a trajectory in order of arrival."""
    after, page = 0, SCORES_PAGE
    while page == SCORES_PAGE:
        rows = reader.scores(trajectory, after=after, limit=SCORES_PAGE, kind="drift")
        yield from (row.meta for row in rows)
        page, after = len(rows), rows[-1].seq if rows else after


def _subject(
    traces: Sequence[TraceRow],
    scores: Sequence[ScoreMeta],
    cells: Sequence[CellRow],
    *,
    gaps: Sequence[str],
    open_calls: int,
) -> Subject:
    folded = _fold(scores, len(traces), cells) if scores else None
    bucket = folded.comparable_bucket if folded else None
    versions = {trace.meta.trace_id: sampled_under(trace.meta) for trace in traces}
    pairs = [
        (version, meta.trainer_weight_version)
        for meta in scores
        for version in versions[meta.trace_id]
    ]
    return Subject(
        captured=len(traces),
        scorable=sum(trace.scorable for trace in traces),
        scored=len(scores),
        open_calls=open_calls,
        gaps=gaps,
        bucket=bucket,
        comparable=bucket.n_seqs if bucket else 0,
        codes=_refusals(folded) if folded else (),
        router=folded.router if folded else None,
        router_reason=next((meta.router_reason for meta in scores if meta.router_reason), None),
        lag=policy_lag(pairs) if pairs else Lag(steps=None, reason="not scored"),
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


def _refusals(row: CellRow) -> list[str]:
    """Codes that make scores of the row not comparable."""
    found = {reason.code for reasons in row.findings.values() for reason in reasons}
    return sorted(code for code in {*row.reasons, *found} if SEVERITY.get(code) == "no")


def _item(pair: _Pair, profile: Profile) -> TrajectoryVerdict:
    subject = pair.subject
    return TrajectoryVerdict(
        model=pair.model,
        engine_digest=pair.engine.digest,
        trainer_digest=pair.trainer.digest if pair.trainer else None,
        weight_versions=list(pair.versions),
        captured=subject.captured,
        scorable=subject.scorable,
        scored=subject.scored,
        n_tokens=subject.bucket.n_tokens if subject.bucket else 0,
        verdict=judge(subject, profile),
    )


def _together(pairs: dict[str, _Pair]) -> Subject:
    """The members of a group as one subject."""
    subjects = [pair.subject for pair in pairs.values()]
    lags = [subject.lag for subject in subjects]
    unknown = next((lag for lag in lags if lag.steps is None), None)
    return Subject(
        captured=sum(s.captured for s in subjects),
        scorable=sum(s.scorable for s in subjects),
        scored=sum(s.scored for s in subjects),
        open_calls=sum(s.open_calls for s in subjects),
        gaps=[f"{name}: {gap}" for name, pair in pairs.items() for gap in pair.subject.gaps],
        bucket=_merged_buckets(s.bucket for s in subjects),
        comparable=sum(s.comparable for s in subjects),
        codes=sorted({code for s in subjects for code in s.codes}),
        router=_merged_routers(s.router for s in subjects),
        router_reason=next((s.router_reason for s in subjects if s.router_reason), None),
        lag=unknown or Lag(steps=max(lag.steps or 0 for lag in lags)),
    )


def _merged_buckets(buckets: Iterable[Bucket | None]) -> Bucket | None:
    total: Bucket | None = None
    for bucket in buckets:
        total = total if bucket is None else merged(total, bucket)
    return total


def _merged_routers(routers: Iterable[RouterBucket | None]) -> RouterBucket | None:
    total: RouterBucket | None = None
    for router in routers:
        if router is not None:
            total = router if total is None else total.merge(router)
    return total


def _kish(subjects: Sequence[Subject]) -> float | None:
    """Kish over e^(sum of D), one weight for each run; None for fewer than two."""
    sums = np.array(
        [s.bucket.log_ratio.mean * s.bucket.n_tokens for s in subjects if s.bucket is not None]
    )
    if sums.size < 2:
        return None
    return kish(LogSum.of(sums), LogSum.of(2.0 * sums), int(sums.size))


class _Tally:
    """One row of the roll-up while it is filled."""

    def __init__(self, first: _Pair) -> None:
        self._first = first
        self._verdicts: Counter[str] = Counter()
        self._codes: Counter[str] = Counter()
        self._bucket: Bucket | None = None

    def add(self, pair: _Pair, verdict: Verdict) -> None:
        self._verdicts[verdict.verdict or "null"] += 1
        self._codes.update({reason.code for reason in verdict.reasons})
        self._bucket = _merged_buckets([self._bucket, pair.subject.bucket])

    def row(self) -> FeedbackRow:
        first, values = self._first, self._bucket.metrics() if self._bucket else {}
        return FeedbackRow(
            engine=first.engine,
            engine_digest=first.engine.digest,
            trainer_digest=first.trainer.digest if first.trainer else None,
            model=first.model,
            weight_version="+".join(first.versions),
            trajectories=self._verdicts.total(),
            verdicts=dict(self._verdicts),
            codes=dict(sorted(self._codes.items())),
            n_tokens=self._bucket.n_tokens if self._bucket else 0,
            kl_k3_rollout_train=values.get("kl_k3_rollout_train"),
            abs_log_ratio_mean=values.get("abs_log_ratio_mean"),
        )

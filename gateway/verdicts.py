"""Reads a store into verdicts. Blocking: handlers run it on a thread.

Fingerprints are not mixed: a run that two engines sampled, or that two trainers scored, has a
verdict for each pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from driftgate.codes import SPOILS_ROUTES
from driftgate.judgements import (
    MAX_FEEDBACK,
    Feedback,
    FeedbackRow,
    GroupMember,
    GroupVerdict,
    PairVerdict,
    TrajectoryVerdict,
    TrajectoryVerdicts,
)
from driftgate.lag import policy_lag, widest
from driftgate.mismatch import Bucket
from driftgate.pool import merged, refusals
from driftgate.profiles import PROFILES, Profile, ProfileName
from driftgate.router import RouterBucket
from driftgate.storage import CellRow, Reader
from driftgate.storage.subjects import Pair, pairs, unscored
from driftgate.subject import Refused, Subject
from driftgate.sums import LogSum, kish
from driftgate.trace import ScoreMeta
from driftgate.verdict import Brief, Verdict, brief, judge

__all__ = ["Verdicts", "of_response"]

NUMBERS = ("kl_k3_rollout_train", "abs_log_ratio_mean")
"""Of a row of the feedback."""

MAX_MEMBERS = 128
"""Runs of one prompt that are judged together, the nearest in time; groups are of 4 to 64 runs."""


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
        without = 0
        for row in rows:
            found = pairs(self.reader, row.trajectory, cells)
            without += not found
            for pair in found:
                key = (*pair.key, *pair.versions)
                tallies.setdefault(key, _Tally(pair)).add(pair, judge(pair.subject, budget))
        return Feedback(
            profile=budget,
            trajectories=len(rows),
            without_answers=without,
            of=self.reader.counts().trajectories,
            items=[tallies[key].row() for key in sorted(tallies)],
        )

    def _items(
        self, trajectory: str, profile: Profile, cells: Sequence[CellRow]
    ) -> list[TrajectoryVerdict]:
        found = pairs(self.reader, trajectory, cells)
        if found:
            return [_item(pair, profile) for pair in found]
        row = self.reader.trajectory(trajectory)
        empty = Subject(
            captured=0, scorable=0, scored=0, tokens=0, open_calls=row.open_calls, gaps=row.gaps
        )
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
        group = self.reader.prompt_group(trajectory)
        if len(group) < 2:
            return
        first = max(0, min(group.index(trajectory) - MAX_MEMBERS // 2, len(group) - MAX_MEMBERS))
        names = group[first : first + MAX_MEMBERS]
        members = {name: pairs(self.reader, name, cells) for name in names}
        for own in members[trajectory]:
            if own.trainer is None:
                continue
            same = {
                name: pair
                for name, found in members.items()
                if (pair := _counterpart(found, own)) is not None
            }
            if len(same) < 2:
                continue
            subjects = [pair.subject for pair in same.values()]
            why = _no_kish(subjects)
            yield GroupVerdict(
                model=own.model,
                engine_digest=own.engine.digest,
                trainer_digest=own.trainer.digest,
                of=len(group),
                members=[
                    GroupMember(trajectory=name, verdict=brief(judge(pair.subject, profile)))
                    for name, pair in same.items()
                ],
                verdict=judge(_together(same), profile),
                ess_kish_trajectory=_kish(subjects),
                undefined={} if why is None else {"ess_kish_trajectory": why},
            )


def _counterpart(found: Sequence[Pair], own: Pair) -> Pair | None:
    """Of another run, the same engine and trainer; unscored where this trainer has not been there,
    None where the engine has not."""
    sampled = [pair for pair in found if pair.key[:2] == own.key[:2]]
    scored = [pair for pair in sampled if pair.key == own.key]
    return scored[0] if scored else unscored(sampled[0]) if sampled else None


def of_response(meta: ScoreMeta) -> Brief | None:
    """The default profile's verdict on one response by its score alone; None for a noise floor."""
    if meta.kind != "drift":
        return None
    codes = [reason.code for reason in refusals(meta, {})]
    bucket = meta.bucket
    tokens = bucket.n_tokens + bucket.n_bad_tokens if bucket else 0
    refused = Refused(
        trace_id=meta.trace_id, step=meta.step, choice=meta.choice, tokens=tokens, codes=codes
    )
    subject = Subject(
        captured=1,
        scorable=1,
        scored=1,
        bucket=None if codes else bucket,
        tokens=max(1, tokens),
        refused=[refused] if codes else [],
        router=None if SPOILS_ROUTES.intersection(codes) else meta.router,
        router_reason=meta.router_reason,
        lag=policy_lag([(meta.weight_version, meta.trainer_weight_version)]),
    )
    return brief(judge(subject, PROFILES["default"]))


def _item(pair: Pair, profile: Profile) -> TrajectoryVerdict:
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


def _together(found: Mapping[str, Pair]) -> Subject:
    """The members of a group as one subject."""
    subjects = [pair.subject for pair in found.values()]
    return Subject(
        captured=sum(s.captured for s in subjects),
        scorable=sum(s.scorable for s in subjects),
        scored=sum(s.scored for s in subjects),
        open_calls=sum(s.open_calls for s in subjects),
        gaps=[f"{name}: {gap}" for name, pair in found.items() for gap in pair.subject.gaps],
        bucket=_merged_buckets(s.bucket for s in subjects),
        tokens=sum(s.tokens for s in subjects),
        refused=[refused for s in subjects for refused in s.refused],
        router=_merged_routers(s.router for s in subjects),
        router_reason=next((s.router_reason for s in subjects if s.router_reason), None),
        lag=widest(subject.lag for subject in subjects),
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


def _no_kish(subjects: Sequence[Subject]) -> str | None:
    """Why the runs of a group have no `_kish`."""
    if len(subjects) < 2:
        return f"needs two runs, has {len(subjects)}"
    unscored = sum(s.scored < s.scorable for s in subjects)
    if unscored:
        return f"runs that are not scored in full: {unscored}"
    empty = sum(not s.compared for s in subjects)
    return f"runs without a comparable token: {empty}" if empty else None


def _kish(subjects: Sequence[Subject]) -> float | None:
    """Kish over e^(sum of D), one weight for each run; None where `_no_kish` says why."""
    if _no_kish(subjects) is not None:
        return None
    sums = np.array(
        [s.bucket.log_ratio.mean * s.bucket.n_tokens for s in subjects if s.bucket is not None]
    )
    return kish(LogSum.of(sums), LogSum.of(2.0 * sums), int(sums.size))


class _Tally:
    """One row of the roll-up while it is filled."""

    def __init__(self, first: Pair) -> None:
        self._first = first
        self._verdicts: Counter[str] = Counter()
        self._codes: Counter[str] = Counter()
        self._bucket: Bucket | None = None

    def add(self, pair: Pair, verdict: Verdict) -> None:
        self._verdicts[verdict.verdict or "null"] += 1
        self._codes.update({reason.code for reason in verdict.reasons})
        self._bucket = _merged_buckets([self._bucket, pair.subject.bucket])

    def row(self) -> FeedbackRow:
        bucket = self._bucket or Bucket()
        first, values, why = self._first, bucket.metrics(), bucket.undefined()
        return FeedbackRow(
            engine=first.engine,
            engine_digest=first.engine.digest,
            trainer_digest=first.trainer.digest if first.trainer else None,
            model=first.model,
            weight_version="+".join(first.versions),
            trajectories=self._verdicts.total(),
            verdicts=dict(self._verdicts),
            codes=dict(sorted(self._codes.items())),
            n_tokens=bucket.n_tokens,
            kl_k3_rollout_train=values["kl_k3_rollout_train"],
            abs_log_ratio_mean=values["abs_log_ratio_mean"],
            undefined={name: why[name] for name in NUMBERS if name in why},
        )

"""Which traces of a store are trained on, and why the others are not.

A trainer that learns from a half-captured answer learns something that no policy did. So a trace is
left out, and counted under its reason, unless it is whole, reached its agent, belongs to a
trajectory without gaps, has logprobs that are numbers, and no trainer's comparison refutes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec import structs

from driftgate.comparable import asked_in_vain
from driftgate.errors import NotFoundError, StorageError
from driftgate.mismatch import is_logprob
from driftgate.profiles import PROFILES, TIERS, Tier
from driftgate.samples import Sample, assemble, lines
from driftgate.storage import Reader, TraceRow
from driftgate.storage.subjects import pairs
from driftgate.trace import I32, Trace
from driftgate.tree import retried_calls
from driftgate.verdict import judge

__all__ = ["REASONS", "Selection", "trajectories"]

PROFILE = PROFILES["default"]
"""Budget under which a run is left out."""

PAGE = 500
"""Trajectories named per question to the index."""

REASONS = {
    "no_tokens": "no prompt ids, sampled ids or logprobs: nothing to train on, never exported",
    "damaged": "could not be read: see the list",
    "incomplete_capture": "the answer did not end, or something the engine owed is missing",
    "trajectory_gap": "another call of its trajectory was not captured whole",
    "delivery_uncertain": "the agent left before the end of the answer was written to it, or it "
    "could not be sent once it was recorded",
    "retried": "the client asked again, so that this answer counts for nothing; never exported "
    "where it was cut",
    "not_comparable": "no trainer has comparable numbers for all of its tokens, or none can have "
    "for what it was asked with: it stays as context, unmasked",
    "quarantined": f"its run is quarantined under profile {PROFILE.name}, by all of its scores or "
    "by those that are there: `driftgate verdict`",
    "bad_logprobs": "logprobs that are NaN, infinite, positive or the engine's floor, or logits in "
    "their place; never exported",
}
"""Why a trace is left out, in words."""

FINAL = ("no_tokens", "damaged", "bad_logprobs")
"""These are left out whatever is asked for; so is ``retried`` of an answer that was cut."""


@dataclass(slots=True)
class Selection:
    """Reads samples out of a store, and keeps count of what it leaves out."""

    reader: Reader
    include_incomplete: bool = False
    """Keep what can be trained on at all, with its reasons in ``SampleMeta.flags``."""
    per_trace: bool = False
    """A sample for each trace instead of one for each line of a trajectory."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Traces by reason; a trace with several counts once under each."""
    damaged: list[str] = field(default_factory=list)
    """Traces and trajectories that could not be read, and why."""

    def samples(self, trajectory: str | None = None) -> Iterator[Sample]:
        """Of the whole store, or of one trajectory. NotFoundError where that does not exist."""
        if trajectory is not None:
            self.reader.trajectory(trajectory)
        for name in [trajectory] if trajectory is not None else trajectories(self.reader):
            yield from self._trajectory(name)

    def _trajectory(self, name: str) -> Iterator[Sample]:
        row = self.reader.trajectory(name)
        gap = [] if row.complete else ["trajectory_gap"]
        judged = _judged(self.reader, name)
        rows = sorted(self.reader.traces(name), key=_order)
        retried = retried_calls([row.meta for row in rows])
        flags: dict[str, list[str]] = {}
        models: dict[str, list[tuple[str, tuple[I32, I32]]]] = {}
        for trace_row in rows:
            trace = self._load(trace_row.meta.trace_id)
            if trace is None:
                continue
            meta = trace.meta
            reasons = [*_reasons(trace), *judged.reasons.get(meta.trace_id, []), *gap]
            reasons = list(dict.fromkeys(reasons))
            final = bool(set(reasons) & set(FINAL))
            if meta.call_id in retried:
                reasons.append("retried")
                final = final or meta.delivery != "delivered"
            if final if self.include_incomplete else reasons:
                self.left_out.update(reasons)
                continue
            assert trace.prompt_ids is not None
            assert trace.response_ids is not None
            flags[trace.meta.trace_id] = reasons
            pair = (trace.prompt_ids, trace.response_ids)
            models.setdefault(trace.meta.model, []).append((trace.meta.trace_id, pair))
        number = 0
        for found in models.values():
            ids = [pair for _, pair in found]
            joined = [[n] for n in range(len(ids))] if self.per_trace else lines(ids)
            for line in joined:
                trace_ids = [found[n][0] for n in line]
                verdicts = [judged.verdicts.get(trace_id) for trace_id in trace_ids]
                yield from self._sample(trace_ids, row.reward, flags, number, _worst(verdicts))
                number += 1

    def _sample(
        self,
        trace_ids: list[str],
        reward: float | None,
        flags: dict[str, list[str]],
        number: int,
        verdict: Tier | None,
    ) -> Iterator[Sample]:
        """One sample, or none where its traces do not join."""
        try:
            yield assemble(
                (self.reader.trace(trace_id) for trace_id in trace_ids),
                reward=reward,
                flags=lambda trace: flags[trace.meta.trace_id],
                line=number,
                verdict=verdict,
            )
        except (StorageError, NotFoundError, ValueError) as error:
            self.left_out["damaged"] += len(trace_ids)
            self.damaged.append(f"line of {trace_ids[-1]}: {error}")

    def _load(self, trace_id: str) -> Trace | None:
        try:
            return self.reader.trace(trace_id)
        except (StorageError, NotFoundError) as error:
            self.left_out["damaged"] += 1
            self.damaged.append(f"trace {trace_id}: {error}")
            return None


def trajectories(reader: Reader) -> list[str]:
    """Every trajectory, the first that began first."""
    names: list[str] = []
    while page := reader.trajectories(limit=PAGE, before=names[-1] if names else None):
        names.extend(row.trajectory for row in page)
    return names[::-1]


def _order(row: TraceRow) -> tuple[int, int, int, str]:
    meta = row.meta
    return meta.step, meta.choice, meta.retry, meta.trace_id


class _Judged(NamedTuple):
    """What the scores of a run say, by trace."""

    reasons: dict[str, list[str]]
    """``not_comparable`` and ``quarantined``, where they hold."""
    verdicts: dict[str, Tier]
    """The mildest of the trainers that have scored all of the run."""


def _judged(reader: Reader, trajectory: str) -> _Judged:
    """One trainer that can compare a trace, or that lets its run pass, is enough.

    Only one that has scored all can let it pass; to quarantine it, what is scored so far is enough.
    A gap has a reason of its own.
    """
    scored, compared, condemned, passed = set[str](), set[str](), set[str](), set[str]()
    verdicts: dict[str, Tier] = {}
    for pair in pairs(reader, trajectory, reader.cells()):
        subject, names = pair.subject, [row.meta.trace_id for row in pair.traces]
        scored |= pair.scored
        compared |= pair.compared
        if not subject.scored:
            continue
        so_far = structs.replace(subject, scorable=subject.scored, open_calls=0)
        verdict = judge(so_far, PROFILE)
        why = {r.code for r in verdict.reasons if r.verdict == "quarantine"}
        whole = subject.scored == subject.scorable and not subject.open_calls
        if why - {"INCOMPLETE_CAPTURE"}:
            condemned |= set(names)
        elif whole:
            passed |= set(names)
        if whole and verdict.verdict is not None:
            for name in names:
                known = verdicts.get(name, verdict.verdict)
                verdicts[name] = min(known, verdict.verdict, key=TIERS.index)
    found: dict[str, list[str]] = {}
    for trace_id in sorted(scored - compared):
        found.setdefault(trace_id, []).append("not_comparable")
    for trace_id in sorted(condemned - passed):
        found.setdefault(trace_id, []).append("quarantined")
    return _Judged(found, verdicts)


def _worst(verdicts: Sequence[Tier | None]) -> Tier | None:
    """None where one of them is not known."""
    known = [verdict for verdict in verdicts if verdict is not None]
    return max(known, key=TIERS.index) if len(known) == len(verdicts) else None


def _reasons(trace: Trace) -> list[str]:
    """Codes of `REASONS` that a trace gives by itself."""
    meta, logprobs = trace.meta, trace.logprobs
    if (
        trace.prompt_ids is None
        or trace.response_ids is None
        or logprobs is None
        or not len(trace.prompt_ids)
        or not len(logprobs)
        or len(logprobs) != len(trace.response_ids)
    ):
        return ["no_tokens"]
    mode = meta.engine.logprobs_mode
    holds = {
        "incomplete_capture": meta.status != "complete" or bool(meta.missing),
        "delivery_uncertain": meta.delivery != "delivered",
        "bad_logprobs": mode.endswith("_logits") or not is_logprob(logprobs).all(),
        "not_comparable": bool(asked_in_vain(meta.engine, meta.sampling)),
    }
    return [code for code, holding in holds.items() if holding]

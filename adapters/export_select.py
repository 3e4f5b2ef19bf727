"""Which traces of a store are trained on, and why the others are not.

A trainer that learns from a half-captured answer learns something that no policy did. So a trace is
left out, and counted under its reason, unless it is whole, reached its agent, belongs to a
trajectory without gaps, has logprobs that are numbers, and no trainer's comparison refutes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from driftgate.errors import NotFoundError, StorageError
from driftgate.mismatch import BAD_FLOOR
from driftgate.profiles import PROFILES
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
    "retried": "the client asked again: this answer never reached it; never exported",
    "not_comparable": "no trainer's numbers for it are comparable: it stays as context, unmasked",
    "quarantined": f"its run is quarantined under profile {PROFILE.name}: `driftgate verdict`",
    "bad_logprobs": "logprobs that are NaN, infinite or the engine's floor; never exported",
}
"""Why a trace is left out, in words."""

FINAL = ("no_tokens", "damaged", "bad_logprobs", "retried")
"""These are left out whatever is asked for."""


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
            reasons = [*_reasons(trace), *judged.get(trace.meta.trace_id, []), *gap]
            if trace.meta.call_id in retried:
                reasons.append("retried")
            if (set(reasons) & set(FINAL)) if self.include_incomplete else reasons:
                self.left_out.update(reasons)
                continue
            assert trace.prompt_ids is not None
            assert trace.response_ids is not None
            flags[trace.meta.trace_id] = reasons
            pair = (trace.prompt_ids, trace.response_ids)
            models.setdefault(trace.meta.model, []).append((trace.meta.trace_id, pair))
        for found in models.values():
            ids = [pair for _, pair in found]
            joined = [[n] for n in range(len(ids))] if self.per_trace else lines(ids)
            for line in joined:
                yield from self._sample([found[n][0] for n in line], row.reward, flags)

    def _sample(
        self, trace_ids: list[str], reward: float | None, flags: dict[str, list[str]]
    ) -> Iterator[Sample]:
        """One sample, or none where its traces do not join."""
        try:
            yield assemble(
                (self.reader.trace(trace_id) for trace_id in trace_ids),
                reward=reward,
                flags=lambda trace: flags[trace.meta.trace_id],
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


def _judged(reader: Reader, trajectory: str) -> dict[str, list[str]]:
    """``not_comparable`` and ``quarantined`` by trace, where they hold.

    One trainer that can compare a trace, or that lets its run pass, is enough. A run without a
    verdict is not quarantined; one that is for nothing but a gap has ``trajectory_gap``.
    """
    scored, compared, judged, passed = set[str](), set[str](), set[str](), set[str]()
    for pair in pairs(reader, trajectory, reader.cells()):
        names = {row.meta.trace_id for row in pair.traces}
        refused = {one.trace_id for one in pair.subject.refused}
        scored |= pair.scored
        compared |= pair.scored - refused
        verdict = judge(pair.subject, PROFILE)
        if verdict.verdict is None:
            continue
        judged |= names
        why = {r.code for r in verdict.reasons if r.verdict == "quarantine"}
        passed |= set() if why - {"INCOMPLETE_CAPTURE"} else names
    found: dict[str, list[str]] = {}
    for trace_id in sorted(scored - compared):
        found.setdefault(trace_id, []).append("not_comparable")
    for trace_id in sorted(judged - passed):
        found.setdefault(trace_id, []).append("quarantined")
    return found


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
    holds = {
        "incomplete_capture": meta.status != "complete" or bool(meta.missing),
        "delivery_uncertain": meta.delivery != "delivered",
        "bad_logprobs": not bool(np.all(np.isfinite(logprobs) & (logprobs > BAD_FLOOR))),
    }
    return [code for code, holding in holds.items() if holding]

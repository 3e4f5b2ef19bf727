"""What readers of a store get besides traces and scores: one row per trajectory, call, trace,
score, cell."""

from __future__ import annotations

from typing import Literal

import msgspec

from driftgate.listings import TrajectoryRow
from driftgate.mismatch import Bucket, Worst
from driftgate.pool import LagSums
from driftgate.replay import ReplayPair
from driftgate.router import RouterBucket
from driftgate.trace import CallIntent, CallOutcome, Engine, Reason, ScoreMeta, TraceMeta, Trainer

__all__ = [
    "CallRow",
    "CallState",
    "CellRow",
    "Counts",
    "Lease",
    "OpenWork",
    "RebuildReport",
    "ScoreRow",
    "TraceRow",
    "TrajectoryRow",
]

CallState = Literal["open", "done", "failed", "cancelled", "capture_failed"]
"""``open``: neither a trace nor an outcome yet; ``done``: at least one trace and no outcome; else
the outcome's status."""


class CallRow(msgspec.Struct, frozen=True, kw_only=True):
    """One model call and how it ended."""

    call_id: str
    trajectory: str
    step: int
    model: str
    retry: int
    state: CallState
    intent: CallIntent | None
    outcome: CallOutcome | None
    choices: int
    """Traces it should have (``n``); 0 while none has arrived."""
    captured: int
    started_ns: int


class TraceRow(msgspec.Struct, frozen=True, kw_only=True):
    """A trace without its arrays."""

    meta: TraceMeta
    prompt_len: int | None
    response_len: int | None
    has_routes: bool
    scorable: bool
    scored: bool
    twin_key: str | None
    base: str | None
    """Trace that it is stored as a difference to."""
    size_bytes: int
    """On disk."""


class ScoreRow(msgspec.Struct, frozen=True, kw_only=True):
    """A score without its arrays."""

    seq: int
    """Position in the store's order of scores; grows by one, never reused: the cursor of
    ``/api/drift``."""
    meta: ScoreMeta


class CellRow(msgspec.Struct, frozen=True, kw_only=True):
    """All scores of one pair of fingerprints, model and kind, folded. Never mixes fingerprints."""

    engine: Engine | Trainer
    trainer: Engine | Trainer
    model: str
    kind: Literal["drift", "noise_floor"]
    bucket: Bucket | None
    """Over every score that has numbers, comparable or not: read ``comparable`` first."""
    comparable_bucket: Bucket | None
    """Over the scores whose verdict is ``yes`` or ``converted``, but for those that ``findings``
    refute together."""
    router: RouterBucket | None
    """Over the scores with no reason against their routes."""
    replay: ReplayPair | None
    """Over the scores behind ``comparable_bucket`` that were scored under the rollout's routes
    too; None where there is none."""
    by_lag: list[LagSums]
    """``comparable_bucket`` and ``router`` by policy lag."""
    verdict: Literal["yes", "converted", "no"]
    """Of ``comparable_bucket``; ``no`` where there is none."""
    findings: dict[str, list[Reason]]
    """What the merged sums say that single scores are too short to say, by sampling settings: a
    reason of weight ``no`` takes the scores asked so out of ``comparable_bucket``."""
    comparable: dict[str, int]
    """Scores by verdict: ``yes``, ``converted``, ``no``."""
    reasons: dict[str, int]
    """Scores by reason code."""
    worst: Worst | None
    """The token with the largest |log ratio| behind ``comparable_bucket``, or of all without it."""
    n_seqs: int
    """Scores with numbers."""
    scored: int
    """Scores."""
    captured: int
    """Traces of this engine and model in the store."""
    trajectories: int
    last_seq: int


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Of the whole store, by SQL."""

    trajectories: int
    steps: int
    calls: int
    traces: int
    complete: int
    """Trajectories without a gap."""
    scorable: int
    scored: int
    """Traces with a drift score."""
    scores: int


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """The right, until ``expires``, to score these traces for this trainer."""

    trajectory: str
    trainer: str
    worker: str
    token: str
    trace_ids: list[str]
    """Unscored, scorable traces in order of step and choice."""
    ttl_s: float
    expires: float
    """Seconds since the epoch."""
    crashes: int = 0
    """Earlier leases of the same work that nobody gave back: their workers died over it, or were
    killed."""


class OpenWork(msgspec.Struct, frozen=True, kw_only=True):
    """A trajectory that a trainer has not scored in full."""

    trajectory: str
    worker: str | None
    """Who has leased it; None: nobody."""
    expires: float | None
    """Of that lease, seconds since the epoch; it may be past."""


class RebuildReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a rebuild of the index read."""

    segments: int
    records: int
    damaged_bytes: int
    """Bytes of segments that were whole once and are no record now, or gone."""
    torn_bytes: int
    """Bytes behind what was whole."""
    unreadable: list[str]
    """Files that are no segment of a known version and records whose content breaks the format:
    skipped."""
    lost: list[str]
    """What the index before this one had of a segment and is in none now, calls whose trace may be
    in what is damaged or missing, and traces that are built on one that is not there, a line
    each."""

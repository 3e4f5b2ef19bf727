"""The API's answers about verdicts: of a trajectory, of its prompt group, of engines over time.

Part of the API's shapes like `driftgate.views`.
"""

from __future__ import annotations

import msgspec

from driftgate.profiles import Profile
from driftgate.trace import Engine, Trainer
from driftgate.verdict import Brief, Verdict

__all__ = [
    "MAX_FEEDBACK",
    "Feedback",
    "FeedbackRow",
    "GroupMember",
    "GroupVerdict",
    "PairVerdict",
    "TrajectoryVerdict",
    "TrajectoryVerdicts",
]

MAX_FEEDBACK = 1000
"""Trajectories behind one roll-up: each is read and folded, about 1 ms."""


class TrajectoryVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """May one run be trained on, for one engine that sampled it and one trainer that scored it."""

    model: str | None
    """Null, like the sides, where nothing was captured."""
    engine_digest: str | None
    trainer_digest: str | None
    """Null before any trainer has scored it."""
    weight_versions: list[str]
    """Policy versions that its tokens were sampled under."""
    captured: int
    scorable: int
    scored: int
    n_tokens: int
    """Comparable ones."""
    verdict: Verdict


class PairVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict in a line, for one engine and one trainer; `TrajectoryVerdict` has the numbers."""

    model: str | None
    engine_digest: str | None
    trainer_digest: str | None
    verdict: Brief


class GroupMember(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a prompt group."""

    trajectory: str
    verdict: Brief


class GroupVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """The runs that began with the same prompt, judged as one; drop members by their own verdict.

    No verdict before every member has all its scores, but for a gap: that quarantines at once.
    """

    model: str
    engine_digest: str
    trainer_digest: str
    of: int
    """Runs that began with the prompt; ``members`` are the nearest in time of this engine."""
    members: list[GroupMember]
    verdict: Verdict
    ess_kish_trajectory: float | None
    """Kish over e^(sum of D) of each run: can whole runs be weighted against each other. Falls
    with length by itself, so no profile looks at it. Over the comparable tokens of each; null below
    two runs, and where one has none or is not scored in full."""
    undefined: dict[str, str] = {}
    """Why it is null."""


class TrajectoryVerdicts(msgspec.Struct, frozen=True, kw_only=True):
    """Every verdict on one trajectory."""

    trajectory: str
    items: list[TrajectoryVerdict]
    """One for each (engine, trainer)."""
    groups: list[GroupVerdict]
    """Its prompt group, one for each (engine, trainer); empty where it is alone or where its first
    prompt is not stored."""


class FeedbackRow(msgspec.Struct, frozen=True, kw_only=True):
    """Verdicts on what one engine sampled under one weight version."""

    engine: Engine | Trainer
    engine_digest: str
    trainer_digest: str | None
    model: str
    weight_version: str
    """``a+b`` where runs span several."""
    trajectories: int
    verdicts: dict[str, int]
    """Trajectories by verdict; ``null`` for those without one."""
    codes: dict[str, int]
    """Trajectories by reason code."""
    n_tokens: int
    """Comparable ones, behind the numbers that follow."""
    kl_k3_rollout_train: float | None
    abs_log_ratio_mean: float | None
    undefined: dict[str, str] = {}
    """Why one of the two is null."""


class Feedback(msgspec.Struct, frozen=True, kw_only=True):
    """What the rollout side should hear: which engines and weight versions give usable runs."""

    profile: Profile
    trajectories: int
    """The newest ones, behind ``items``."""
    without_answers: int
    """Of them, those without an answer, whose calls all failed or have not ended: in no item."""
    of: int
    """Trajectories in the store."""
    items: list[FeedbackRow]

"""What the dashboard asks besides ``driftgate.views``: now, over time, and token by token.

Values only, as in ``driftgate.views``: the gateway fills them, the page and OpenAPI read them.
Times are wall clock in nanoseconds since the epoch; rates and durations say their unit.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from driftgate.bands import Band
from driftgate.glossary import Metric
from driftgate.views import Kind, Measures, WorstView

__all__ = [
    "Alarm",
    "CellSeries",
    "ExpertLoad",
    "Glossary",
    "LayerLoad",
    "Overview",
    "PairedAnswer",
    "PairedCells",
    "PairedSide",
    "Series",
    "SeriesPoint",
    "StepRoutes",
    "TokenLayers",
    "WorstTrajectory",
]


class Alarm(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a person should look at, in words."""

    severity: Literal["red", "amber"]
    code: str
    """Stable: ``drift_red``, ``routes_misaligned``, ``capture_gaps``, …"""
    text: str
    """What is seen, with its number and unit."""
    fix: str
    since_ns: int | None = None
    """Start of the unbroken stretch up to now; null where it has no start."""
    engine_digest: str | None = None
    trainer_digest: str | None = None
    model: str | None = None


class WorstTrajectory(msgspec.Struct, frozen=True, kw_only=True):
    """A trajectory with its worst token among comparable scores."""

    trajectory: str
    model: str
    worst: WorstView


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """What is live now."""

    now_ns: int
    window_s: float
    """Rates and ``running`` look back so far."""
    running: int
    """Trajectories with a call that is open, or that began within the window."""
    open_calls: int
    """Calls with neither a trace nor an outcome, begun within the last hour."""
    stale_calls: int
    """The same, begun earlier: their gateway was most likely killed."""
    steps_per_s: float
    """Calls begun within the window, a second."""
    response_tokens_per_s: float
    """Sampled tokens of answers to calls begun within the window, a second."""
    trajectories: int
    incomplete: int
    """Trajectories with a call that ended without all it should have given."""
    steps: int
    captured: int
    """Traces stored."""
    scorable: int
    scored: int
    waiting: int
    """Scorable traces without a drift score."""
    oldest_waiting_ns: int | None
    """When the oldest of them was asked for: the worker's lag is ``now_ns`` less this."""
    last_call_ns: int | None
    last_score_ns: int | None
    alarms: list[Alarm]
    """The worst first; empty: nothing to look at."""
    worst: list[WorstTrajectory]
    """The largest |D| first."""


class SeriesPoint(msgspec.Struct, frozen=True, kw_only=True):
    """Scores of one cell that were made in one slot of time, merged."""

    start_ns: int
    scores: int
    """With numbers that are comparable."""
    not_comparable: int
    """Scores of the slot that are left out of ``metrics``."""
    n_tokens: int
    metrics: dict[str, float | None]
    """By METRICS name; null where the slot has nothing to compare."""


class CellSeries(msgspec.Struct, frozen=True, kw_only=True):
    """One cell over time."""

    engine_digest: str
    trainer_digest: str
    model: str
    kind: Kind
    points: list[SeriesPoint]
    """In order of time; slots without a score are left out."""
    forgotten: int
    """Older scores that are not held in memory any more."""


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """Drift over time, by the time of scoring."""

    slot_s: float
    items: list[CellSeries]


class TokenLayers(msgspec.Struct, frozen=True, kw_only=True):
    """Where one token was sent, layer by layer."""

    index: int
    rollout: list[list[int]]
    """[L][K] expert ids, in the engine's order."""
    train: list[list[int]]
    """[L][K] expert ids, in the trainer's order."""
    missed: list[int | None]
    """[L], this token's row of ``StepRoutes.missed``."""


class StepRoutes(msgspec.Struct, frozen=True, kw_only=True):
    """Route disagreement of one answer, token by token: row j is the row that predicts token j."""

    trajectory: str
    step: int
    choice: int
    reason: str | None = None
    """Why there is nothing to compare; null where there is."""
    layers: list[int] = []
    """Absolute numbers of the MoE layers."""
    k: int = 0
    """Experts per token and layer."""
    missed: list[list[int | None]] = []
    """[R][L]: experts of the engine that the trainer did not choose, 0 to K; null where a side's
    row is no choice (padding, a sentinel)."""
    token: TokenLayers | None = None
    """Only with ``token=j``."""


class LayerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """How one layer's tokens were spread over its experts, by each side."""

    layer: int
    """Absolute number."""
    tokens: int
    """Sampled tokens that both sides sent to experts."""
    rollout: list[int]
    """[E] tokens that the engine sent to each expert; they add up to ``tokens`` times K."""
    train: list[int]
    """[E] the same of the trainer."""
    apart: float | None
    """Total variation distance of the two spreads, 0 to 1; null without tokens."""


class ExpertLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Which experts a cell's tokens went to, over its newest answers with routes of both sides."""

    answers: int
    limit: int
    """Answers of this engine that are looked at, the newest."""
    k: int
    """Experts per token and layer; 0 where nothing has routes."""
    experts: int
    """One more than the largest expert id seen: the router may have more, that no token went to."""
    layers: list[LayerLoad]


class PairedSide(msgspec.Struct, frozen=True, kw_only=True):
    """One of two cells, over the prompts that both were given."""

    looked: int
    """Scored answers whose prompts were compared."""
    answers: int
    """Of those, with a shared prompt."""
    measures: Measures | None
    """Over the comparable ones of these; null where there is none."""


class PairedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Two answers to one prompt; each list is [a, b]."""

    trajectories: list[str]
    steps: list[int]
    choices: list[int]
    tokens: list[int]
    """Sampled."""
    alike: int
    """Leading sampled tokens that are the same."""
    kl_k3_rollout_train: list[float | None]
    """nats; null where a score is not comparable."""


class PairedCells(msgspec.Struct, frozen=True, kw_only=True):
    """Two cells on the same prompts, by their token ids."""

    prompts: int
    """Shared."""
    limit: int
    """Answers of each engine that are looked at, the newest."""
    a: PairedSide
    b: PairedSide
    items: list[PairedAnswer]
    """The largest difference first; at most 100."""


class Glossary(msgspec.Struct, frozen=True, kw_only=True):
    """What each name means: metrics, colour bands, reason codes."""

    metrics: dict[str, Metric]
    router_metrics: dict[str, Metric]
    bands: dict[str, Band]
    moe_slack: float
    """How much wider the k3 band is where it is (``k3_slack``): of routes, and of FP8."""
    codes: dict[str, str]

"""The answers of driftgate's API, declared once for gateway, client, command line and OpenAPI.

Every shape here is a value: no file, no socket, no torch. The gateway fills them,
``driftgate.Client`` decodes into them, ``driftgate.render`` draws them, and ``/api/openapi.json``
is derived from them, so the four cannot disagree.

JSON has no NaN and no infinity: a number that is not finite is ``null``, and ``undefined`` beside
the metrics says why each ``null`` is one.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from driftgate.judgements import PairVerdict
from driftgate.listings import (
    ApiError,
    ErrorBody,
    Minted,
    MintRequest,
    RewardRequest,
    TrajectoryPage,
    TrajectoryRow,
)
from driftgate.tops import Alternative
from driftgate.trace import (
    CallIntent,
    CallOutcome,
    Comparable,
    Engine,
    Reason,
    Reward,
    TraceMeta,
    Trainer,
)
from driftgate.verdict import Brief

__all__ = [
    "ApiError",
    "CallView",
    "CellMismatch",
    "CellView",
    "Cells",
    "ChoiceView",
    "Coverage",
    "DriftEvent",
    "ErrorBody",
    "FloorView",
    "Interval",
    "Kind",
    "Measures",
    "MintRequest",
    "Minted",
    "MismatchView",
    "ReasonCount",
    "ReplayView",
    "RewardRequest",
    "RouterMeasures",
    "RoutesView",
    "ScoreView",
    "StepDetail",
    "StepMismatch",
    "StepView",
    "TokenView",
    "TraceView",
    "TrajectoryDetail",
    "TrajectoryPage",
    "TrajectoryRow",
    "WorstView",
]

Kind = Literal["drift", "noise_floor"]


class Measures(msgspec.Struct, frozen=True, kw_only=True):
    """Metrics by their METRICS name."""

    metrics: dict[str, float | int | None]
    undefined: dict[str, str] = {}
    """Why a metric is null, by name."""


class RouterMeasures(msgspec.Struct, frozen=True, kw_only=True):
    """Router metrics by their METRICS name; vectors are by layer."""

    metrics: dict[str, Any]
    undefined: dict[str, str] = {}


class ReplayView(msgspec.Struct, frozen=True, kw_only=True):
    """The drift that is left when the trainer uses the rollout's routes, and the share that is
    gone: what routing replay would remove."""

    n_tokens: int
    n_seqs: int
    coverage: float | None
    """Share of the router's choices that the rollout's routes gave; the trainer made the others."""
    shares: Measures
    """``replay_removes_abs_log_ratio_mean`` and ``replay_removes_kl_k3_rollout_train``."""
    native: Measures
    """Drift of these tokens with the trainer's own routes."""
    measures: Measures
    """Drift of these tokens with the rollout's."""


class WorstView(msgspec.Struct, frozen=True, kw_only=True):
    """The token with the largest |log ratio|, in its text."""

    trace_id: str
    trajectory: str | None = None
    """Null where the trace itself could not be read."""
    step: int
    choice: int
    token_index: int
    """0-based within the response."""
    position: int | None
    """0-based in prompt + response; null where the prompt's length is unknown."""
    token_id: int
    log_ratio: float | None
    """``logp_train - logp_rollout``, nats."""
    train_logprob: float | None
    rollout_logprob: float | None
    text: str | None = None
    """The token's own text; null where the engine gave none."""
    before: str = ""
    after: str = ""


class ScoreView(msgspec.Struct, frozen=True, kw_only=True):
    """One trainer's verdict on one trace."""

    trace_id: str
    trajectory: str
    step: int
    choice: int
    model: str
    kind: Kind
    engine: Engine | Trainer
    engine_digest: str
    trainer: Engine | Trainer
    trainer_digest: str
    temperature: float
    """Transform of the trainer's logits that the numbers were computed under."""
    comparable: Comparable
    """Read this before the numbers."""
    measures: Measures | None
    """Null when nothing could be compared."""
    at_requested_temperature: Measures | None = None
    router: RouterMeasures | None = None
    router_reason: str | None = None
    replay: ReplayView | None = None
    replay_reason: str | None = None
    """Why ``replay`` is null."""
    worst: WorstView | None = None
    k3_slack: float = 1.0
    """As of its cell."""
    one_pass: bool = False
    forward_s: float = 0.0
    scored_ns: int


class DriftEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One score as it arrives."""

    cursor: int
    """Pass it as ``after`` (or ``Last-Event-ID``) to go on behind this event."""
    score: ScoreView
    verdict: Brief | None = None
    """On this response alone, under the default profile; null for a noise floor. The run's own is
    in its ``/verdict``."""


class RoutesView(msgspec.Struct, frozen=True, kw_only=True):
    """Expert ids: always their shape, the array itself on request."""

    shape: list[int]
    dtype: str
    npy_base64: str | None = None
    """A ``.npy`` file (no pickle) in base64; only with ``routes=1``."""


class TokenView(msgspec.Struct, frozen=True, kw_only=True):
    """One sampled token."""

    index: int
    position: int | None
    token_id: int
    text: str | None
    """Null where the engine gave no text; U+FFFD stands for part of a character."""
    bytes_base64: str | None = None
    """The exact bytes where they are not valid UTF-8 by themselves."""
    rollout_logprob: float | None = None
    train_logprob: float | None = None
    """Under the score's ``temperature``."""
    replay_logprob: float | None = None
    """The trainer's under the rollout's routes, at the same temperature."""
    log_ratio: float | None = None
    entropy: float | None = None
    """Nats, of the trainer's distribution at T = 1."""


class TraceView(msgspec.Struct, frozen=True, kw_only=True):
    """One stored answer in full."""

    meta: TraceMeta
    request: msgspec.Raw
    """The agent's request body; a string where it was none of strict JSON."""
    response: msgspec.Raw
    """This choice as the agent got it."""
    prompt_ids: list[int] | None
    tokens: list[TokenView]
    alternatives: list[list[Alternative]] | None = None
    """[R] the engine's likeliest tokens in its order, vLLM's with the sampled one first; null where
    the agent did not ask for any."""
    routes: RoutesView | None = None
    trainer_routes: RoutesView | None = None
    score: ScoreView | None = None
    """The latest drift score."""


class StepDetail(msgspec.Struct, frozen=True, kw_only=True):
    """One step with each of its choices in full."""

    trajectory: str
    step: int
    choices: list[TraceView]


class CallView(msgspec.Struct, frozen=True, kw_only=True):
    """One call of the agent and what became of it."""

    call_id: str
    step: int
    model: str
    retry: int
    state: Literal["open", "done", "failed", "cancelled", "capture_failed"]
    intent: CallIntent | None
    outcome: CallOutcome | None
    choices: int
    """Traces it should have; 0 while none has arrived."""
    captured: int
    started_ns: int


class ChoiceView(msgspec.Struct, frozen=True, kw_only=True):
    """One stored answer, in brief."""

    meta: TraceMeta
    prompt_len: int | None
    response_len: int | None
    has_routes: bool
    scorable: bool
    size_bytes: int
    """On disk."""
    scores: list[ScoreView]


class StepView(msgspec.Struct, frozen=True, kw_only=True):
    """One step: its calls (several when the agent retried) and its answers."""

    step: int
    calls: list[CallView]
    choices: list[ChoiceView]


class TrajectoryDetail(msgspec.Struct, frozen=True, kw_only=True):
    """One agent run, step by step."""

    trajectory: TrajectoryRow
    steps: list[StepView]
    reward: Reward | None = None
    verdicts: list[PairVerdict] = []
    """Under the default profile, one for each (engine, trainer)."""


class Coverage(msgspec.Struct, frozen=True, kw_only=True):
    """How much of what was asked the numbers speak for."""

    captured: int
    """Traces stored."""
    scorable: int
    """Of those, the ones that a trainer can score."""
    scored: int
    """Of those, with a drift score (by the asked trainer, where one was asked for)."""
    missing: int
    """Traces that a call should have and has not."""
    open: int
    """Calls with neither a trace nor an outcome."""


class ReasonCount(msgspec.Struct, frozen=True, kw_only=True):
    """A reason of ``comparable`` and how many scores give it."""

    code: str
    meaning: str
    scores: int


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """A 95 % interval by cluster bootstrap over trajectories, all of them; over a thousand groups
    of them where there are more."""

    low: float
    high: float


class FloorView(msgspec.Struct, frozen=True, kw_only=True):
    """A side against itself: drift below this says nothing."""

    side: Literal["engine", "trainer"]
    label: str = "repeat"
    """How the second run was made: ``repeat`` or ``decode_vs_prefill``."""
    n_tokens: int
    n_seqs: int
    measures: Measures
    router: RouterMeasures | None = None


class LagView(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a cell that was sampled so many weight versions before it was scored."""

    label: str
    """A number of versions; ``32 or more``; ``differs``: by nobody knows how much; ``unknown``."""
    n_tokens: int
    n_seqs: int
    measures: Measures | None
    """Null where only its routes could be compared."""
    router: RouterMeasures | None = None


class CellView(msgspec.Struct, frozen=True, kw_only=True):
    """Everything known about one pair (engine, trainer): no number mixes fingerprints."""

    engine: Engine | Trainer
    engine_digest: str
    trainer: Engine | Trainer
    trainer_digest: str
    model: str
    kind: Kind
    verdict: Literal["yes", "converted", "no"]
    """Of ``measures``: what its scores say, and what their merged sums say besides."""
    findings: list[Reason] = []
    """What the merged sums say that single scores are too short to say, for each set of sampling
    settings. The scores that a reason of weight ``no`` refutes are not in ``measures``."""
    trajectories: int
    n_tokens: int
    """Tokens behind ``measures``, or behind ``all_measures`` where nothing is comparable."""
    n_seqs: int
    few: bool
    """Fewer than 30 trajectories: intervals come out too narrow."""
    scored: int
    """Scores of this cell."""
    captured: int
    """Traces of this engine and model."""
    partial: bool = False
    """Fewer scored than captured: the numbers may still change, and are not to be quoted as those
    of the whole. Never of a noise floor, which is of a sample."""
    comparable: dict[str, int]
    """Scores by their own verdict: ``yes``, ``converted``, ``no``."""
    reasons: list[ReasonCount]
    measures: Measures | None
    """Over the comparable scores that no finding refutes; null where there is none."""
    all_measures: Measures | None
    """Over every score with numbers, comparable or not: evidence of what is wrong, not drift."""
    router: RouterMeasures | None = None
    replay: ReplayView | None = None
    """Over the scores behind ``measures`` that were scored under the rollout's routes too; null
    where there is none."""
    by_lag: list[LagView] = []
    """``measures`` and ``router`` by policy lag, which is no drift of the engine."""
    worst: WorstView | None = None
    intervals: dict[str, Interval] = {}
    """Of ``measures``, by metric; empty where there are too few trajectories to tell."""
    floors: list[FloorView] = []
    k3_slack: float = 1.0
    """The band of k3 is this much wider: of a mixture of experts, and of an FP8 engine."""


class Cells(msgspec.Struct, frozen=True, kw_only=True):
    """The matrix."""

    items: list[CellView]


class StepMismatch(msgspec.Struct, frozen=True, kw_only=True):
    """One scored trace of a trajectory."""

    score: ScoreView
    tokens: list[TokenView] | None = None
    """Only with ``tokens=1``, and where the trace can still be read."""


class CellMismatch(msgspec.Struct, frozen=True, kw_only=True):
    """A trajectory under one (engine, trainer): as a whole and per step."""

    whole: CellView
    steps: list[StepMismatch]


class MismatchView(msgspec.Struct, frozen=True, kw_only=True):
    """Would the trainer see the policy that produced this trajectory, and if not, where?"""

    trajectory: str
    capture: Literal["COMPLETE", "INCOMPLETE_CAPTURE"]
    gaps: list[str]
    coverage: Coverage
    cells: list[CellMismatch]
    """One for each (engine, trainer); empty before anything is scored."""

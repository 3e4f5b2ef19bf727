"""The schema: what a trace and a score are. Codec, API, docs and fixtures derive from this module.

Pure values, no torch, no I/O. Every array states shape, dtype, unit and alignment where it is
declared.

Shape letters: ``P`` prompt tokens, ``R`` sampled (response) tokens, ``L`` MoE layers in the order
the engine numbers its layers, ``K`` experts chosen per token.

Alignment: sampled token ``j`` stands at absolute position ``P + j`` and is predicted by the
logits, and by the routes, of position ``P - 1 + j``. The last sampled token is never fed back, so
it has no route: a full route array has ``P + R - 1`` rows, and the rows that predict the response
are the last ``R`` of them, ``routes[P - 1 :]``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from driftgate.mismatch import Bucket, Worst
from driftgate.router import RouterBucket

__all__ = [
    "SCHEMA_VERSION",
    "Agent",
    "Api",
    "Attribution",
    "CallIntent",
    "CallOutcome",
    "Comparable",
    "Continuation",
    "Engine",
    "LogprobsMode",
    "Proof",
    "Reason",
    "Reward",
    "RoutesVia",
    "Sampling",
    "Score",
    "ScoreMeta",
    "Trace",
    "TraceMeta",
    "Trainer",
    "WeightSpan",
]

SCHEMA_VERSION = 1
"""Version of the JSON names in this module; stands in every exported row."""

Api = Literal["chat", "completions", "responses", "messages"]
"""What the agent spoke. Responses and Anthropic's Messages reach the engine as chat completions."""

Attribution = Literal[
    "url",
    "header",
    "key",
    "session_header",
    "metadata",
    "previous_response",
    "prefix",
    "tool_call",
    "new",
]
"""Which rule of DESIGN 7 named the trajectory of a call."""

RoutesVia = Literal["json", "plugin", "synthesised", "none"]
"""How routes reached us: in a JSON answer the agent also got as JSON; in an extra chunk from our
engine plugin; in a JSON answer that the gateway turned into a stream; not at all."""

LogprobsMode = Literal[
    "raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits", "unknown"
]

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]
Routes = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


def _digest(value: object) -> str:
    """First 12 hex digits of SHA-256 over the canonical JSON of ``value``."""
    encoded = msgspec.json.encode(value, order="sorted")
    return hashlib.sha256(encoded).hexdigest()[:12]


class Engine(msgspec.Struct, frozen=True, kw_only=True, tag="engine", tag_field="side"):
    """The rollout side's fingerprint: everything known that changes its numbers."""

    name: str
    """``vllm``, ``sglang`` or ``unknown``."""
    version: str
    model: str
    """Served model name."""
    system_fingerprint: str | None = None
    """As the engine reports it; vLLM's suffix hashes its configuration."""
    logprobs_mode: LogprobsMode = "unknown"
    """Which logprobs the engine returns (METRICS 4); declared by the user where it can't be
    probed."""
    checkpoint: str | None = None
    """Digest of the weights where they are readable from here, else None."""
    routes_ordered: bool = False
    """True only where the engine proves that expert slots are in order of probability."""
    settings: dict[str, str] = {}
    """Further declared settings: dtype, quantisation, kv dtype, attention backend, parallel
    sizes."""

    @property
    def digest(self) -> str:
        """12 hex digits that name this engine in cells."""
        return _digest(self)


class Trainer(msgspec.Struct, frozen=True, kw_only=True, tag="trainer", tag_field="side"):
    """The teacher-forcing side's fingerprint."""

    backend: str
    """``reference``, ``fsdp``, ``megatron``."""
    model: str
    checkpoint: str | None = None
    dtype: str
    world_size: int = 1
    routes_ordered: bool = False
    """True where expert slots are proven to be in order of probability."""
    settings: dict[str, str] = {}
    """Library versions, attention implementation, findings that change numerics."""

    @property
    def digest(self) -> str:
        """12 hex digits that name this trainer in cells."""
        return _digest(self)


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the agent asked for that shapes the sampling density. None: not sent, the engine's
    default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: bool = False
    bad_words: bool = False
    allowed_token_ids: bool = False
    structured: str | None = None
    """What forced tokens, in words: ``response_format=json_schema``, ``tool_choice=required``, …"""
    beam_search: bool = False


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """Counts from independent places that must agree. None: the engine did not give that number."""

    ids: int | None = None
    """Sampled token ids, R."""
    logprob_rows: int | None = None
    usage_completion: int | None = None
    """``usage.completion_tokens``; a sum over choices when n > 1. None where the agent asked for
    no usage."""
    usage_prompt: int | None = None
    usage_cached: int | None = None
    """Prompt tokens that the engine took from its prefix cache (vLLM counts them with
    ``--enable-prompt-tokens-details``)."""
    prompt_ids: int | None = None
    route_rows: int | None = None
    """Must be ``P + R - 1``."""
    text_matches: bool | None = None
    """Token texts joined equal the text the agent got; None where a parser re-wrote it (tools,
    reasoning)."""
    terminal: bool = False
    """The answer ended as the protocol says: whole JSON body, or ``finish_reason`` and
    ``[DONE]``."""


class Agent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which agent of a run made a call, as its headers say (``gateway/agents.py``)."""

    id: str
    """The main agent's is its session's."""
    parent: str | None = None
    """The agent that started it; None for the main agent."""
    kind: str | None = None
    """As the agent calls it: ``Explore``, ``collab_spawn``, ``compaction``, …"""
    window: str | None = None
    """Changes when its context was compacted (Codex)."""
    compacted: bool = False
    """The first call after its context was compacted (Claude Code)."""


class WeightSpan(msgspec.Struct, frozen=True):
    """Sampled tokens under one weight version, up to the next span."""

    first: int
    """Index of the first of them in the response."""
    version: str
    """``unknown`` is a value; a change that cannot be placed is one too, in words that no version
    has (``driftgate.weights.changed``)."""


class Continuation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a call that goes on from an earlier answer was put to the engine, where exact-token
    continuation was asked for."""

    way: Literal["exact", "ordinary"]
    """``exact``: the prompt begins with the ids of ``after``, its prompt and answer, as they were
    sampled. ``ordinary``: the engine rendered the messages."""
    after: str | None = None
    """The trace whose ids were kept."""
    kept: int = 0
    """How many they are."""
    reason: str | None = None
    """Why the ordinary way was taken, or why no later answer than ``after`` could be kept."""


class TraceMeta(msgspec.Struct, kw_only=True):
    """Everything of a trace but its arrays and bodies."""

    trace_id: str
    """``{call_id}.{choice}``"""
    call_id: str
    trajectory: str
    step: int
    """0-based order of the call in its trajectory; a retried call keeps its step."""
    choice: int
    """Index among the ``n`` samples of the call."""
    api: Api
    model: str
    attribution: Attribution
    ambiguous: list[str] = []
    """Trajectories that this call could equally extend; then it starts a new one and says so."""
    agent: Agent | None = None
    """None where no header names one."""
    parent: str | None = None
    """Trace whose tokens this prompt continues; None at a root."""
    prefix_len: int = 0
    """Leading prompt tokens equal to the parent's prompt + response."""
    prefix_exact: bool = False
    """The prompt begins with all of the parent's tokens: one forward can score both."""
    continuation: Continuation | None = None
    """None where it was not asked for, or there is no earlier answer."""
    retry: int = 0
    engine: Engine
    weight_version: str = "unknown"
    """All versions of ``weight_spans``, joined by ``+``."""
    weight_spans: list[WeightSpan] = []
    """In order, the first from token 0; empty in traces from before they were kept."""
    failed_over: list[str] = []
    """Engines that were asked before the one that answered, and why each was left. None of them
    had sent a byte of an answer."""
    sampling: Sampling
    streamed: bool
    routes_via: RoutesVia = "none"
    finish_reason: str | None = None
    status: Literal["complete", "partial"] = "complete"
    """``partial``: the answer did not end, or something that the engine should have given is
    missing."""
    missing: list[str] = []
    """In words, each thing that is not here and why. Empty exactly when the capture is whole."""
    proof: Proof = Proof()
    delivery: Literal["delivered", "uncertain"] = "delivered"
    """``uncertain``: the client left before the end of the answer was written to it."""
    started_ns: int
    """Wall clock, ns since the epoch: the call reached the gateway."""
    first_byte_ns: int | None = None
    ended_ns: int
    schema: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Trace:
    """One sampled answer, as the engine gave it. Nothing is padded, guessed or retokenised."""

    meta: TraceMeta
    prompt_ids: I32 | None
    """[P] token ids as the engine rendered them."""
    response_ids: I32 | None
    """[R] sampled token ids, in order."""
    logprobs: F32 | None
    """[R] log-probability in nats of each sampled token, as reported (see
    ``engine.logprobs_mode``)."""
    routes: Routes | None
    """[P + R - 1, L, K] expert ids of positions 0 .. P+R-2; None for dense models or where
    missing."""
    token_bytes: bytes
    """The sampled tokens' texts, joined: what the reader shows without a tokenizer."""
    token_offsets: I32 | None
    """[R + 1] byte offsets into ``token_bytes``; token j is ``[o[j]:o[j+1]]``."""
    request: bytes
    """The agent's request body, verbatim JSON but for fields that the gateway was told to redact
    (credentials are headers and never reach a trace)."""
    response: bytes
    """JSON of this choice as the agent got it: message or text, finish_reason, and the like, and of
    its logprobs the ``top_logprobs`` that it asked for (``driftgate.tops``); of
    ``responses`` and ``messages`` the whole answer (``driftgate.spoken`` reads them all)."""


class CallIntent(msgspec.Struct, frozen=True, kw_only=True):
    """Written before the engine is called, so that a crash leaves a visible gap."""

    call_id: str
    trajectory: str
    step: int
    attribution: Attribution
    api: Api
    model: str
    body_sha256: str
    """Of the agent's request body, 16 hex digits."""
    retry: int = 0
    started_ns: int


class CallOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """Written when a call ends without giving every choice a trace: failed, refused, lost."""

    call_id: str
    status: Literal["failed", "cancelled", "capture_failed"]
    http_status: int | None = None
    reason: str
    ended_ns: int


class Reward(msgspec.Struct, frozen=True, kw_only=True):
    """A reward that the user gave a trajectory; the last one given counts."""

    trajectory: str
    value: float
    source: str = ""
    given_ns: int


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """Why a comparison is converted or invalid, or what else is wrong, in a form that can be acted
    on."""

    code: str
    """Stable identifier, e.g. ``logprob_convention_mismatch``; the list is
    ``driftgate.comparable.CODES``."""
    detail: str
    """What was seen, with the number."""
    fix: str
    """What to do about it."""


class Comparable(msgspec.Struct, frozen=True, kw_only=True):
    """Is the comparison valid at all (METRICS 4)? Read this before the drift."""

    verdict: Literal["yes", "converted", "no"]
    """``converted``: valid under the transform that the score names."""
    reasons: list[Reason] = []


class ScoreMeta(msgspec.Struct, kw_only=True):
    """The trainer's verdict on one trace. The pair (engine, trainer) names its cell."""

    trace_id: str
    trajectory: str
    step: int
    choice: int
    model: str
    kind: Literal["drift", "noise_floor"] = "drift"
    engine: Engine | Trainer
    """The rollout side; for a noise floor the side that ran twice."""
    trainer: Engine | Trainer
    """The trainer side; for a noise floor the same side again."""
    sampling: Sampling | None = None
    """What the trace was asked with; None in scores from before this was kept."""
    weight_version: str = "unknown"
    """Policy version that its tokens were sampled under; unknown too in scores from before this was
    kept."""
    trainer_weight_version: str | None = None
    """Policy version of the weights that scored; None where it was not given to the teacher."""
    temperature: float = 1.0
    """Transform of the trainer's logits that the headline numbers were computed under."""
    bucket: Bucket | None
    """Sums behind every metric of METRICS 2; None when nothing could be compared."""
    at_requested_temperature: Bucket | None = None
    """The same at the temperature that the agent asked for (``dual_T``), when it is not 1."""
    router: RouterBucket | None = None
    router_reason: str | None = None
    """Why ``router`` is None."""
    comparable: Comparable
    replay: Bucket | None = None
    """``bucket`` with the trainer under the rollout's routes: of the same tokens, at the same
    temperature. What it lacks of the drift is what routing replay would remove."""
    replay_reason: str | None = None
    """Why ``replay`` is None; None in scores from before replay was tried."""
    replay_coverage: float | None = None
    """Share of the (position, layer) cells behind ``replay`` that had a route of the rollout; the
    trainer routed the others by itself."""
    worst: Worst | None = None
    one_pass: bool = False
    """Scored inside a forward over a longer sequence of the trajectory."""
    forward_s: float = 0.0
    scored_ns: int
    schema: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Score:
    """A trainer's numbers for one trace."""

    meta: ScoreMeta
    logprobs: F32
    """[R] nats, the trainer's log-probability of each sampled token at T = 1."""
    entropy: F32
    """[R] nats, of the trainer's distribution at T = 1."""
    logprobs_at_temperature: F32 | None = None
    """[R] nats at the requested temperature; None when it is 1 or unknown."""
    logprobs_replay: F32 | None = None
    """[R] nats at ``meta.temperature``, under the rollout's routes; None where ``meta.replay``
    is."""
    routes: Routes | None = None
    """[R, L, K] the trainer's expert ids at the rows that predict the response (positions P-1 ..
    P+R-2)."""

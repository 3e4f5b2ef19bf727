"""METRICS 4: a planted case for each reason, beside one honest pair that nothing is said of.

Both sides come from known logits: an engine samples 1,200 tokens of a vocabulary of 500 and a
trainer holds the same logits with noise. A case changes one thing, in the numbers, in what is
declared, or both. The verdict and every code are written here by hand, so that a case which brings
a second accusation does not hold either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from driftgate.codes import CODES, reason
from driftgate.comparable import judge
from driftgate.facts import NEUTRAL_DEFAULTS, Parent
from driftgate.mismatch import Bucket
from driftgate.router import RouterBucket, route_shift
from driftgate.trace import Comparable, Engine, Proof, Sampling, TraceMeta, Trainer, WeightSpan
from science.by_hand import F64
from science.signatures import log_softmax, truncated
from science.table import Row, exactly

__all__ = ["planted"]

T, VOCAB, TOKENS, NOISE = 0.7, 500, 1200, 0.02
PLAIN = Sampling(temperature=1.0)
VERSION = "7"
ELSEWHERE = {
    "incomplete_capture": "the worker",
    "trace_unreadable": "the worker",
    "sequence_too_long": "the worker",
    "scoring_failed": "the worker",
    "scoring_crashed": "the worker",
    "reason_unknown": "a score of another version",
    "samples_diverged": "a noise floor",
}
"""Codes that no comparison gives, and what does; tests/teacher has a case for each."""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that is planted, and what has to be said of it."""

    what: str
    verdict: str
    codes: str
    """All of them, in order of the alphabet."""
    numbers: str = "honest"
    """Of `simulate`."""
    sampling: Sampling = PLAIN
    mode: str = "raw_logprobs"
    name: str = "vllm"
    engine: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `judge`."""


def simulate() -> dict[str, tuple[Bucket, Bucket]]:
    """By name, the sums with the trainer at T = 1 and at ``T``."""
    rng = np.random.default_rng(4)
    z = rng.normal(size=(TOKENS, VOCAB)) * rng.uniform(1, 6, (TOKENS, 1))
    noisy = z + rng.normal(0, NOISE, z.shape)
    one, hot = log_softmax(noisy), log_softmax(noisy / T)
    raw, scaled = log_softmax(z), log_softmax(z / T)
    penalised = log_softmax(z - 1.5 * (rng.random(z.shape) < 0.3))
    allowed = np.where(rng.random(z.shape) < 0.01, z, -np.inf)
    allowed[:, 0] = z[:, 0]
    cut = truncated(raw)
    gumbel = rng.gumbel(size=z.shape)

    def pair(rollout: F64, density: F64, *, other: F64 | None = None) -> tuple[Bucket, Bucket]:
        at, token = np.arange(TOKENS), (density + gumbel).argmax(-1)
        trains = (one, hot) if other is None else (other, other)
        found = [Bucket.of(train[at, token], rollout[at, token]) for train in trains]
        return found[0], found[1]

    def bad(share: float) -> tuple[Bucket, Bucket]:
        at, token = np.arange(TOKENS), (raw + gumbel).argmax(-1)
        rollout = np.where(rng.random(TOKENS) < share, np.nan, raw[at, token])
        rollout[:3] = np.nan, -np.inf, -9999.0
        found = [Bucket.of(train[at, token], rollout) for train in (one, hot)]
        return found[0], found[1]

    return {
        "honest": pair(raw, raw),
        "sampled at T, raw": pair(raw, scaled),
        "sampled at T, scaled": pair(scaled, scaled),
        "penalised": pair(penalised, penalised),
        "masked by a grammar": pair(log_softmax(allowed), log_softmax(allowed)),
        "top-p": pair(cut, cut),
        "greedy": pair(raw, np.where(raw == raw.max(-1, keepdims=True), 1e9, -1e9)),
        "other weights": pair(raw, raw, other=log_softmax(rng.normal(size=z.shape) * 3.0)),
        "some NaN": bad(0.01),
        "all NaN": bad(1.1),
    }


def _routes(shift: int) -> dict[str, Any]:
    """The trainer's rows of 300 tokens, and the engine's, which stand ``shift`` rows off."""
    rng = np.random.default_rng(5)
    rows = rng.random((300 + shift, 4, 16)).argsort(-1)[..., :4].astype(np.uint8)
    a, b = rows[shift:], rows[:300]
    bucket = RouterBucket.of(a, b, rollout_ordered=True, train_ordered=True)
    return {"router": bucket, "shift": route_shift(a, b)}


HOT = Sampling(temperature=T)
PROCESSED: dict[str, Any] = {"mode": "processed_logprobs"}
SCALED: dict[str, Any] = {"numbers": "sampled at T, scaled", "sampling": HOT}
CACHED: dict[str, Any] = {"proof": Proof(usage_cached=40), "prefix_len": 40, "prefix_exact": True,
                          "parent": "p.0"}  # fmt: skip
SPANS = [WeightSpan(0, "6"), WeightSpan(500, VERSION)]

TEMPERATURE: Sequence[Case] = (
    Case("an honest pair", "yes", ""),
    Case(
        "temperature: declared raw, and scaled in truth",
        "no", "logprob_convention_mismatch, raw_logprobs_not_sampling_density", **SCALED,
    ),
    Case("temperature: processed, scored at T", "converted", "scored_at_temperature",
         **PROCESSED, **SCALED),
    Case("temperature: processed, not scored at T", "no", "not_scored_at_temperature",
         **PROCESSED, **SCALED, more={"at_requested": None}),
    Case("temperature: raw, compared at T = 1", "converted", "raw_logprobs_not_sampling_density",
         "sampled at T, raw", HOT),
    Case("temperature: nothing declared, and the numbers tell", "converted",
         "logprobs_mode_inferred, scored_at_temperature", mode="unknown", **SCALED),
    Case("temperature: nothing declared, a penalty, and nothing tells", "no",
         "logprobs_mode_unknown", "honest", Sampling(temperature=1.0, presence_penalty=1.0),
         "unknown"),
    Case("temperature: another one than was asked for", "no", "logodds_slope_off",
         "sampled at T, scaled"),
    Case("temperature: not sent, and the default is not known", "yes", "sampling_default_unknown",
         sampling=Sampling(top_p=1.0), engine={"settings": {}}),
    Case("temperature: not sent, processed", "converted", "sampling_default_assumed",
         sampling=Sampling(top_p=1.0), engine={"settings": {}}, **PROCESSED),
    Case("greedy", "converted", "greedy, raw_logprobs_not_sampling_density", "greedy",
         Sampling(temperature=0.0)),
    Case("logits in place of logprobs", "no", "logits_not_logprobs", mode="raw_logits"),
)  # fmt: skip
CUT: Sequence[Case] = (
    Case("top-p, processed", "no", "processed_truncation", "top-p",
         Sampling(temperature=1.0, top_p=0.9), **PROCESSED),
    Case("top-p, processed, that nobody declared", "no", "not_sampling_density", "top-p",
         **PROCESSED),
    Case("top-p, raw", "converted", "raw_logprobs_not_sampling_density", "honest",
         Sampling(temperature=1.0, top_p=0.9)),
    Case("top-p, SGLang, which scales before it cuts", "converted", "scaled_before_truncation",
         "honest", Sampling(temperature=1.0, top_p=0.9), name="sglang", **PROCESSED),
    Case("penalties, processed", "no", "processed_penalties", "penalised",
         Sampling(temperature=1.0, presence_penalty=1.5), **PROCESSED),
    Case("penalties, raw", "converted", "raw_logprobs_not_sampling_density", "honest",
         Sampling(temperature=1.0, presence_penalty=1.5)),
    Case("logit bias, processed", "no", "processed_logit_bias", "penalised",
         Sampling(temperature=1.0, logit_bias=True), **PROCESSED),
    Case("min_tokens, processed", "no", "processed_min_tokens", "honest",
         Sampling(temperature=1.0, min_tokens=9), **PROCESSED),
    Case("grammar", "no", "grammar_masked", "masked by a grammar",
         Sampling(temperature=1.0, structured="response_format=json_schema")),
    Case("beam search", "no", "beam_search",
         sampling=Sampling(temperature=1.0, beam_search=True)),
    Case("NaN, -inf and sentinels among the logprobs", "converted", "bad_logprobs", "some NaN"),
    Case("nothing but NaN", "no", "nothing_to_compare", "all NaN"),
)  # fmt: skip
SIDES: Sequence[Case] = (
    Case("speculative decoding", "yes", "speculative_decoding",
         engine={"speculative": "eagle"}),
    Case("a prefix cache older than the weights", "no", "prefix_cache_stale", meta=CACHED,
         more={"parent": Parent("p.0", 20, "6")}),
    Case("a prefix cache of the same weights", "yes", "", meta=CACHED,
         more={"parent": Parent("p.0", 20, VERSION)}),
    Case("weight lag", "converted", "weight_version_differs", meta={"weight_version": "6"}),
    Case("weights that changed within an answer", "converted", "weight_versions_mixed",
         meta={"weight_version": "6+7", "weight_spans": SPANS}),
    Case("a weight version that nobody gave", "yes", "weight_version_unknown",
         meta={"weight_version": "unknown"}),
    Case("another tokenizer", "no", "checkpoint_mismatch_suspected, tokenizer_mismatch",
         "other weights", engine={"tokenizer": "a"}, trainer={"tokenizer": "b"}),
    Case("another digest of a tokenizer, and equal numbers", "yes", "tokenizer_digest_differs",
         engine={"tokenizer": "a"}, trainer={"tokenizer": "b"}),
    Case("another template", "yes", "template_mismatch",
         engine={"chat_template": "a"}, trainer={"chat_template": "b"}),
    Case("another precision class", "converted", "precision_class_differs",
         engine={"dtype": "bfloat16"}),
    Case("FP8 weights in the engine", "converted", "precision_class_differs",
         engine={"dtype": "float32", "quantization": "fp8"}),
    Case("scored in another precision than the job trains in", "no", "scored_at_wrong_precision",
         trainer={"train_dtype": "bfloat16"}),
    Case("another checkpoint, by its digest", "no",
         "checkpoint_mismatch, checkpoint_mismatch_suspected", "other weights",
         engine={"checkpoint": "a"}, trainer={"checkpoint": "b"}),
    Case("another checkpoint, by its numbers alone", "no", "checkpoint_mismatch_suspected",
         "other weights"),
    Case("another digest of weights, and equal numbers", "yes", "checkpoint_digest_differs",
         engine={"checkpoint": "a"}, trainer={"checkpoint": "b"}),
    Case("rotary frequencies that were cast", "no", "rotary_inv_freq_cast",
         more={"findings": [reason("rotary_inv_freq_cast", "planted", "load it anew")]}),
    Case("routes one row off", "no", "routes_misaligned", more=_routes(1)),
    Case("routes in their place", "yes", "", more=_routes(0)),
    Case("a prompt that does not extend the step before", "yes", "prefix_not_exact",
         meta={"parent": "p.0", "prefix_len": 4}),
    Case("an answer without its end", "yes", "capture_partial",
         meta={"status": "partial", "missing": ["no finish_reason"]}),
)  # fmt: skip


def planted(part: str) -> Iterator[Row]:
    """What is said of every case, and the codes that no case gave."""
    numbers, seen = simulate(), set[str]()
    for case in (*TEMPERATURE, *CUT, *SIDES):
        said = _judged(case, *numbers[case.numbers])
        codes = sorted(one.code for one in said.reasons)
        seen.update(codes)
        yield exactly(
            part,
            case.what,
            _words(said.verdict, ", ".join(codes)),
            _words(case.verdict, case.codes),
        )
    few = Bucket.of(np.full(20, -1.0), np.full(20, -1.0) + 0.01)
    (told,) = _judged(Case("", "", ""), few, few).reasons
    yield exactly(part, "20 tokens: no test is passed by them", told.code, "low_power")
    missing = CODES.keys() - seen - ELSEWHERE.keys() - {"low_power"}
    named = ", ".join(sorted(missing)) or "none"
    yield exactly(part, "reasons of a comparison without a case", named, "none")


def _words(verdict: str, codes: str) -> str:
    return f"{verdict}: {codes}" if codes else verdict


def _judged(case: Case, at_one: Bucket, at_hot: Bucket) -> Comparable:
    defaults = {f"default_{name}": str(value) for name, value in NEUTRAL_DEFAULTS.items()}
    given = dict(case.engine)
    checkpoint = given.pop("checkpoint", None)
    settings = given.pop("settings", defaults) | given
    engine = msgspec.convert(
        {"name": case.name, "version": "1", "model": "m", "logprobs_mode": case.mode,
         "checkpoint": checkpoint, "settings": settings},
        Engine,
    )  # fmt: skip
    mine = dict(case.trainer)
    trainer = Trainer(
        backend="reference", model="m", dtype="float32",
        checkpoint=mine.pop("checkpoint", None), settings=mine,
    )  # fmt: skip
    meta: dict[str, Any] = {
        "trace_id": "c.0", "call_id": "c", "trajectory": "t", "step": 0, "choice": 0,
        "api": "chat", "model": "m", "attribution": "url", "engine": engine,
        "sampling": case.sampling, "streamed": False, "started_ns": 0, "ended_ns": 1,
        "weight_version": VERSION,
    }  # fmt: skip
    scored: dict[str, Any] = {
        "at_one": at_one,
        "at_requested": at_hot if case.sampling.temperature == T else None,
        "trainer_weight_version": VERSION,
    }
    return judge(TraceMeta(**(meta | case.meta)), trainer, **(scored | case.more))

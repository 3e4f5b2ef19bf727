"""Is the comparison valid at all? (METRICS 4). Asked before an engine is blamed.

One job: from a trace's facts, the trainer's facts and the sums of the comparison, a verdict with
typed reasons. Pure. The facts are checked first (what was declared), then the numbers (what the
data says): the mean importance weight, the slope of the log-odds, both temperatures, the
correlation.

With **raw** logprobs the recorded value is log softmax(logits) at T = 1, before penalties, bans
and truncation, whatever was sampled from. Trainer against engine at T = 1 is then valid for any
sampling settings, but the tokens were not drawn from that density: the mean weight test does not
apply and the KL names are weighted by another density. A **grammar** (structured output, forced
tool choice) is the exception: vLLM 0.29 masks the logits before it takes raw logprobs, so they are
renormalised over the few tokens that the grammar allows (measured: |D| of 25 to 34 nats), and no
number of such an answer accuses anybody. With **processed** logprobs the recorded
value is the sampling density, and the trainer must be put through the same transform: temperature
we can do, truncation without the mask and penalties we cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from driftgate import evidence
from driftgate.codes import CODES, SEVERITY, Severity, reason
from driftgate.evidence import mean_abs
from driftgate.facts import Parent, as_sampled, constraints, declared, unsent
from driftgate.mismatch import Bucket
from driftgate.router import RouterBucket, ShiftFinding
from driftgate.temperature import effective_temperature
from driftgate.trace import Comparable, Engine, Reason, Sampling, TraceMeta, Trainer

__all__ = [
    "CODES",
    "SEVERITY",
    "Severity",
    "asked_in_vain",
    "headline_temperature",
    "judge",
    "judge_merged",
    "judge_numbers",
]

Convention = Literal["raw", "processed", "either", "unknown"]

SOFTENED = {
    "checkpoint_mismatch": "checkpoint_digest_differs",
    "tokenizer_mismatch": "tokenizer_digest_differs",
}
"""What digests that differ are where the numbers agree."""

GREEDY_AT_ONE = ("vllm", "sglang")
"""Engines that divide by 1 where T = 0 is asked: their raw and scaled logprobs are the same."""

DUAL_T_MIN_TOKENS = 16
"""The two conventions differ by 0.3 nats a token at T = .7 and noise by 0.03: 16 tokens tell."""
DUAL_T_FACTOR = 0.5
"""One convention fits better when its mean|D| is at most half of the other's. In the simulated
signatures of METRICS 4 it is a tenth."""
DUAL_T_FLOOR = 0.01
"""nats. Below this the other convention is fine too (T close to 1, or a nearly certain text)."""


def judge(
    meta: TraceMeta,
    trainer: Trainer,
    *,
    at_one: Bucket | None,
    at_requested: Bucket | None = None,
    router: RouterBucket | None = None,
    shift: ShiftFinding | None = None,
    findings: Sequence[Reason] = (),
    trainer_weight_version: str | None = None,
    parent: Parent | None = None,
) -> Comparable:
    """The verdict on one trace.

    ``at_one``, ``at_requested``: the comparison with the trainer's logits at T = 1 and at the
    requested temperature (None when that is 1 or 0). ``shift``: from `route_shift` over all aligned
    rows. ``findings``: what the backend found about its own model; their codes must be in `CODES`
    (ValueError). ``trainer_weight_version``: of the weights that scored, where known.
    ``parent``: the trace that this one continues.
    """
    unknown = [finding.code for finding in findings if finding.code not in CODES]
    if unknown:
        raise ValueError(f"findings with codes {unknown}: add them to driftgate.codes first")
    facts = declared(meta, trainer, trainer_weight_version, parent)
    at = headline_temperature(meta.engine, meta.sampling, at_one=at_one, at_requested=at_requested)
    reasons = [*findings, *_weighed(facts, at_one if at == 1.0 else at_requested)]
    reasons += judge_numbers(
        meta.engine,
        meta.sampling,
        at_one=at_one,
        at_requested=at_requested,
        router=router,
        shift=shift,
    )
    return Comparable(verdict=_verdict(reasons), reasons=reasons)


def judge_numbers(
    engine: Engine,
    sampling: Sampling,
    *,
    at_one: Bucket | None,
    at_requested: Bucket | None = None,
    router: RouterBucket | None = None,
    shift: ShiftFinding | None = None,
) -> list[Reason]:
    """The reasons that the sampling settings and the sums give.

    Either bucket may be missing. Works on one trace or, for more power, on the merged buckets of
    traces that share their sampling settings (`judge_merged`).
    """
    known = [b for b in (at_one, at_requested) if b is not None]
    if not any(b.n_tokens for b in known):
        return [_nothing(known)]
    if sampling.structured:
        fix = "compare answers that were sampled freely; the routes of this one are comparable"
        masked = reason("grammar_masked", sampling.structured, fix)
        return [masked, *evidence.bad(known[0]), *evidence.routes(router, shift)]
    pair = _Pair.of(engine, sampling, at_one, at_requested)
    convention, reasons = _convention(pair)
    reasons += _density(pair, convention)
    settled = not any(SEVERITY[r.code] == "no" for r in reasons)
    headline = pair.headline(convention)
    if not headline.n_tokens:
        return [*reasons, _nothing(known)]
    reasons += evidence.bad(headline)
    suspected = evidence.wrong_checkpoint(known)
    reasons += suspected
    if settled and not suspected:
        reasons += evidence.tests(headline, is_density=_claims_density(pair, convention))
    return reasons + evidence.routes(router, shift)


def _nothing(known: Sequence[Bucket]) -> Reason:
    left_out = max((b.n_bad_tokens for b in known), default=0)
    fix = "look at the trace's `missing`, and at the engine's log for NaN"
    return reason("nothing_to_compare", f"0 comparable tokens, {left_out} bad", fix)


def judge_merged(
    engine: Engine,
    sampling: Sampling | None,
    *,
    temperature: float,
    headline: Bucket | None,
    at_requested: Bucket | None,
    router: RouterBucket | None,
) -> list[Reason]:
    """`judge_numbers` over the merged sums of scores that share their sampling settings.

    ``headline``: of the scores whose own verdict is not ``no``, with the trainer's logits at
    ``temperature``; None where there are none. ``sampling`` None: not known, so that only what
    holds for any sampling is tested.
    """
    if headline is None:
        return evidence.routes(router)
    if sampling is None:
        suspected = evidence.wrong_checkpoint([headline])
        tested = [] if suspected else evidence.tests(headline, is_density=False)
        return [*evidence.bad(headline), *suspected, *tested, *evidence.routes(router)]
    at_one = headline if temperature == 1.0 else None
    requested = at_requested if temperature == 1.0 else headline
    return judge_numbers(engine, sampling, at_one=at_one, at_requested=requested, router=router)


def headline_temperature(
    engine: Engine, sampling: Sampling, *, at_one: Bucket | None, at_requested: Bucket | None
) -> float:
    """The temperature of the trainer's logits that the headline numbers belong to.

    The requested one for processed logprobs (declared, or inferred where undeclared), else 1. A
    convention that is declared is kept even where the other fits better: the reasons then say so.
    """
    if at_one is None or at_requested is None:
        return 1.0
    pair = _Pair.of(engine, sampling, at_one, at_requested)
    convention, _ = _convention(pair)
    return pair.temperature if convention == "processed" else 1.0


class _Pair(NamedTuple):
    """One comparison at both temperatures, and what was asked of the engine."""

    at_one: Bucket | None
    at_requested: Bucket | None
    """At least one of the two is there."""
    sampling: Sampling
    """With the engine's defaults where nothing was sent and they are known."""
    engine: Engine
    assumed: list[str]
    """What was not sent and has no known default: taken to be neutral."""

    @classmethod
    def of(
        cls, engine: Engine, sampling: Sampling, at_one: Bucket | None, requested: Bucket | None
    ) -> _Pair:
        assumed = unsent(engine, sampling)
        return cls(at_one, requested, as_sampled(engine, sampling), engine, assumed)

    @property
    def temperature(self) -> float:
        return effective_temperature(self.sampling.temperature)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def headline(self, convention: Convention) -> Bucket:
        wanted = self.at_requested if convention == "processed" else self.at_one
        found = wanted or self.at_one or self.at_requested
        assert found is not None
        return found


def _weighed(facts: Sequence[Reason], headline: Bucket | None) -> list[Reason]:
    """``facts``; digests that differ are no reason to refuse numbers that agree: neither other
    weights nor another numbering of tokens could give them."""
    if headline is None or not evidence.same_weights(headline):
        return list(facts)
    seen = f"but mean|D| {mean_abs(headline):.2g} over {headline.n_tokens} tokens"
    fix = "nothing, where both sides hold one model in files of different layout"
    return [
        reason(SOFTENED[fact.code], f"{fact.detail}; {seen}", fix)
        if fact.code in SOFTENED
        else fact
        for fact in facts
    ]


def _verdict(reasons: Iterable[Reason]) -> Literal["yes", "converted", "no"]:
    weights = {SEVERITY[r.code] for r in reasons}
    return "no" if "no" in weights else "converted" if "converted" in weights else "yes"


def _better(fits: Bucket, other: Bucket) -> bool:
    """``fits`` clearly fits and ``other`` clearly does not."""
    enough = min(fits.n_tokens, other.n_tokens) >= DUAL_T_MIN_TOKENS
    if not enough or mean_abs(other) <= DUAL_T_FLOOR:
        return False
    return mean_abs(fits) <= DUAL_T_FACTOR * mean_abs(other)


def _convention(pair: _Pair) -> tuple[Convention, list[Reason]]:
    """Which convention the logprobs follow, declared or told by the numbers, and what is wrong."""
    mode = pair.engine.logprobs_mode
    if mode in ("raw_logits", "processed_logits"):
        fix = "start the engine with --logprobs-mode raw_logprobs or processed_logprobs"
        return "unknown", [reason("logits_not_logprobs", f"logprobs_mode is {mode}", fix)]
    dual = pair.at_requested
    if mode == "unknown":
        return _undeclared(pair)
    convention: Convention = "raw" if mode == "raw_logprobs" else "processed"
    if pair.at_one is None or dual is None or pair.greedy:
        return convention, []
    as_said, other = (pair.at_one, dual) if convention == "raw" else (dual, pair.at_one)
    if not _better(other, as_said):
        return convention, []
    t_said, t_other = (1.0, pair.temperature) if convention == "raw" else (pair.temperature, 1.0)
    detail = (
        f"declared {mode}, so T = {t_said:g}: mean|D| {mean_abs(as_said):.4g}; "
        f"but T = {t_other:g} fits: mean|D| {mean_abs(other):.4g} over {other.n_tokens} tokens"
    )
    fix = (
        "declare the engine's logprobs_mode as it is (vLLM --logprobs-mode; SGLang scales by T "
        "unless SGLANG_RETURN_ORIGINAL_LOGPROB=1), then score again"
    )
    return convention, [reason("logprob_convention_mismatch", detail, fix)]


def _undeclared(pair: _Pair) -> tuple[Convention, list[Reason]]:
    fix = "declare logprobs_mode in the gateway's engine settings"
    if pair.at_one is None:
        return "processed", []  # each of the scores that were merged was told apart by itself
    if "temperature" in pair.assumed:
        detail = "undeclared, no temperature sent, and the engine's default is not known"
        return "unknown", [reason("logprobs_mode_unknown", detail, fix)]
    at_one = pair.temperature == 1.0 or (pair.greedy and pair.engine.name in GREEDY_AT_ONE)
    if at_one and not constraints(pair.sampling):
        return "either", []
    dual = pair.at_requested
    if dual is not None and not pair.greedy:
        seen = (
            f"mean|D| {mean_abs(pair.at_one):.4g} at T = 1, "
            f"{mean_abs(dual):.4g} at T = {pair.temperature:g}, {dual.n_tokens} tokens"
        )
        if _better(pair.at_one, dual):
            return "raw", [reason("logprobs_mode_inferred", f"raw: {seen}", fix)]
        if _better(dual, pair.at_one):
            return "processed", [reason("logprobs_mode_inferred", f"processed: {seen}", fix)]
        return "unknown", [reason("logprobs_mode_unknown", f"cannot be told: {seen}", fix)]
    asked = ", ".join(_asked(pair))
    return "unknown", [reason("logprobs_mode_unknown", f"undeclared, with {asked}", fix)]


def asked_in_vain(engine: Engine, sampling: Sampling) -> list[str]:
    """Codes of severity ``no`` that what was asked gives alone, whatever a trainer says."""
    asked = as_sampled(engine, sampling)
    codes = ["grammar_masked"] if asked.structured else []
    codes += ["beam_search"] if asked.beam_search else []
    if engine.logprobs_mode == "processed_logprobs":
        codes += _processed(engine, asked)
    return [code for code in codes if SEVERITY[code] == "no"]


def _processed(engine: Engine, sampling: Sampling) -> dict[str, list[str]]:
    """`constraints` by the code that they have on processed logprobs; SGLang truncates later."""
    later = {"processed_truncation": "scaled_before_truncation"} if engine.name == "sglang" else {}
    return {later.get(code, code): what for code, what in constraints(sampling).items()}


def _asked(pair: _Pair) -> list[str]:
    """In words, everything that makes the sampling density differ from softmax at T = 1."""
    heat = [] if pair.temperature == 1.0 else [f"temperature={pair.temperature:g}"]
    return heat + [word for words in constraints(pair.sampling).values() for word in words]


def _density(pair: _Pair, convention: Convention) -> list[Reason]:
    """What the recorded logprobs are the density of, and what that permits."""
    out = []
    if pair.sampling.beam_search:
        out.append(reason("beam_search", "use_beam_search", "sample instead, with n"))
    if pair.greedy:
        out.append(reason("greedy", "temperature=0", "read |D| and p99, not the KL names"))
    asked = _asked(pair)
    if convention == "raw" and asked:
        detail = f"{', '.join(asked)}; drift is measured at T = 1"
        fix = "nothing, or --logprobs-mode processed_logprobs to see the sampling density"
        out.append(reason("raw_logprobs_not_sampling_density", detail, fix))
    if convention == "processed":
        fix = "sample without it, or start the engine with --logprobs-mode raw_logprobs"
        for code, what in _processed(pair.engine, pair.sampling).items():
            out.append(reason(code, ", ".join(what), fix))
        if pair.at_requested is not None:
            detail = f"T = {pair.temperature:g} on both sides"
            out.append(reason("scored_at_temperature", detail, "nothing"))
        elif pair.temperature not in (0.0, 1.0):
            detail = f"T = {pair.temperature:g} in the engine, 1 in the trainer"
            fix = "score again with a teacher of this version"
            out.append(reason("not_scored_at_temperature", detail, fix))
    return out + _assumed(pair, convention)


def _assumed(pair: _Pair, convention: Convention) -> list[Reason]:
    """What rests on settings that nobody sent."""
    if not pair.assumed or convention == "unknown":
        return []
    detail = f"not sent, and no default known: {', '.join(pair.assumed)}"
    fix = (
        "send them, or declare default_temperature, default_top_p and so on in the gateway's "
        "engine settings: engines take them from generation_config.json"
    )
    if convention != "raw":
        return [reason("sampling_default_assumed", detail, fix)]
    blind = "temperature" in pair.assumed
    return [reason("sampling_default_unknown", detail, fix)] if blind else []


def _claims_density(pair: _Pair, convention: Convention) -> bool:
    """The recorded logprobs should be the sampling density, so that E[e^D] = 1."""
    if pair.greedy or pair.sampling.beam_search or constraints(pair.sampling):
        return False
    if convention == "raw":
        return pair.temperature == 1.0 and "temperature" not in pair.assumed
    return pair.temperature == 1.0 or convention == "processed"

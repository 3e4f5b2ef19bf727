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

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from driftgate.codes import CODES, SEVERITY, Severity, reason
from driftgate.facts import constraints, declared
from driftgate.mismatch import Bucket
from driftgate.router import RouterBucket, ShiftFinding, random_zero_overlap
from driftgate.trace import Comparable, Engine, Reason, Sampling, TraceMeta, Trainer

__all__ = ["CODES", "SEVERITY", "Severity", "headline_temperature", "judge", "judge_numbers"]

Convention = Literal["raw", "processed", "either", "unknown"]

DUAL_T_MIN_TOKENS = 16
"""The two conventions differ by 0.3 nats a token at T = .7 and noise by 0.03: 16 tokens tell."""
DUAL_T_FACTOR = 0.5
"""One convention fits better when its mean|D| is at most half of the other's. In the simulated
signatures of METRICS 4 it is a tenth."""
DUAL_T_FLOOR = 0.01
"""nats. Below this the other convention is fine too (T close to 1, or a nearly certain text)."""
TEST_MIN_TOKENS = 200
"""Tokens for the mean weight and slope tests: the standard error itself is then known to 5 %."""
MEAN_WEIGHT_Z = 4.0
"""z of the mean weight test: 6e-5 false alarms per test under normality, and it runs on every
cell."""
MEAN_WEIGHT_MIN_EFFECT = 0.005
"""A mean weight this close to 1 passes however small its error: logprobs from a bf16 softmax sum to
1 only to about 2^-8."""
MEAN_WEIGHT_MIN_ESS = 0.5
"""Below this token ESS the sample lacks the rare heavy tokens: the mean is low and its error too
small, also for a valid pair, so the test would accuse everybody with a wrong checkpoint twice."""
SLOPE_TOLERANCE = 0.1
"""T = .7 gives .70-.82 (or 1.2-1.43) depending on how mixed the text is; precision alone stays
within .02 in every simulated pairing."""
SLOPE_Z = 5.0
SLOPE_MIN_CORRELATION = 0.9
"""Temperature scales log-odds and keeps them correlated (.97 and more); other weights do not."""
CHECKPOINT_MIN_TOKENS = 32
CHECKPOINT_MEAN_ABS = 0.5
"""nats, at both temperatures. Five times the red band (.1); a temperature error of T = .7 gives
.2-.6 but keeps its correlation, FP8 and policy lag stay below .1."""
CHECKPOINT_CORRELATION = 0.5
"""Pearson r of the log-odds. Same weights at another temperature or precision: > .9. Independent
weights on the same text: about 0 for random models, .3 for unrelated language models. A sibling
checkpoint (long lag) is above this: it is red drift, not a wrong checkpoint."""
ROUTES_MIN_CELLS = 64
ROUTES_ALARM = 0.5
"""Zero-overlap alarm: this share of what unrelated rows would give. Right rows give nearly none."""


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
) -> Comparable:
    """The verdict on one trace.

    ``at_one``, ``at_requested``: the comparison with the trainer's logits at T = 1 and at the
    requested temperature (None when that is 1 or 0). ``shift``: from `route_shift` over all aligned
    rows. ``findings``: what the backend found about its own model; their codes must be in `CODES`
    (ValueError). ``trainer_weight_version``: of the weights that scored, where known.
    """
    unknown = [finding.code for finding in findings if finding.code not in CODES]
    if unknown:
        raise ValueError(f"findings with codes {unknown}: add them to driftgate.codes first")
    reasons = [*findings, *declared(meta, trainer, trainer_weight_version)]
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

    Works on one trace or, for more power, on the merged buckets of a cell whose traces share their
    sampling settings.
    """
    if at_one is None or not at_one.n_tokens:
        bad = at_one.n_bad_tokens if at_one else 0
        return [
            reason(
                "nothing_to_compare",
                f"0 comparable tokens, {bad} bad",
                "look at the trace's `missing`, and at the engine's log for NaN",
            )
        ]
    if sampling.structured:
        fix = "compare answers that were sampled freely; the routes of this one are comparable"
        masked = reason("grammar_masked", sampling.structured, fix)
        return [masked, *_bad(at_one), *_routes(router, shift)]
    pair = _Pair(at_one, at_requested, sampling, engine)
    convention, reasons = _convention(pair)
    reasons += _density(pair, convention)
    settled = not any(SEVERITY[r.code] == "no" for r in reasons)
    headline = pair.headline(convention)
    reasons += _bad(headline)
    suspected = _checkpoint(pair)
    reasons += suspected
    if settled and not suspected:
        reasons += _tests(headline, is_density=_claims_density(pair, convention))
    return reasons + _routes(router, shift)


def headline_temperature(
    engine: Engine, sampling: Sampling, *, at_one: Bucket | None, at_requested: Bucket | None
) -> float:
    """The temperature of the trainer's logits that the headline numbers belong to.

    The requested one for processed logprobs (declared, or inferred where undeclared), else 1. A
    convention that is declared is kept even where the other fits better: the reasons then say so.
    """
    if at_one is None or at_requested is None:
        return 1.0
    pair = _Pair(at_one, at_requested, sampling, engine)
    convention, _ = _convention(pair)
    return pair.temperature if convention == "processed" else 1.0


class _Pair(NamedTuple):
    """One comparison at both temperatures, and what was asked of the engine."""

    at_one: Bucket
    at_requested: Bucket | None
    sampling: Sampling
    engine: Engine

    @property
    def temperature(self) -> float:
        return 1.0 if self.sampling.temperature is None else self.sampling.temperature

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def headline(self, convention: Convention) -> Bucket:
        requested = self.at_requested
        return requested if convention == "processed" and requested is not None else self.at_one


def _verdict(reasons: Iterable[Reason]) -> Literal["yes", "converted", "no"]:
    weights = {SEVERITY[r.code] for r in reasons}
    return "no" if "no" in weights else "converted" if "converted" in weights else "yes"


def _mean_abs(bucket: Bucket) -> float:
    return bucket.sum_abs / bucket.n_tokens


def _better(fits: Bucket, other: Bucket) -> bool:
    """``fits`` clearly fits and ``other`` clearly does not."""
    enough = min(fits.n_tokens, other.n_tokens) >= DUAL_T_MIN_TOKENS
    if not enough or _mean_abs(other) <= DUAL_T_FLOOR:
        return False
    return _mean_abs(fits) <= DUAL_T_FACTOR * _mean_abs(other)


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
    if dual is None or pair.greedy:
        return convention, []
    as_said, other = (pair.at_one, dual) if convention == "raw" else (dual, pair.at_one)
    if not _better(other, as_said):
        return convention, []
    t_said, t_other = (1.0, pair.temperature) if convention == "raw" else (pair.temperature, 1.0)
    detail = (
        f"declared {mode}, so T = {t_said:g}: mean|D| {_mean_abs(as_said):.4g}; "
        f"but T = {t_other:g} fits: mean|D| {_mean_abs(other):.4g} over {other.n_tokens} tokens"
    )
    fix = (
        "declare the engine's logprobs_mode as it is (vLLM --logprobs-mode; SGLang scales by T "
        "unless SGLANG_RETURN_ORIGINAL_LOGPROB=1), then score again"
    )
    return convention, [reason("logprob_convention_mismatch", detail, fix)]


def _undeclared(pair: _Pair) -> tuple[Convention, list[Reason]]:
    constrained = constraints(pair.sampling)
    if pair.temperature == 1.0 and not constrained:
        return "either", []
    fix = "declare logprobs_mode in the gateway's engine settings"
    dual = pair.at_requested
    if dual is not None and not pair.greedy:
        seen = (
            f"mean|D| {_mean_abs(pair.at_one):.4g} at T = 1, "
            f"{_mean_abs(dual):.4g} at T = {pair.temperature:g}, {dual.n_tokens} tokens"
        )
        if _better(pair.at_one, dual):
            return "raw", [reason("logprobs_mode_inferred", f"raw: {seen}", fix)]
        if _better(dual, pair.at_one):
            return "processed", [reason("logprobs_mode_inferred", f"processed: {seen}", fix)]
        return "unknown", [reason("logprobs_mode_unknown", f"cannot be told: {seen}", fix)]
    asked = ", ".join(_asked(pair))
    return "unknown", [reason("logprobs_mode_unknown", f"undeclared, with {asked}", fix)]


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
        for code, what in constraints(pair.sampling).items():
            cut_later = code == "processed_truncation" and pair.engine.name == "sglang"
            code = "scaled_before_truncation" if cut_later else code
            out.append(reason(code, ", ".join(what), fix))
        if pair.at_requested is not None:
            detail = f"T = {pair.temperature:g} on both sides"
            out.append(reason("scored_at_temperature", detail, "nothing"))
    if convention != "raw" and pair.sampling.temperature is None:
        fix = "send a temperature: vLLM takes its default from generation_config.json"
        out.append(reason("sampling_default_assumed", "temperature not sent", fix))
    return out


def _claims_density(pair: _Pair, convention: Convention) -> bool:
    """The recorded logprobs should be the sampling density, so that E[e^D] = 1."""
    if pair.greedy or pair.sampling.beam_search or constraints(pair.sampling):
        return False
    return pair.temperature == 1.0 or convention == "processed"


def _bad(bucket: Bucket) -> list[Reason]:
    if not bucket.n_bad_tokens:
        return []
    detail = f"{bucket.n_bad_tokens} of {bucket.n_bad_tokens + bucket.n_tokens} tokens left out"
    fix = "look for NaN in the engine's or the trainer's logits; -9999 is a token of probability 0"
    return [reason("bad_logprobs", detail, fix)]


def _checkpoint(pair: _Pair) -> list[Reason]:
    """Huge drift at either temperature, and log-odds that do not go together."""
    both = [b for b in (pair.at_one, pair.at_requested) if b is not None]
    if min(b.logits.n for b in both) < CHECKPOINT_MIN_TOKENS:
        return []
    drift = min(_mean_abs(b) for b in both)
    known = [r for b in both if (r := b.logits.correlation()) is not None]
    if drift < CHECKPOINT_MEAN_ABS or not known or max(known) >= CHECKPOINT_CORRELATION:
        return []
    detail = (
        f"mean|D| {drift:.3g} nats and log-odds correlation {max(known):.2f} "
        f"over {both[0].n_tokens} tokens"
    )
    fix = "compare the checkpoint the engine serves with the trainer's, also tokenizer and LoRA"
    return [reason("checkpoint_mismatch_suspected", detail, fix)]


def _tests(bucket: Bucket, *, is_density: bool) -> list[Reason]:
    """The slope of the log-odds, and the mean weight where it must be 1."""
    out, power = [], []
    if bucket.logits.n < TEST_MIN_TOKENS:
        power.append(f"slope: {bucket.logits.n} uncertain tokens of {TEST_MIN_TOKENS}")
    else:
        out += _slope(bucket)
    if is_density:
        ess = bucket.metrics()["ess_kish_token"]
        if bucket.n_tokens < TEST_MIN_TOKENS:
            power.append(f"mean weight: {bucket.n_tokens} tokens of {TEST_MIN_TOKENS}")
        elif ess is None or ess < MEAN_WEIGHT_MIN_ESS:
            power.append(f"mean weight: token ESS {ess or 0.0:.2g} below {MEAN_WEIGHT_MIN_ESS}")
        else:
            out += _mean_weight(bucket)
    if power:
        fix = "read the cell's merged numbers, or score more tokens"
        out.append(reason("low_power", "; ".join(power), fix))
    return out


def _slope(bucket: Bucket) -> list[Reason]:
    slope, error = bucket.logits.slope(), bucket.logits.slope_se()
    correlation = bucket.logits.correlation()
    if slope is None or error is None or correlation is None:
        return []
    off = abs(slope - 1.0)
    if off <= max(SLOPE_TOLERANCE, SLOPE_Z * error) or correlation < SLOPE_MIN_CORRELATION:
        return []
    detail = f"slope {slope:.3f} +- {error:.3f}, correlation {correlation:.3f}"
    fix = (
        "the two sides are at different temperatures: check the engine's default sampling "
        "parameters and its logprobs_mode"
    )
    return [reason("logodds_slope_off", detail, fix)]


def _mean_weight(bucket: Bucket) -> list[Reason]:
    values = bucket.metrics()
    mean, error = values["mean_weight_token"], values["mean_weight_token_se"]
    if mean is None or error is None:
        return []
    off = mean - 1.0
    if abs(off) <= max(MEAN_WEIGHT_MIN_EFFECT, MEAN_WEIGHT_Z * error):
        return []
    z = off / error if error else math.copysign(math.inf, off)
    detail = f"mean e^D - 1 = {off:+.4f} +- {error:.4f} (z = {z:.1f}) over {bucket.n_tokens} tokens"
    fix = "the engine sampled from another density: look for top-p, penalties, another temperature"
    return [reason("not_sampling_density", detail, fix)]


def _routes(router: RouterBucket | None, shift: ShiftFinding | None) -> list[Reason]:
    fix = "compare rows [P-1 : P+R-1] of both sides, and their layer numbers"
    if shift is not None:
        detail = (
            f"rows are off by {shift.shift:+d}: {shift.miss_rate_unshifted:.1%} of experts "
            f"missed as they stand, {shift.miss_rate_shifted:.1%} when shifted; zero overlap "
            f"{shift.zero_overlap_rate:.1%} (unrelated rows: {shift.zero_overlap_random:.1%})"
        )
        return [reason("routes_misaligned", detail, fix)]
    if router is None or router.n_cells < ROUTES_MIN_CELLS:
        return []
    rate = sum(counts[0] for counts in router.shared) / router.n_cells
    unrelated = random_zero_overlap(router.max_expert + 1, router.k)
    if not unrelated or rate < ROUTES_ALARM * unrelated:
        return []
    detail = (
        f"zero overlap {rate:.1%} of {router.n_cells} cells; unrelated rows give {unrelated:.1%}"
    )
    return [reason("routes_misaligned", detail, fix)]

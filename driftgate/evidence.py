"""What the sums of a comparison give away by themselves, whatever was declared (METRICS 4).

Each function is one test: sums in, reasons out, empty where the test passes or cannot be applied.
They work on one answer and, with more power, on the merged sums of many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from driftgate.bands import BANDS
from driftgate.codes import reason
from driftgate.mismatch import Bucket
from driftgate.router import RouterBucket, ShiftFinding, random_zero_overlap
from driftgate.sums import CoMoments
from driftgate.trace import Reason

__all__ = ["bad", "mean_abs", "routes", "same_weights", "slope_is_off", "tests", "wrong_checkpoint"]

TEST_MIN_TOKENS = 200
"""Tokens for the mean weight and slope tests: the standard error itself is then known to 5 %."""
MEAN_WEIGHT_Z = 4.0
"""z of the mean weight test: 6e-5 false alarms per test under normality, and it runs on every cell
and every long answer. With `MEAN_WEIGHT_SHORT_K3` there was one in 65,000 valid samples of 200 to
5,000 tokens, normal and heavy-tailed; without, there were up to 10 % in the heavy-tailed ones."""
MEAN_WEIGHT_SHORT_K3 = 1.5
"""k3 that a mean weight below 1 must be short by. What a sample of heavy-tailed drift lacks are its
rare large weights: its mean is low and its error too small, and neither its ESS nor its skewness
shows what is not there; its k3 does. Valid samples beyond `MEAN_WEIGHT_Z` were short by .3 to 1.4
k3; a density cut by top-p is short by 9 k3 (.8) to 36 (.98)."""
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
SAME_MEAN_ABS = BANDS["abs_log_ratio_mean"].green
"""nats. Drift that is green cannot come from unrelated weights."""
ROUTES_MIN_CELLS = 64
ROUTES_ALARM = 0.5
"""Zero-overlap alarm: this share of what unrelated rows would give. Right rows give nearly none."""


def mean_abs(bucket: Bucket) -> float:
    """mean|D|, nats; infinite without a token."""
    return bucket.sum_abs / bucket.n_tokens if bucket.n_tokens else math.inf


def bad(bucket: Bucket) -> list[Reason]:
    """Tokens that were left out."""
    if not bucket.n_bad_tokens:
        return []
    detail = f"{bucket.n_bad_tokens} of {bucket.n_bad_tokens + bucket.n_tokens} tokens left out"
    fix = "look for NaN in the engine's or the trainer's logits; -9999 is a token of probability 0"
    return [reason("bad_logprobs", detail, fix)]


def wrong_checkpoint(both: Sequence[Bucket]) -> list[Reason]:
    """Huge drift at every temperature, and log-odds that do not go together.

    ``both``: the same tokens, with the trainer's logits at each temperature that is known.
    """
    if min(b.logits.n for b in both) < CHECKPOINT_MIN_TOKENS:
        return []
    drift = min(mean_abs(b) for b in both)
    known = [r for b in both if (r := b.logits.correlation()) is not None]
    if drift < CHECKPOINT_MEAN_ABS or not known or max(known) >= CHECKPOINT_CORRELATION:
        return []
    detail = (
        f"mean|D| {drift:.3g} nats and log-odds correlation {max(known):.2f} "
        f"over {both[0].n_tokens} tokens"
    )
    fix = "compare the checkpoint the engine serves with the trainer's, also tokenizer and LoRA"
    return [reason("checkpoint_mismatch_suspected", detail, fix)]


def same_weights(bucket: Bucket) -> bool:
    """The numbers leave no room for other weights, whatever the two digests say."""
    return bucket.logits.n >= CHECKPOINT_MIN_TOKENS and mean_abs(bucket) < SAME_MEAN_ABS


def tests(bucket: Bucket, *, is_density: bool) -> list[Reason]:
    """The slope of the log-odds, and the mean weight where it must be 1."""
    out, power = [], []
    if bucket.logits.n < TEST_MIN_TOKENS:
        power.append(f"slope: {bucket.logits.n} uncertain tokens of {TEST_MIN_TOKENS}")
    else:
        out += _slope(bucket)
    if is_density:
        out += _mean_weight(bucket, power)
    if power:
        fix = "score more tokens; the verdict of the whole cell rests on all of them"
        out.append(reason("low_power", "; ".join(power), fix))
    return out


def slope_is_off(logits: CoMoments) -> bool:
    """The two sides' log-odds are proportional, and one is scaled.

    Noise on the engine's side flattens the slope to correlation^2, noise on the trainer's leaves
    it: the true one is between the two regressions (Frisch 1934), and both must be off.
    """
    slope, error, correlation = logits.slope(), logits.slope_se(), logits.correlation()
    if logits.n < TEST_MIN_TOKENS or slope is None or error is None or correlation is None:
        return False
    if correlation < SLOPE_MIN_CORRELATION:
        return False
    tolerance = max(SLOPE_TOLERANCE, SLOPE_Z * error)
    return slope - 1.0 > tolerance or 1.0 - slope / correlation**2 > tolerance


def _slope(bucket: Bucket) -> list[Reason]:
    if not slope_is_off(bucket.logits):
        return []
    slope, error = bucket.logits.slope(), bucket.logits.slope_se()
    detail = f"slope {slope:.3f} +- {error:.3f}, correlation {bucket.logits.correlation():.3f}"
    fix = (
        "the two sides are at different temperatures: check the engine's default sampling "
        "parameters and its logprobs_mode"
    )
    return [reason("logodds_slope_off", detail, fix)]


def _mean_weight(bucket: Bucket, power: list[str]) -> list[Reason]:
    """``power`` takes what kept the test from being applied."""
    values = bucket.metrics()
    mean, error, k3 = (
        values[name]
        for name in ("mean_weight_token", "mean_weight_token_se", "kl_k3_rollout_train")
    )
    ess = values["ess_kish_token"]
    if bucket.n_tokens < TEST_MIN_TOKENS:
        power.append(f"mean weight: {bucket.n_tokens} tokens of {TEST_MIN_TOKENS}")
        return []
    if ess is None or ess < MEAN_WEIGHT_MIN_ESS:
        power.append(f"mean weight: token ESS {ess or 0.0:.2g} below {MEAN_WEIGHT_MIN_ESS}")
        return []
    if mean is None or error is None or k3 is None:
        return []
    off = mean - 1.0
    if abs(off) <= max(MEAN_WEIGHT_MIN_EFFECT, MEAN_WEIGHT_Z * error):
        return []
    if off < 0.0 and -off <= MEAN_WEIGHT_SHORT_K3 * k3:
        power.append(f"mean weight: {off:+.2g}, which drift of k3 {k3:.2g} leaves a sample short")
        return []
    z = off / error if error else math.copysign(math.inf, off)
    detail = f"mean e^D - 1 = {off:+.4f} +- {error:.4f} (z = {z:.1f}) over {bucket.n_tokens} tokens"
    fix = "the engine sampled from another density: look for top-p, penalties, another temperature"
    return [reason("not_sampling_density", detail, fix)]


def routes(router: RouterBucket | None, shift: ShiftFinding | None = None) -> list[Reason]:
    """Rows of the two sides that are not of the same tokens, or not of the same layers."""
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

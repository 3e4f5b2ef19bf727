"""Each possible cause of drift as one test: undo it, and see how much drift falls away. Pure.

A test takes the log ratios as they stand, after the causes before it were undone, and gives them
as they would be without its own cause, with its evidence. It never adds drift: where undoing a
cause does not lower the sum of |D|, it is not the cause. `driftgate.explain` runs them in order,
so that the shares telescope to 1.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from driftgate.bands import BANDS
from driftgate.baseline import (
    BASELINE_MIN_TOKENS,
    Evidence,
    Floor,
    Run,
    excess,
    is_sharp,
    mean_abs,
)
from driftgate.comparable import DUAL_T_FACTOR, DUAL_T_FLOOR, DUAL_T_MIN_TOKENS
from driftgate.evidence import TEST_MIN_TOKENS, slope_is_off
from driftgate.mismatch import LOGIT_EDGE, Bucket, good_tokens
from driftgate.sums import CoMoments
from driftgate.words import listed

__all__ = ["CAUSES", "Floor", "Found", "Run", "Undone"]

F64 = npt.NDArray[np.float64]

Found = Literal["measured", "inferred", "suspected", "absent", "untested"]
"""``measured``: undone by a second set of numbers, or against a baseline. ``inferred``: by the
shape of the numbers alone. ``suspected``: there is a sign of it, but nothing to measure its share
with, which stays unexplained. ``absent``: tested, and not there. ``untested``: what the test needs
is not stored."""

MAX_BOUNDARIES = 64
"""Steps that are tried as the place of a jump, evenly over the run: each looks at every token."""
CORE_SIGMAS = 4.0
"""Robust standard deviations that symmetric rounding noise stays within."""
SYMMETRY_Z = 4.0
"""z of mean D up to which noise counts as symmetric."""
PRECISION_MAX_SIGMA = 1.5 * BANDS["abs_log_ratio_mean"].red
"""nats. FP8 stays below the red band's mean|D| of .1 (a sigma of .125); wider noise is not
rounding."""
CONVENTION_CODES = (
    "logprob_convention_mismatch",
    "logprobs_mode_unknown",
    "not_sampling_density",
    "grammar_masked",
    "processed_truncation",
    "processed_penalties",
    "processed_logit_bias",
    "processed_min_tokens",
    "logits_not_logprobs",
    "not_scored_at_temperature",
)


class Undone(NamedTuple):
    """What a test found."""

    d: F64 | None
    """[n] nats, the log ratios without this cause; None where nothing was undone."""
    found: Found
    detail: str
    evidence: Evidence
    fix: str


def transform(run: Run, d: F64) -> Undone:
    """Another temperature: by the trainer's second temperature, else by the slope of log-odds."""
    buckets = [Bucket.of(r.train, r.rollout) for r in run.responses]
    whole = buckets[0]
    for bucket in buckets[1:]:
        whole = whole.merge(bucket)
    values = whole.metrics()
    evidence: Evidence = {
        "logodds_slope": values["logodds_slope"],
        "logodds_slope_se": whole.logits.slope_se(),
        "logodds_correlation": whole.logits.correlation(),
        "mean_weight_token": values["mean_weight_token"],
        "mean_weight_token_se": values["mean_weight_token_se"],
    }
    fix = (
        "declare the engine's logprobs_mode and default sampling as they are (SGLang scales by T "
        "unless told otherwise), then score again"
    )
    both = run.where([r.other is not None for r in run.responses])
    if int(both.sum()) >= DUAL_T_MIN_TOKENS:
        other = run.of(r.d if r.other is None else r.other - r.rollout for r in run.responses)
        here, there = mean_abs(d[both]), mean_abs(other[both])
        evidence |= {"abs_log_ratio_mean_here": here, "abs_log_ratio_mean_other_T": there}
        if here > DUAL_T_FLOOR and there <= DUAL_T_FACTOR * here:
            detail = f"mean|D| {here:.3g} falls to {there:.3g} with the logits at the other T"
            return Undone(other, "measured", detail, evidence, fix)
    if slope_is_off(whole.logits):
        detail = f"log-odds slope {whole.logits.slope():.3f}, not 1: one side is scaled"
        return Undone(_calibrated(run, whole.logits), "inferred", detail, evidence, fix)
    if signs := sorted(run.codes() & set(CONVENTION_CODES)):
        return Undone(None, "suspected", ", ".join(signs), evidence, fix)
    tested = whole.logits.n >= TEST_MIN_TOKENS or int(both.sum()) >= DUAL_T_MIN_TOKENS
    if not tested:
        detail = f"{whole.logits.n} uncertain tokens of {TEST_MIN_TOKENS}, and one temperature"
        return Undone(None, "untested", detail, evidence, "score more tokens")
    return Undone(None, "absent", "both sides are at one temperature", evidence, "nothing")


def _calibrated(run: Run, logits: CoMoments) -> F64:
    """Log ratios against the engine's log-odds moved onto the fitted line."""
    slope = logits.slope()
    assert slope is not None
    out = []
    for r in run.responses:
        inside = r.rollout < math.log1p(-LOGIT_EDGE)
        x = r.rollout[inside]
        line = logits.mean_y + slope * (x - np.log(-np.expm1(x)) - logits.mean_x)
        moved = r.rollout.copy()
        moved[inside] = -np.logaddexp(0.0, -line)
        out.append(r.train - moved)
    return run.of(out)


def _broken_prefix(run: Run) -> list[bool]:
    return [r.trace.parent is not None and not r.trace.prefix_exact for r in run.responses]


def template(run: Run, d: F64) -> Undone:
    """Steps whose prompt does not extend the tokens before it, against the other steps."""
    broken = _broken_prefix(run)
    signs = sorted(run.codes() & {"tokenizer_mismatch", "template_mismatch"})
    fix = (
        "keep reasoning and tool calls verbatim in the history, and take tokenizer and template "
        "from one folder"
    )
    evidence: Evidence = {"responses_with_broken_prefix": sum(broken), "codes": ", ".join(signs)}
    if not any(broken):
        if signs:
            return Undone(None, "suspected", ", ".join(signs), evidence, fix)
        return Undone(None, "absent", "every prompt extends the tokens before", evidence, "nothing")
    group = run.where(broken)
    found = excess(run, d, group, ~group)
    evidence |= found.evidence
    if found.d is not None:
        steps = sorted({r.trace.step for r, b in zip(run.responses, broken, strict=True) if b})
        detail = f"drift is higher where the prefix breaks, steps {listed(steps)}"
        return Undone(found.d, "measured", detail, evidence, fix)
    if evidence["baseline"] is None:
        few = evidence["other_tokens"]
        detail = f"prefixes break; {few} tokens of other steps are too few to compare with"
        return Undone(None, "suspected", detail, evidence, fix)
    detail = "prefixes break, but those steps drift no more than the others"
    return Undone(None, "absent", detail, evidence, "nothing")


def stale_weights(run: Run, d: F64) -> Undone:
    """Tokens of another weight version than the one that scored; else a jump between two steps."""
    pairs = [(r.trace.weight_version, r.score.trainer_weight_version) for r in run.responses]
    lagging = [b is not None and "unknown" not in (a, b) and a != b for a, b in pairs]
    clean = [
        not lag and not broken for lag, broken in zip(lagging, _broken_prefix(run), strict=True)
    ]
    evidence: Evidence = {
        "sampled_under": listed(sorted({a for a, _ in pairs})),
        "scored_under": listed(sorted({b or "unknown" for _, b in pairs})),
    }
    fix = "sample and score under one version; reset the prefix cache when weights change"
    if any(lagging):
        found = excess(run, d, run.where(lagging), run.where(clean))
        evidence |= found.evidence
        if found.d is not None:
            detail = "drift is higher where the tokens are of another weight version"
            return Undone(found.d, "measured", detail, evidence, fix)
        if evidence["baseline"] is None:
            few = evidence["other_tokens"]
            detail = (
                f"tokens are of another weight version; {few} others are too few to compare with"
            )
            return Undone(None, "suspected", detail, evidence, fix)
    jump = _jump(run, d)
    if jump is not None:
        undone, more = jump
        detail = f"drift jumps at step {more['jump_at_step']}: weights or cache changed there"
        if any("unknown" in (a, b or "unknown") or a != b for a, b in pairs):
            return Undone(undone, "inferred", detail, evidence | more, fix)
        detail = f"drift jumps at step {more['jump_at_step']}, under one version: a stale cache?"
        return Undone(None, "suspected", detail, evidence | more, fix)
    if "prefix_cache_stale" in run.codes():
        return Undone(None, "suspected", "prefix_cache_stale", evidence, fix)
    if any(lagging):
        return Undone(None, "absent", "versions differ, without more drift", evidence, "nothing")
    if all("unknown" in (a, b or "unknown") for a, b in pairs):
        detail = "weight versions are not known, and drift does not jump between steps"
        return Undone(None, "untested", detail, evidence, "pass the policy version to both sides")
    return Undone(None, "absent", "one version, and no jump between steps", evidence, "nothing")


def _jump(run: Run, d: F64) -> tuple[F64, Evidence] | None:
    """The step boundary with the clearest change of mean|D|, the worse side scaled to the other."""
    best: tuple[float, F64, Evidence] | None = None
    steps = np.array([r.trace.step for r in run.responses])[run.at]
    boundaries = np.unique(steps)[1:]
    thinned = np.linspace(0, boundaries.size - 1, min(boundaries.size, MAX_BOUNDARIES))
    for step in boundaries[thinned.astype(np.intp)]:
        after = steps >= step
        rises = mean_abs(d[after]) > mean_abs(d[~after])
        worse = after if rises else ~after
        found = excess(run, d, worse, ~worse, floor=False)
        z = found.evidence.get("z")
        if found.d is None:
            continue
        score = z if isinstance(z, float) else math.inf
        if best is None or score > best[0]:
            more: Evidence = {"jump_at_step": int(step), "jump": "up" if rises else "down"}
            best = (score, found.d, found.evidence | more)
    if best is None or not is_sharp(run, d, steps >= best[2]["jump_at_step"]):
        return None
    return best[1], best[2]


def routing(run: Run, d: F64) -> Undone:
    """The trainer's numbers under the rollout's routes, where they are stored."""
    routers = [r.score.router for r in run.responses if r.score.router is not None]
    disagree: float | None = None
    if routers:
        whole = routers[0]
        for router in routers[1:]:
            whole = whole.merge(router)
        rate = whole.metrics()["router_set_disagree_rate"]
        disagree = float(rate) if isinstance(rate, (int, float)) else None
    evidence: Evidence = {"router_set_disagree_rate": disagree}
    given = [
        np.zeros(r.index.size, np.bool_)
        if r.replayed is None
        else good_tokens(r.replayed, r.rollout, None)[0]
        for r in run.responses
    ]
    chosen = np.concatenate(given)
    fix = "train under the rollout's routes (routing replay, R3)"
    if chosen.any():
        effect = run.of(
            np.zeros(good.size) if r.replayed is None else np.where(good, r.train - r.replayed, 0.0)
            for r, good in zip(run.responses, given, strict=True)
        )
        raw = np.abs(run.d)
        # of what is left of each token after the causes before
        effect *= np.minimum(1.0, np.abs(d) / np.where(raw > 0.0, raw, 1.0))
        evidence |= {
            "tokens_replayed": int(chosen.sum()),
            "abs_log_ratio_mean": mean_abs(d[chosen]),
            "abs_log_ratio_mean_replay": mean_abs((d - effect)[chosen]),
        }
        return Undone(d - effect, "measured", "scored under the rollout's routes", evidence, fix)
    if disagree is None:
        reason = next((r.score.router_reason for r in run.responses if r.score.router_reason), None)
        known = reason == "the trainer's model has no routers"
        detail = reason or "no routes are stored"
        return Undone(None, "absent" if known else "untested", detail, evidence, "nothing")
    detail = f"{disagree:.1%} of (token, layer) choose other experts; nothing was replayed"
    limit = BANDS["router_set_disagree_rate"].green
    found: Found = "suspected" if disagree >= limit else "untested"
    return Undone(None, found, detail, evidence, "score with routing replay to measure its share")


def precision(run: Run, d: F64) -> Undone:
    """Noise as large as a side has against itself; else symmetric noise where precisions differ."""
    differs = bool(run.codes() & {"precision_class_differs", "scored_at_wrong_precision"})
    error = float(d.std(ddof=1)) / math.sqrt(d.size) if d.size > 1 else 0.0
    z = float(d.mean()) / error if error else None
    sigma = 1.4826 * float(np.median(np.abs(d - np.median(d))))
    evidence: Evidence = {
        "remaining_abs_log_ratio_mean": mean_abs(d),
        "noise_floor": run.floor.abs_log_ratio_mean if run.floor else None,
        "mean_z": z,
        "robust_sigma": sigma,
    }
    fix = "score in the engine's precision as well, to see what the precision alone does"
    symmetric = z is not None and abs(z) <= SYMMETRY_Z and d.size >= BASELINE_MIN_TOKENS
    if differs and symmetric and sigma <= PRECISION_MAX_SIGMA:
        core = np.abs(d) <= CORE_SIGMAS * sigma
        evidence["tokens_within_core"] = int(core.sum())
        detail = f"precisions differ; symmetric noise of sigma {sigma:.3g} around 0"
        return Undone(np.where(core, 0.0, d), "inferred", detail, evidence, fix)
    if run.floor is not None:
        level, mean = run.floor.abs_log_ratio_mean, mean_abs(d)
        left = max(0.0, 1.0 - level / mean) if mean else 0.0
        detail = f"the {run.floor.side} differs from itself by mean|D| {level:.3g}"
        fix = "nothing: drift below the noise floor says nothing"
        return Undone(d * left, "measured", detail, evidence, fix)
    if differs:
        wide = f"its sigma {sigma:.3g} is more than rounding gives"
        said = wide if symmetric else "the noise is not symmetric around 0"
        detail = f"precisions differ, but {said}"
        return Undone(None, "suspected", detail, evidence, fix)
    detail = "no noise floor is stored for either side"
    return Undone(None, "untested", detail, evidence, "measure one: the same requests twice")


CAUSES = {
    "transform": transform,
    "template": template,
    "stale_weights": stale_weights,
    "routing": routing,
    "precision": precision,
}
"""In the order that they are undone: what makes numbers incomparable first, noise last."""

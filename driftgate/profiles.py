"""Off-policy budgets by name: how far from the trainer's policy a rollout may be for what use.

A profile is a list of limits, each on one measured number, each with the verdict that it asks for
when it is broken. The mildest verdict that no limit forbids is given. Profiles are data: printed
with every verdict, compared in a review, replaced by your own.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from driftgate.bands import BANDS

__all__ = ["PROFILES", "TIERS", "Code", "Limit", "Profile", "ProfileName", "Tier"]

Tier = Literal["train", "train_with_correction", "replay", "quarantine"]
"""``train``: on policy. ``train_with_correction``: with importance weights, or with the rollout's
routes replayed. ``replay``: off-policy data only. ``quarantine``: for nothing until explained."""

TIERS: tuple[Tier, ...] = ("train", "train_with_correction", "replay", "quarantine")
"""Mild to severe."""

Code = Literal[
    "WITHIN_BUDGET",
    "HIGH_CLIPPED_FRACTION",
    "LOW_ESS",
    "STALE_POLICY_LAG",
    "REPLAY_TIER_LAG",
    "REPLAY_TIER_ESS",
    "VETO_THRESHOLD_EXCEEDED",
    "NOT_COMPARABLE",
    "INCOMPLETE_CAPTURE",
    "ROUTER_FLIP",
    "SYSTEMATIC_SHIFT",
]

ProfileName = Literal["default", "observatory"]

NARROW, WIDE = "extreme_frac_tau2", "extreme_frac_tau5"
"""Share of tokens whose ratio leaves [.5, 2] and [.2, 5]."""

CLAMPED = "clamped_frac_20"
"""Share of tokens with |D| > 20 nats, the original observatory's clamp."""

BUT_WORST = "_but_worst"
LEAVE_ONE_OUT = "ess_kish_token" + BUT_WORST
"""``ess_kish_token`` without the token of the largest |D|: one token is no rate, and no reason to
throw a run away. Null where that token has nearly all of the weight: `MAX_LOG_RATIO` is of it."""
SHIFT = "log_ratio_mean" + BUT_WORST
"""``log_ratio_mean`` without the token of the largest |D|: one is not what all tokens share."""
MAX_LOG_RATIO = 13.8
"""nats, ln 1e6. The engine sampled what it gave less than one in a million to: a fault, and no
noise. On the other side the veto at 1e-4 comes first."""

NOT_COMPARABLE = "not_comparable_frac"
"""Share of the scored answers' tokens that no number of the verdict rests on: of answers that are
not comparable, and bad logprobs."""

FEW_HITS = 3
"""Tokens below which a share is not enough to throw a run away: one token of fifty is 2 %."""

SHIFT_MIN_TOKENS = 32
"""For the mean of D: at sigma = .5 its standard error is then below .09."""


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """Broken where ``metric`` is above ``above``, or below ``below``."""

    code: Code
    metric: str
    """A metric of METRICS 2 or 3, ``policy_lag``, or one that the profile's module names."""
    verdict: Tier
    above: float | None = None
    below: float | None = None
    least: int = 1
    """Of a share: only where at least so many tokens are behind it."""
    min_tokens: int = 0
    """Compared tokens below which the metric is not tested, by none of the limits on it."""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A named off-policy budget."""

    name: str
    about: str
    limits: tuple[Limit, ...]


MASKED = (
    # Most of it cannot be judged: a verdict would speak for the smaller part.
    Limit(code="NOT_COMPARABLE", metric=NOT_COMPARABLE, verdict="quarantine", above=0.5),
    Limit(code="NOT_COMPARABLE", metric=NOT_COMPARABLE, verdict="train_with_correction", above=0),
)
"""Of every profile: what cannot be compared is masked, or the run is left."""

OBSERVATORY = Profile(
    name="observatory",
    about=(
        "The original observatory's numbers: min ESS .30 (replay .60), clipped fraction .10 at a "
        "clamp of 20 nats, lag 8 (replay 4), veto 30 nats, slot-0 flips .15. Clamp and veto never "
        "fire on real data. That any lag or clamped token asks for the correction, and what "
        "becomes of tokens that cannot be compared, is ours."
    ),
    limits=(
        *MASKED,
        Limit(code="LOW_ESS", metric="ess_kish_response", verdict="quarantine", below=0.30),
        Limit(code="HIGH_CLIPPED_FRACTION", metric=CLAMPED, verdict="quarantine", above=0.10),
        Limit(code="STALE_POLICY_LAG", metric="policy_lag", verdict="quarantine", above=8),
        Limit(
            code="VETO_THRESHOLD_EXCEEDED",
            metric="abs_log_ratio_max",
            verdict="quarantine",
            above=30.0,
        ),
        Limit(code="REPLAY_TIER_ESS", metric="ess_kish_response", verdict="replay", below=0.60),
        Limit(code="REPLAY_TIER_LAG", metric="policy_lag", verdict="replay", above=4),
        Limit(
            code="HIGH_CLIPPED_FRACTION", metric=CLAMPED, verdict="train_with_correction", above=0
        ),
        Limit(
            code="STALE_POLICY_LAG", metric="policy_lag", verdict="train_with_correction", above=0
        ),
        Limit(
            code="ROUTER_FLIP",
            metric="router_slot0_flip_rate",
            verdict="train_with_correction",
            above=0.15,
        ),
    ),
)

_SHIFT_SIZES: tuple[tuple[Tier, float], ...] = (
    ("quarantine", 0.47),
    ("replay", 0.22),
    ("train_with_correction", 0.10),
)
"""nats of mean D whose square / 2, the k3 of such a shift, is that of the ESS limits below: .11,
.025 and .005."""

_SHIFTS = tuple(
    Limit(
        code="SYSTEMATIC_SHIFT",
        metric=SHIFT,
        verdict=verdict,
        above=size if side > 0 else None,
        below=-size if side < 0 else None,
        min_tokens=SHIFT_MIN_TOKENS,
    )
    for verdict, size in _SHIFT_SIZES
    for side in (-1, 1)
)
"""A shift that all tokens share leaves ESS at 1 and every ratio inside [.5, 2]."""

DEFAULT = Profile(
    name="default",
    about=(
        "Limits that fire on real data: ratios outside [.5, 2] and [.2, 5], any ratio below 1e-4 "
        "or above 1e6, token ESS, a shift of all tokens, lag, and routing by expert sets."
    ),
    limits=(
        *MASKED,
        # verl's veto: a token that the trainer thinks ten thousand times less likely.
        Limit(
            code="VETO_THRESHOLD_EXCEEDED",
            metric="gate_veto_drop_frac",
            verdict="quarantine",
            above=0,
        ),
        Limit(
            code="VETO_THRESHOLD_EXCEEDED",
            metric="abs_log_ratio_max",
            verdict="quarantine",
            above=MAX_LOG_RATIO,
        ),
        # F(2) > .1 precedes collapse (R3 paper, arXiv 2510.11370); F(5) of 1 % is as far out.
        Limit(
            code="HIGH_CLIPPED_FRACTION",
            metric=NARROW,
            verdict="quarantine",
            above=BANDS[NARROW].red,
            least=FEW_HITS,
        ),
        Limit(
            code="HIGH_CLIPPED_FRACTION",
            metric=WIDE,
            verdict="quarantine",
            above=0.01,
            least=FEW_HITS,
        ),
        # Token ESS is about e^-(sigma^2): .8 is sigma = .47, k3 of .11, ten times the red band.
        Limit(code="LOW_ESS", metric=LEAVE_ONE_OUT, verdict="quarantine", below=0.80),
        Limit(code="STALE_POLICY_LAG", metric="policy_lag", verdict="quarantine", above=8),
        # .95 is sigma = .23, k3 of .025: red, and still usable with another objective.
        Limit(code="REPLAY_TIER_ESS", metric=LEAVE_ONE_OUT, verdict="replay", below=0.95),
        Limit(code="REPLAY_TIER_LAG", metric="policy_lag", verdict="replay", above=4),
        # The ends of the green bands.
        Limit(
            code="HIGH_CLIPPED_FRACTION",
            metric=NARROW,
            verdict="train_with_correction",
            above=BANDS[NARROW].green,
        ),
        Limit(code="LOW_ESS", metric="ess_kish_token", verdict="train_with_correction", below=0.99),
        Limit(
            code="STALE_POLICY_LAG", metric="policy_lag", verdict="train_with_correction", above=0
        ),
        Limit(
            code="ROUTER_FLIP",
            metric="router_set_disagree_rate",
            verdict="train_with_correction",
            above=BANDS["router_set_disagree_rate"].red,
        ),
        *_SHIFTS,
    ),
)

PROFILES: dict[ProfileName, Profile] = {"default": DEFAULT, "observatory": OBSERVATORY}
"""Profiles by name."""

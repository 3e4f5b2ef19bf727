"""Verdicts at and beyond each limit, and what stands before any number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from driftgate.mismatch import Bucket
from driftgate.profiles import PROFILES, TIERS, ProfileName
from driftgate.router import RouterBucket
from driftgate.verdict import Lag, Subject, Verdict, brief, judge, policy_lag
from tests.core.planted import F64, noise

FRESH = Lag(steps=0)


def bucket(d: F64) -> Bucket:
    rollout = np.full(d.size, -2.0 - max(0.0, float(d.max())))
    return Bucket.of(rollout + d, rollout)


def subject(d: F64 | None = None, **changes: Any) -> Subject:
    given: dict[str, Any] = {
        "captured": 1,
        "scorable": 1,
        "scored": 1,
        "comparable": 1,
        "bucket": bucket(noise(0, 1000, 0.01) if d is None else d),
        "lag": FRESH,
    }
    return Subject(**(given | changes))


def of(found: Subject, profile: ProfileName = "default") -> Verdict:
    return judge(found, PROFILES[profile])


def codes(verdict: Verdict) -> dict[str, str]:
    return {reason.code: reason.verdict for reason in verdict.reasons}


def spiked(count: int, ratio: float) -> F64:
    """1000 tokens, ``count`` of which have this ratio."""
    d = np.zeros(1000)
    d[:count] = math.log(ratio)
    return d


@pytest.mark.parametrize("profile", ["default", "observatory"])
def test_small_noise_is_on_policy(profile: ProfileName) -> None:
    found = of(subject(), profile)
    assert found.verdict == "train"
    assert codes(found) == {"WITHIN_BUDGET": "train"}
    assert found.profile == PROFILES[profile]


@pytest.mark.parametrize(
    ("d", "verdict", "code", "observed"),
    [
        (spiked(1, 2.1), "train", "WITHIN_BUDGET", None),  # .001, the limit itself
        (spiked(2, 2.1), "train_with_correction", "HIGH_CLIPPED_FRACTION", 0.002),
        (spiked(101, 0.45), "quarantine", "HIGH_CLIPPED_FRACTION", 0.101),
        (spiked(10, 0.15), "train_with_correction", "HIGH_CLIPPED_FRACTION", 0.01),
        (spiked(11, 0.15), "quarantine", "HIGH_CLIPPED_FRACTION", 0.011),
        (spiked(1, 0.9e-4), "quarantine", "VETO_THRESHOLD_EXCEEDED", 1.0),
        (np.full(1000, -0.8), "quarantine", "HIGH_CLIPPED_FRACTION", 1.0),
    ],
)
def test_ratios_under_the_default_profile(
    d: F64, verdict: str, code: str, observed: float | None
) -> None:
    found = of(subject(d))
    assert found.verdict == verdict
    reason = found.reasons[0]
    assert (reason.code, reason.verdict) == (code, verdict)
    assert reason.observed == pytest.approx(observed)
    assert reason.threshold is None or reason.detail.startswith(str(reason.metric))


def ess_of(target: float) -> F64:
    """1000 tokens at +x and -x, whose token ESS cosh(x)^2 / cosh(2x) is ``target``."""
    x = math.acosh(1.0 / (2.0 * target - 1.0)) / 2.0
    return np.tile([x, -x], 500)


@pytest.mark.parametrize(
    ("ess", "code", "verdict"),
    [
        (0.995, "WITHIN_BUDGET", "train"),
        (0.985, "LOW_ESS", "train_with_correction"),
        (0.945, "REPLAY_TIER_ESS", "replay"),
        (0.79, "LOW_ESS", "quarantine"),
    ],
)
def test_ess_under_the_default_profile(ess: float, code: str, verdict: str) -> None:
    found = of(subject(ess_of(ess)))
    assert found.measured["ess_kish_token"] == pytest.approx(ess, rel=1e-9)
    assert codes(found)[code] == verdict


@pytest.mark.parametrize("profile", ["default", "observatory"])
@pytest.mark.parametrize(
    ("steps", "verdict", "expected"),
    [
        (0, "train", {"WITHIN_BUDGET"}),
        (1, "train_with_correction", {"STALE_POLICY_LAG"}),
        (4, "train_with_correction", {"STALE_POLICY_LAG"}),
        (5, "replay", {"REPLAY_TIER_LAG", "STALE_POLICY_LAG"}),
        (8, "replay", {"REPLAY_TIER_LAG", "STALE_POLICY_LAG"}),
        (9, "quarantine", {"REPLAY_TIER_LAG", "STALE_POLICY_LAG"}),
    ],
)
def test_lag(profile: ProfileName, steps: int, verdict: str, expected: set[str]) -> None:
    found = of(subject(lag=Lag(steps=steps)), profile)
    assert found.verdict == verdict
    assert codes(found).keys() == expected


def kish(share: float) -> F64:
    """Token ESS of 1000 tokens of which ``share`` hold nearly all weight: about ``share``."""
    d = np.zeros(1000)
    d[: round(share * 1000)] = 12.0
    return d


@pytest.mark.parametrize(
    ("d", "verdict", "code"),
    [
        (kish(0.29), "quarantine", "LOW_ESS"),
        (kish(0.31), "replay", "REPLAY_TIER_ESS"),
        (kish(0.61), "train", "WITHIN_BUDGET"),
        (spiked(1, math.exp(-30.5)), "quarantine", "VETO_THRESHOLD_EXCEEDED"),
        (spiked(1, math.exp(-21.0)), "train_with_correction", "HIGH_CLIPPED_FRACTION"),
        (spiked(101, math.exp(-21.0)), "quarantine", "HIGH_CLIPPED_FRACTION"),
        (spiked(300, 0.3), "train", "WITHIN_BUDGET"),  # what the original could not see
    ],
)
def test_the_observatory_profile_keeps_the_originals_numbers(
    d: F64, verdict: str, code: str
) -> None:
    found = of(subject(d), "observatory")
    assert (found.verdict, found.reasons[0].code) == (verdict, code)


@pytest.mark.parametrize(("flips", "flagged"), [(15, False), (16, True)])
def test_slot_flips_under_the_observatory_profile(flips: int, flagged: bool) -> None:
    mine = np.tile(np.array([0, 1], np.uint8), (100, 1, 1))
    theirs = mine.copy()
    theirs[:flips] = theirs[:flips, :, ::-1]  # the same sets in another order
    router = RouterBucket.of(mine, theirs, rollout_ordered=True, train_ordered=True)
    found = of(subject(router=router), "observatory")
    assert ("ROUTER_FLIP" in codes(found)) is flagged
    assert codes(of(subject(router=router))) == {"WITHIN_BUDGET": "train"}


def test_other_expert_sets_ask_for_routing_replay() -> None:
    mine = np.tile(np.array([0, 1], np.uint8), (100, 1, 1))
    theirs = mine.copy()
    theirs[:21, :, 1] = 2
    found = of(subject(router=RouterBucket.of(mine, theirs)))
    assert codes(found) == {"ROUTER_FLIP": "train_with_correction"}
    assert "routing replay" in found.reasons[0].fix


def test_a_gap_and_an_invalid_comparison_are_quarantined() -> None:
    gaps = ["step 1: failed: x", "step 2: cancelled: y"]
    found = of(subject(gaps=gaps, scored=2, comparable=1, codes=["grammar_masked"]))
    assert found.verdict == "quarantine"
    assert codes(found).keys() == {"INCOMPLETE_CAPTURE", "NOT_COMPARABLE"}
    assert found.reasons[1].observed == 0.5
    assert "grammar_masked" in found.reasons[1].detail
    assert "and 1 more" in found.reasons[0].detail


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"open_calls": 2, "gaps": ["step 3: call c has not ended"]}, "not ended: 2"),
        ({"scorable": 3, "captured": 3}, "1 of 3 traces"),
        ({"captured": 0, "scorable": 0, "scored": 0}, "nothing is captured"),
        ({"scorable": 0, "scored": 0}, "0 of 0 traces"),
    ],
)
def test_no_verdict_on_what_is_not_whole(changes: dict[str, Any], why: str) -> None:
    found = of(subject(**changes))
    assert found.verdict is None
    assert found.reasons == []
    assert why in (found.why_null or "")
    assert found.profile.name == "default"
    assert brief(found).why_null == found.why_null


def test_what_is_not_known_is_null_with_a_reason_and_breaks_no_limit() -> None:
    found = of(subject(lag=Lag(steps=None, reason="'a' is no number"), router_reason="dense"))
    assert found.verdict == "train"
    assert found.measured["policy_lag"] is None
    assert found.undefined == {
        "policy_lag": "'a' is no number",
        "router_set_disagree_rate": "dense",
    }
    assert "4 of 6" in found.reasons[0].detail


def test_the_most_severe_reason_comes_first_and_is_the_verdict() -> None:
    found = of(subject(spiked(300, 0.15), lag=Lag(steps=6)))
    order = [TIERS.index(reason.verdict) for reason in found.reasons]
    assert order == sorted(order, reverse=True)
    assert found.verdict == found.reasons[0].verdict == "quarantine"
    assert all(reason.fix for reason in found.reasons)


def test_gates_tell_what_each_trainer_would_do() -> None:
    shares = {share.gate.metric: share.share for share in of(subject(spiked(30, 2.5))).gates}
    assert shares["gate_verl_tis_clip_frac"] == 0.03
    assert shares["gate_icepop_drop_frac"] == 0.0
    assert shares["gate_trl_seqmask_drop_frac"] == 1.0
    assert of(subject(bucket=None, comparable=0)).gates == []


@pytest.mark.parametrize(
    ("pairs", "steps"),
    [
        ([("3", "5")], 2),
        ([("5", "3")], 2),
        ([("5", "5"), ("1", "5")], 4),
        ([("3", None)], None),
        ([("step-3", "5")], None),
        ([("3", "5"), ("unknown", "5")], None),
        ([("٣", "5")], None),
    ],
)
def test_policy_lag(pairs: list[tuple[str, str | None]], steps: int | None) -> None:
    found = policy_lag(pairs)
    assert found.steps == steps
    assert (found.reason is None) is (steps is not None)

"""Verdicts at and beyond each limit, and what stands before any number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from driftgate.codes import MASKABLE, SEVERITY
from driftgate.lag import lag_label, policy_lag, widest
from driftgate.mismatch import Bucket
from driftgate.profiles import PROFILES, TIERS, ProfileName
from driftgate.router import RouterBucket
from driftgate.subject import Refused
from driftgate.verdict import Lag, Subject, Verdict, brief, judge
from tests.core.planted import F64, noise

FRESH = Lag(steps=0)


def bucket(d: F64) -> Bucket:
    rollout = np.full(d.size, -2.0 - max(0.0, float(d.max())))
    return Bucket.of(rollout + d, rollout)


def subject(d: F64 | None = None, **changes: Any) -> Subject:
    whole = bucket(noise(0, 1000, 0.01) if d is None else d)
    given: dict[str, Any] = {
        "captured": 1,
        "scorable": 1,
        "scored": 1,
        "tokens": whole.n_tokens,
        "bucket": whole,
        "lag": FRESH,
    }
    return Subject(**(given | changes))


def refused(step: int, tokens: int, *codes: str) -> Refused:
    return Refused(trace_id=f"t{step}", step=step, choice=0, tokens=tokens, codes=list(codes))


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
    d = ess_of(ess)
    without = np.exp(np.delete(d, np.abs(d).argmax()))
    loo = without.sum() ** 2 / (999 * np.square(without).sum())
    assert found.measured["ess_kish_token_but_worst"] == pytest.approx(loo, rel=1e-9)
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


def test_a_gap_is_quarantined() -> None:
    found = of(subject(gaps=["step 1: failed: x", "step 2: cancelled: y"]))
    assert codes(found) == {"INCOMPLETE_CAPTURE": "quarantine"}
    assert "and 1 more" in found.reasons[0].detail


@pytest.mark.parametrize("profile", ["default", "observatory"])
@pytest.mark.parametrize(
    ("tokens", "verdict"),
    [(1, "train_with_correction"), (1000, "train_with_correction"), (1001, "quarantine")],
)
def test_answers_that_cannot_be_compared_are_masked_up_to_half_of_the_tokens(
    profile: ProfileName, tokens: int, verdict: str
) -> None:
    """1000 tokens are comparable."""
    aside = [refused(3, tokens, "grammar_masked")]
    found = of(subject(scored=2, tokens=1000 + tokens, refused=aside), profile)
    (why,) = found.reasons
    assert (why.code, why.verdict, why.metric) == ("NOT_COMPARABLE", verdict, "not_comparable_frac")
    assert why.observed == pytest.approx(tokens / (1000 + tokens))
    share = f"{100 * tokens / (1000 + tokens):.1f}%"
    assert f"{tokens} of {1000 + tokens} tokens ({share}): grammar_masked in step 3" in why.detail
    assert ("mask these tokens" in why.fix) == (verdict == "train_with_correction")
    assert found.not_comparable == aside


def test_a_reason_that_doubts_a_side_doubts_the_whole_run() -> None:
    aside = [refused(0, 1, "grammar_masked"), refused(1, 1, "tokenizer_mismatch")]
    found = of(subject(scored=3, tokens=1002, refused=aside))
    (why,) = found.reasons
    assert (why.code, why.verdict) == ("NOT_COMPARABLE", "quarantine")
    assert "1 of 3 answers (step 1): tokenizer_mismatch" in why.detail
    assert "mend what the codes name" in why.fix


def test_every_code_that_doubts_no_side_is_of_what_was_asked() -> None:
    assert {code for code, weight in SEVERITY.items() if weight == "no"} >= MASKABLE


def test_bad_logprobs_are_not_passed_over() -> None:
    """999 of 1000 tokens are NaN: what is left is within every other limit."""
    rollout = np.full(1000, -1.0)
    train = np.where(np.arange(1000) == 5, -1.0, math.nan)
    found = of(subject(bucket=Bucket.of(train, rollout), tokens=1000))
    assert codes(found) == {"NOT_COMPARABLE": "quarantine"}
    assert "bad logprobs: 999" in found.reasons[0].detail


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [
        (-0.09, "train"),
        (-0.11, "train_with_correction"),
        (0.11, "train_with_correction"),
        (-0.23, "replay"),
        (-0.5, "quarantine"),
    ],
)
def test_a_shift_of_all_tokens_is_seen_where_ess_and_ratios_see_nothing(
    shift: float, verdict: str
) -> None:
    found = of(subject(np.full(1000, shift)))
    assert found.measured["ess_kish_token"] == pytest.approx(1.0, rel=1e-12)
    assert found.measured["extreme_frac_tau2"] == 0.0
    assert found.verdict == verdict
    assert set(codes(found)) == {"WITHIN_BUDGET" if verdict == "train" else "SYSTEMATIC_SHIFT"}


@pytest.mark.parametrize("outlier", [-2.0, 2.0, 3.0])
def test_one_token_throws_no_run_away(outlier: float) -> None:
    d = noise(0, 50, 0.01)
    d[7] = outlier
    assert of(subject(d)).verdict == "train_with_correction"
    d[8:10] = outlier
    assert of(subject(d)).verdict == "quarantine"


@pytest.mark.parametrize("d", [-8.0, -2.0, 0.0, 2.0, 40.0, 800.0])
def test_a_run_of_one_token(d: float) -> None:
    found = of(subject(np.array([d])))
    assert found.measured["log_ratio_mean_but_worst"] is None
    assert found.undefined["log_ratio_mean_but_worst"] == "1 tokens of 32"
    assert found.measured["ess_kish_token_but_worst"] is None
    assert found.undefined["ess_kish_token_but_worst"] == "needs two tokens"
    assert found.verdict == ("train_with_correction" if abs(d) == 2.0 else found.verdict)


@pytest.mark.parametrize("d", [[-50.0, 15.0], [30.0, 30.0], [0.0, 0.0]])
def test_ess_without_the_worst_token_is_finite_and_never_above_one(d: list[float]) -> None:
    found = of(subject(np.array(d))).measured["ess_kish_token_but_worst"]
    assert found is not None
    assert 0.0 < found <= 1.0


@pytest.mark.parametrize("size", [14.0, 15.0, 20.0, 800.0])
def test_ess_without_the_worst_token_is_never_that_with_it(size: float) -> None:
    """31 tokens are equal on both sides, so that without the other it is 1, or not known."""
    found = of(subject(np.array([size] + [0.0] * 31)))
    ess = found.measured["ess_kish_token_but_worst"]
    assert ess == (pytest.approx(1.0) if size == 14.0 else None)
    assert (ess is None) == ("nearly all of the weight" in str(found.undefined))
    assert found.verdict == "quarantine"
    assert found.reasons[0].code == "VETO_THRESHOLD_EXCEEDED"


@pytest.mark.parametrize(("tokens", "outlier"), [(40, -9.1), (32, -8.0), (32, 7.5), (32, 13.7)])
def test_one_token_is_no_shift_of_all(tokens: int, outlier: float) -> None:
    d = np.zeros(tokens)
    d[5] = outlier
    found = of(subject(d))
    assert found.measured["log_ratio_mean_but_worst"] == pytest.approx(0.0, abs=1e-12)
    assert found.verdict == "train_with_correction"
    assert "SYSTEMATIC_SHIFT" not in codes(found)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"open_calls": 2, "gaps": ["step 3: call c has not ended"]}, "not ended: 2"),
        ({"scorable": 3, "captured": 3}, "1 of 3 traces"),
        ({"captured": 0, "scorable": 0, "scored": 0}, "nothing is captured"),
        ({"scorable": 0, "scored": 0}, "0 of 0 traces"),
        ({"tokens": 0, "bucket": None}, "no token was sampled"),
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
    assert "over 1000 tokens; 8 of 10" in found.reasons[0].detail


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
    assert of(subject(bucket=None)).gates == []


@pytest.mark.parametrize(
    ("pairs", "steps", "at_least", "differs"),
    [
        ([], 0, 0, False),
        ([("3", "5")], 2, 2, False),
        ([("5", "3")], 2, 2, False),
        ([("5", "5"), ("1", "5")], 4, 4, False),
        ([("step-3", "step-5")], 2, 2, False),
        ([("best", "best")], 0, 0, False),
        ([("3", None)], None, 0, False),
        ([("step-3", "5")], None, 0, True),
        ([("1.2", "1.9")], None, 0, True),
        ([("a1b2", "a1b9")], None, 0, True),
        ([("999999", "999998")], 1, 1, False),
        ([("0482624", "1190331")], None, 0, True),  # commits
        ([("step-0482624", "step-0482626")], 2, 2, False),
        ([("3", "5"), ("unknown", "5")], None, 2, False),
        ([("unknown", "unknown")], None, 0, False),
        ([("٣", "5")], None, 0, True),
    ],
)
def test_policy_lag(
    pairs: list[tuple[str, str | None]], steps: int | None, at_least: int, differs: bool
) -> None:
    found = policy_lag(pairs)
    assert (found.steps, found.at_least, found.differs) == (steps, at_least, differs)
    assert (found.reason is None) is (steps is not None)
    assert widest([found, FRESH]) == found


@pytest.mark.parametrize(
    ("sampled", "scored", "label"),
    [
        ("7", "7", "0"),
        ("step-3", "step-7", "4"),
        ("1", "40", "32 or more"),
        ("6+7", "7", "differs"),
        ("unknown", "7", "unknown"),
        ("7", None, "unknown"),
    ],
)
def test_the_lag_that_a_trace_is_counted_under(
    sampled: str, scored: str | None, label: str
) -> None:
    assert lag_label(sampled, scored) == label


def test_a_lag_that_is_known_of_some_traces_is_a_lower_bound() -> None:
    found = of(subject(lag=policy_lag([("unknown", "20"), ("11", "20")])))
    assert found.measured["policy_lag"] is None
    assert found.reasons[0].detail == "policy_lag at least 9 > 8"
    assert found.verdict == "quarantine"


def test_versions_that_differ_by_nobody_knows_how_much_ask_for_the_correction() -> None:
    found = of(subject(lag=policy_lag([("a1b2", "a1b9")])))
    assert codes(found) == {"STALE_POLICY_LAG": "train_with_correction"}
    assert "they differ" in found.reasons[0].detail

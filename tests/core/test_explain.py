"""Planted causes: each is named, with the share that the planted numbers give."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from driftgate.anatomy import Response
from driftgate.causes import Floor, Run
from driftgate.codes import reason
from driftgate.explain import Cause, Refusal, attribute, explain
from driftgate.router import RouterBucket
from driftgate.trace import Comparable
from tests.core.planted import F64, drift, noise, responses, run, scored, with_meta

FLOOR = Floor(0.01, "engine")


def causes(found: Sequence[Response], floor: Floor | None = None) -> dict[str, Cause]:
    listed = attribute(Run(found, floor))
    assert sum(cause.share for cause in listed) == pytest.approx(1.0, abs=1e-12)
    assert all(0.0 <= cause.share <= 1.0 for cause in listed)
    assert all(cause.share == 0.0 or cause.found in ("measured", "inferred") for cause in listed)
    return {cause.name: cause for cause in listed}


def of_words(code: str) -> Comparable:
    return Comparable(verdict="converted", reasons=[reason(code, "planted", "mend it")])


def simple(sigmas: Sequence[float], **meta: Any) -> list[Response]:
    traces = run(len(sigmas))
    pairs = enumerate(zip(traces, sigmas, strict=True))
    return responses(traces, [scored(t, noise(n, 200, s), **meta) for n, (t, s) in pairs])


def test_no_cause_is_found_in_plain_noise() -> None:
    found = causes(simple([0.02] * 4))
    assert found["unexplained"].share == 1.0
    assert found["precision"].found == found["routing"].found == "untested"
    assert found["transform"].found == found["template"].found == "absent"


def test_equal_sides_have_no_shares() -> None:
    found = attribute(Run(simple([0.0, 0.0]), None))
    assert [cause.share for cause in found] == [0.0] * 6


def test_another_temperature_is_measured_by_the_second_one() -> None:
    """The engine scaled by T = .7; the headline compares it with logits at T = 1."""
    rng = np.random.default_rng(1)
    traces, scores = run(2, 300), []
    for at, trace in enumerate(traces):
        logits = rng.normal(0.0, 2.0, (300, 50))
        picked = rng.integers(0, 5, 300)  # any tokens will do
        one, hot = (_logprobs(logits / t, picked) for t in (1.0, 0.7))
        traces[at] = dataclasses.replace(trace, logprobs=hot.astype(np.float32))
        scores.append(scored(traces[at], one - hot, noise(at, 300, 0.01)))
    found = responses(traces, scores)
    left = sum(float(np.abs(r.other - r.rollout).sum()) for r in found if r.other is not None)
    cause = causes(found)["transform"]
    assert cause.found == "measured"
    assert cause.share == pytest.approx(1.0 - left / drift(found), rel=1e-12)
    assert cause.share > 0.95
    assert cause.evidence["logodds_slope"] != pytest.approx(1.0, abs=0.1)


def test_another_temperature_is_inferred_from_the_slope() -> None:
    """Of two tokens log-odds scale exactly: the fit leaves the noise that was put on them."""
    rng = np.random.default_rng(2)
    traces, odds = run(2, 400), rng.normal(0.0, 2.0, (2, 400))
    scores = []
    for at, trace in enumerate(traces):
        rollout = -np.logaddexp(0.0, -odds[at])
        train = -np.logaddexp(0.0, -(0.7 * odds[at] + noise(at, 400, 0.01)))
        traces[at] = dataclasses.replace(trace, logprobs=rollout.astype(np.float32))
        scores.append(scored(traces[at], train - rollout))
    cause = causes(responses(traces, scores))["transform"]
    assert cause.found == "inferred"
    assert cause.evidence["logodds_slope"] == pytest.approx(0.7, abs=0.01)
    assert cause.share == pytest.approx(0.98, abs=0.015)


def test_a_broken_prefix_has_the_excess_of_its_steps() -> None:
    sigmas = [0.01, 0.01, 0.2, 0.01]
    traces = run(4)
    traces[2] = with_meta(traces[2], prefix_exact=False)
    found = responses(
        traces,
        [scored(t, noise(n, 200, s)) for n, (t, s) in enumerate(zip(traces, sigmas, strict=True))],
    )
    clean = drift([found[0], found[1], found[3]]) / 600
    cause = causes(found)["template"]
    assert cause.found == "measured"
    assert cause.share == pytest.approx((drift([found[2]]) - 200 * clean) / drift(found), rel=1e-9)
    assert "steps 2" in cause.detail


def test_a_broken_prefix_without_more_drift_is_no_cause() -> None:
    traces = run(4)
    traces[2] = with_meta(traces[2], prefix_exact=False)
    found = causes(
        responses(traces, [scored(t, noise(n, 200, 0.02)) for n, t in enumerate(traces)])
    )
    assert (found["template"].found, found["template"].share) == ("absent", 0.0)
    assert found["template"].evidence["responses_with_broken_prefix"] == 1


def lagged(versions: Sequence[str], sigmas: Sequence[float]) -> list[Response]:
    traces = [
        with_meta(trace, weight_version=version)
        for trace, version in zip(run(len(versions)), versions, strict=True)
    ]
    return responses(
        traces,
        [
            scored(trace, noise(n, 200, sigma), trainer_weight_version="5")
            for n, (trace, sigma) in enumerate(zip(traces, sigmas, strict=True))
        ],
    )


def test_stale_weights_have_the_excess_over_fresh_ones() -> None:
    found = lagged(["3", "3", "5", "5"], [0.1, 0.1, 0.01, 0.01])
    stale, fresh = found[:2], found[2:]
    cause = causes(found)["stale_weights"]
    assert cause.found == "measured"
    assert cause.share == pytest.approx((drift(stale) - drift(fresh)) / drift(found), rel=1e-9)
    assert (cause.evidence["sampled_under"], cause.evidence["scored_under"]) == ("3, 5", "5")


def test_without_fresh_tokens_the_noise_floor_is_the_baseline() -> None:
    found = lagged(["3", "3"], [0.1, 0.1])
    cause = causes(found, FLOOR)["stale_weights"]
    assert cause.found == "measured"
    assert cause.share == pytest.approx(1.0 - 400 * 0.01 / drift(found), rel=1e-9)
    assert cause.evidence["baseline_is"] == "noise floor of the engine"


def test_without_any_baseline_lag_is_suspected_and_its_drift_stays_unexplained() -> None:
    found = causes(lagged(["3", "3"], [0.1, 0.1]))
    assert (found["stale_weights"].found, found["stale_weights"].share) == ("suspected", 0.0)
    assert found["unexplained"].share == 1.0


def tailed(seed: int, size: int) -> F64:
    """3 % of the tokens have a sigma of .7, the others of .015."""
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(0.0, np.where(rng.random(size) < 0.03, 0.7, 0.015)))


@pytest.mark.parametrize(("first", "said"), [(40, "suspected"), (120, "absent")])
def test_a_short_first_step_without_the_tail_is_no_proof_of_a_template(
    first: int, said: str
) -> None:
    """The same noise in every step; only the first prompt is whole, and holds none of the tail."""
    sizes = [first] + [300] * 8
    traces = [
        with_meta(run(len(sizes), size)[at], prefix_exact=not at) for at, size in enumerate(sizes)
    ]
    parts = [noise(0, first, 0.015), *(tailed(n, 300) for n in range(1, 9))]
    found = responses(traces, [scored(t, d) for t, d in zip(traces, parts, strict=True)])
    cause = causes(found)["template"]
    assert (cause.found, cause.share) == (said, 0.0)
    assert (f"{first} tokens of other steps" in cause.detail) == (said == "suspected")


def test_one_outlier_in_a_short_group_is_no_template() -> None:
    """Of 1,640 tokens at .02 the broken step has 40, one of them 5 nats off."""
    sizes = [800, 800, 40]
    traces = [run(3, size)[at] for at, size in enumerate(sizes)]
    traces[2] = with_meta(traces[2], prefix_exact=False)
    parts = [noise(at, size, 0.02) for at, size in enumerate(sizes)]
    parts[2][7] = -5.0
    found = responses(traces, [scored(t, d) for t, d in zip(traces, parts, strict=True)])
    assert causes(found)["template"].found == "absent"


def test_a_jump_between_steps_is_stale_weights_or_cache() -> None:
    found = simple([0.01, 0.01, 0.1, 0.1])
    before, after = found[:2], found[2:]
    cause = causes(found)["stale_weights"]
    assert (cause.found, cause.evidence["jump_at_step"]) == ("inferred", 2)
    assert cause.share == pytest.approx((drift(after) - drift(before)) / drift(found), rel=1e-9)


def test_routing_is_what_replay_removes() -> None:
    traces = run(2)
    found, kept = [], 0.0
    for at, trace in enumerate(traces):
        rest, routed = noise(at, 200, 0.02), noise(10 + at, 200, 0.2)
        score = scored(trace, rest + routed)
        assert trace.logprobs is not None
        replayed = (trace.logprobs + rest).astype(np.float32)
        kept += float(np.abs(replayed.astype(np.float64) - trace.logprobs).sum())
        response = Response.of(trace, score, replayed)
        assert response is not None
        found.append(response)
    cause = causes(found)["routing"]
    assert cause.found == "measured"
    assert cause.share == pytest.approx(1.0 - kept / drift(found), rel=1e-9)


@pytest.mark.parametrize("broken", [np.nan, -np.inf, -9999.0])
def test_a_token_that_could_not_be_replayed_leaves_the_others_their_cause(broken: float) -> None:
    (trace,) = run(1)
    assert trace.logprobs is not None
    replayed = trace.logprobs.copy()
    replayed[7] = broken
    response = Response.of(trace, scored(trace, noise(1, 200, 0.2)), replayed)
    assert response is not None
    cause = causes([response])["routing"]
    assert cause.found == "measured"
    assert cause.share == pytest.approx(1.0 - abs(response.d[7]) / drift([response]), rel=1e-9)
    assert cause.evidence["tokens_replayed"] == 199
    response = Response.of(trace, scored(trace, noise(1, 200, 0.2)), np.full_like(replayed, broken))
    assert response is not None
    assert causes([response])["routing"].found == "untested"


@pytest.mark.parametrize(("agree", "said"), [(False, "suspected"), (True, "untested")])
def test_routes_that_differ_without_replay_are_a_sign_only(agree: bool, said: str) -> None:
    routes = np.arange(4, dtype=np.uint8)[None, None, :].repeat(200, axis=0)
    theirs = routes if agree else routes + 4
    router = RouterBucket.of(routes, theirs, rollout_ordered=True, train_ordered=True)
    found = causes(simple([0.05, 0.05], router=router))["routing"]
    assert (found.found, found.share) == (said, 0.0)
    assert found.evidence["router_set_disagree_rate"] == float(not agree)


def test_a_dense_model_has_no_routing_cause() -> None:
    found = causes(simple([0.05], router_reason="the trainer's model has no routers"))
    assert found["routing"].found == "absent"


def test_routers_that_are_not_known_are_untested() -> None:
    found = causes(simple([0.05], router_reason="the routers of x are not known to driftgate"))
    assert found["routing"].found == "untested"


def test_noise_up_to_the_floor_is_precision() -> None:
    found = simple([0.02] * 3)
    cause = causes(found, FLOOR)["precision"]
    assert cause.share == pytest.approx(600 * 0.01 / drift(found), rel=1e-9)
    assert causes(found, Floor(0.5, "trainer"))["precision"].share == pytest.approx(1.0)


def test_symmetric_noise_between_two_precisions_is_theirs_and_an_outlier_is_not() -> None:
    traces, d = run(2), [noise(1, 200, 0.03), noise(2, 200, 0.03)]
    d[1][7] = -3.0
    differs = of_words("precision_class_differs")
    found = responses(
        traces, [scored(t, x, comparable=differs) for t, x in zip(traces, d, strict=True)]
    )
    cause = causes(found)["precision"]
    assert cause.found == "inferred"
    assert cause.evidence["robust_sigma"] == pytest.approx(0.03, rel=0.15)
    assert 1.0 - cause.share == pytest.approx(3.0 / drift(found), abs=0.02)


def test_a_shift_is_not_symmetric_noise() -> None:
    traces = run(2)
    shifted = [
        scored(
            t,
            np.full(200, 0.1) + noise(3, 200, 0.01),
            comparable=of_words("precision_class_differs"),
        )
        for t in traces
    ]
    found = causes(responses(traces, shifted))
    assert (found["precision"].found, found["unexplained"].share) == ("suspected", 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_shares_add_to_one_with_several_causes_at_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    traces = run(5)
    traces[1] = with_meta(traces[1], prefix_exact=False)
    traces[3] = with_meta(traces[3], weight_version="4")
    scores = [
        scored(t, rng.normal(0, s, 200), trainer_weight_version="5")
        for t, s in zip(traces, (0.03, 0.3, 0.03, 0.2, 0.03), strict=True)
    ]
    found = causes(responses(traces, scores), FLOOR)
    order = sorted(found.values(), key=lambda cause: -cause.share)
    assert {cause.name for cause in order[:2]} == {"template", "stale_weights"}
    assert found["precision"].share > 0.0


def test_an_explanation_says_what_it_rests_on() -> None:
    found = simple([0.02, 0.02])
    told = explain(found, sides=found[0].score, captured=3, comparable={"yes": 2}, floor=FLOOR)
    assert (told.captured, told.scored, told.n_tokens, told.n_responses) == (3, 2, 400, 2)
    assert told.abs_log_ratio_mean == pytest.approx(drift(found) / 400)
    assert told.noise_floor == 0.01
    assert told.set_aside == []


def test_what_is_not_comparable_is_set_aside_with_its_share_and_feeds_no_cause() -> None:
    """A forced tool call of 100 tokens at 25 nats before three steps of plain noise."""
    found = simple([0.02] * 3)
    masked = reason("grammar_masked", "tool_choice", "free it")
    aside = [Refusal(step=0, reason=masked, tokens=100, sum_abs=2500.0)]
    verdicts = {"yes": 3, "no": 1}
    told = explain(
        found, sides=found[0].score, captured=4, comparable=verdicts, refusals=aside, floor=FLOOR
    )
    (cause,) = told.set_aside
    assert (cause.code, cause.detail, cause.fix) == ("grammar_masked", "tool_choice", "free it")
    assert (cause.responses, cause.steps, cause.tokens) == (1, [0], 100)
    assert cause.share_of_tokens == 100 / 700
    assert cause.share_of_drift == pytest.approx(2500.0 / (2500.0 + drift(found)))
    assert told.causes == attribute(Run(found, FLOOR))
    assert told.scored == 4


def test_a_run_without_a_comparable_token_has_no_causes() -> None:
    why = [
        Refusal(step=at, reason=reason(code, "seen", "mend it"), tokens=10, sum_abs=0.0)
        for at, code in enumerate(("grammar_masked", "tokenizer_mismatch", "grammar_masked"))
    ]
    sides = simple([0.0])[0].score
    told = explain([], sides=sides, captured=3, comparable={"no": 3}, refusals=why)
    assert (told.causes, told.by_step, told.by_class) == ([], [], [])
    assert (told.abs_log_ratio_mean, told.worst, told.n_tokens) == (None, None, 0)
    assert [(one.code, one.steps) for one in told.set_aside] == [
        ("grammar_masked", [0, 2]),
        ("tokenizer_mismatch", [1]),
    ]
    assert told.set_aside[0].share_of_tokens == pytest.approx(2 / 3)
    assert told.set_aside[0].share_of_drift is None


def test_a_step_of_rarer_tokens_is_no_jump() -> None:
    """Drift goes with the token's probability, and the last two steps have the rare ones."""
    traces, scores = run(4), []
    for at, trace in enumerate(traces):
        rare = at >= 2
        level = np.where(np.arange(200) % 4 == 0, not rare, rare)
        rollout = np.where(level, -3.0, -1.0)
        traces[at] = dataclasses.replace(trace, logprobs=rollout.astype(np.float32))
        scores.append(scored(traces[at], noise(at, 200, 1.0) * np.where(level, 0.1, 0.01)))
    cause = causes(responses(traces, scores))["stale_weights"]
    assert (cause.found, cause.share) == ("untested", 0.0)


def test_drift_that_grows_with_the_context_is_no_jump() -> None:
    """Its standard deviation goes from .01 to .09 in a straight line over four steps."""
    traces = run(4)
    sigmas = np.split(np.linspace(0.01, 0.09, 800), 4)
    scores = [
        scored(t, noise(n, 200, 1.0) * s)
        for n, (t, s) in enumerate(zip(traces, sigmas, strict=True))
    ]
    assert causes(responses(traces, scores))["stale_weights"].found == "untested"


def test_a_jump_under_one_known_version_is_a_sign_only() -> None:
    traces = [with_meta(trace, weight_version="5") for trace in run(4)]
    pairs = zip(traces, (0.01, 0.01, 0.1, 0.1), strict=True)
    scores = [
        scored(t, noise(n, 200, s), trainer_weight_version="5") for n, (t, s) in enumerate(pairs)
    ]
    cause = causes(responses(traces, scores))["stale_weights"]
    assert (cause.found, cause.share) == ("suspected", 0.0)
    assert "stale cache" in cause.detail


def test_noise_on_the_engines_side_is_no_temperature() -> None:
    """It flattens the slope of the trainer's log-odds on the engine's, without any scale."""
    rng = np.random.default_rng(5)
    odds = rng.normal(0.0, 2.0, 800)
    rollout = -np.logaddexp(0.0, -(odds + noise(6, 800, 0.8)))
    train = -np.logaddexp(0.0, -odds)
    trace = dataclasses.replace(run(1, 800)[0], logprobs=rollout.astype(np.float32))
    cause = causes(responses([trace], [scored(trace, train - rollout)]))["transform"]
    assert cause.evidence["logodds_slope"] == pytest.approx(0.87, abs=0.03)
    assert (cause.found, cause.share) == ("absent", 0.0)


def test_two_temperatures_that_both_fit_are_no_cause() -> None:
    (found,) = responses(run(1), [scored(run(1)[0], np.full(200, 1e-3), np.full(200, 1e-4))])
    assert causes([found])["transform"].found == "absent"


def test_noise_wider_than_rounding_is_not_precision() -> None:
    found = causes(simple([0.2, 0.2], comparable=of_words("precision_class_differs")))
    assert (found["precision"].found, found["precision"].share) == ("suspected", 0.0)


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [31, 31], [200, 1]])
def test_few_tokens_accuse_nobody(sizes: Sequence[int]) -> None:
    """However far off, and with every sign of a broken prefix and of lag."""
    traces = [
        with_meta(trace, prefix_exact=False, weight_version="3")
        for trace in (run(len(sizes), size)[at] for at, size in enumerate(sizes))
    ]
    scores = [
        scored(t, np.full(size, -2.0 if at else 0.0), trainer_weight_version="5")
        for at, (t, size) in enumerate(zip(traces, sizes, strict=True))
    ]
    found = attribute(Run(responses(traces, scores), None))
    assert {cause.share for cause in found if cause.name != "unexplained"} == {0.0}


def test_one_outlier_is_no_jump() -> None:
    parts = [noise(n, 60, 0.02) for n in range(4)]
    parts[2][7] = -20.0
    traces = run(4, 60)
    found = responses(traces, [scored(t, d) for t, d in zip(traces, parts, strict=True)])
    assert causes(found)["stale_weights"].share == 0.0


def _logprobs(logits: F64, picked: np.ndarray) -> F64:
    top = logits.max(axis=1, keepdims=True)
    norm = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return np.asarray(logits[np.arange(len(picked)), picked] - norm)

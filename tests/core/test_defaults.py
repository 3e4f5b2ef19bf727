"""What an engine samples with where a request does not say: known, declared, or in doubt."""

from __future__ import annotations

import numpy as np
import pytest

from driftgate.codes import SEVERITY
from driftgate.comparable import headline_temperature, judge_numbers
from driftgate.facts import NEUTRAL_DEFAULTS, as_sampled, unsent
from driftgate.mismatch import Bucket
from driftgate.temperature import effective_temperature
from driftgate.trace import Engine, LogprobsMode, Reason, Sampling

T = 0.7
NEUTRAL = {f"default_{name}": str(value) for name, value in NEUTRAL_DEFAULTS.items()}


def engine(mode: LogprobsMode, settings: dict[str, str] | None = None) -> Engine:
    return Engine(
        name="vllm", version="0.29.0", model="m", logprobs_mode=mode, settings=settings or {}
    )


def worst(reasons: list[Reason]) -> str:
    weights = {SEVERITY[r.code] for r in reasons}
    return next((w for w in ("no", "converted") if w in weights), "yes")


def small(d: float = 0.01) -> Bucket:
    rollout = np.log(np.random.default_rng(0).uniform(0.1, 0.9, 20))
    return Bucket.of(rollout + d, rollout)


def heated(tokens: int = 2000) -> tuple[Bucket, Bucket]:
    """A good pair whose engine gives logprobs at T: the trainer at 1, and at T."""
    rng = np.random.default_rng(0)
    z = rng.normal(0, 3, (tokens, 50))
    noisy = z + rng.normal(0, 0.02, z.shape)
    at = np.arange(tokens), (z / T + rng.gumbel(size=z.shape)).argmax(axis=1)
    one, hot, rollout = (
        (x - np.log(np.exp(x).sum(axis=1, keepdims=True)))[at] for x in (noisy, noisy / T, z / T)
    )
    return Bucket.of(one, rollout), Bucket.of(hot, rollout)


@pytest.mark.parametrize(
    ("mode", "sampling", "expected"),
    [
        ("unknown", Sampling(), ("no", "logprobs_mode_unknown")),
        ("unknown", Sampling(temperature=1.0), ("converted", "sampling_default_assumed")),
        ("processed_logprobs", Sampling(), ("converted", "sampling_default_assumed")),
        ("processed_logprobs", Sampling(top_p=1.0), ("converted", "sampling_default_assumed")),
        ("raw_logprobs", Sampling(), ("yes", "sampling_default_unknown")),
        ("raw_logprobs", Sampling(temperature=1.0), ("yes", "low_power")),
    ],
)
def test_defaults_that_are_not_known(
    mode: LogprobsMode, sampling: Sampling, expected: tuple[str, str]
) -> None:
    found = judge_numbers(engine(mode), sampling, at_one=small())
    assert (worst(found), found[0].code) == expected
    known = judge_numbers(engine(mode, NEUTRAL), sampling, at_one=small())
    assert [r.code for r in known] == ["low_power"]


def test_a_hidden_temperature_below_processed_logprobs_shows_in_the_slope() -> None:
    one, _ = heated()
    found = judge_numbers(engine("processed_logprobs"), Sampling(), at_one=one)
    assert "logodds_slope_off" in [r.code for r in found]


def test_raw_logprobs_at_an_unknown_temperature_are_not_held_to_the_mean_weight() -> None:
    off = Bucket.of(np.log(np.full(400, 0.45)), np.log(np.full(400, 0.5)))
    raw = engine("raw_logprobs")
    blind = judge_numbers(raw, Sampling(), at_one=off)
    assert "not_sampling_density" not in [r.code for r in blind]
    told = judge_numbers(raw, Sampling(temperature=1.0), at_one=off)
    assert "not_sampling_density" in [r.code for r in told]


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("top_p", "0.8", "processed_truncation"),
        ("top_k", "20", "processed_truncation"),
        ("min_p", "0.05", "processed_truncation"),
        ("repetition_penalty", "1.05", "processed_penalties"),
        ("temperature", "0.6", "not_scored_at_temperature"),
    ],
)
def test_known_defaults_count_as_if_they_had_been_sent(name: str, value: str, code: str) -> None:
    cutting = engine("processed_logprobs", NEUTRAL | {f"default_{name}": value})
    silent = judge_numbers(cutting, Sampling(), at_one=small())
    assert (worst(silent), silent[0].code) == ("no", code)
    sent = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
    assert [r.code for r in judge_numbers(cutting, sent, at_one=small())] == ["low_power"]


def test_a_default_temperature_is_the_one_to_compare_at() -> None:
    hot = engine("processed_logprobs", NEUTRAL | {"default_temperature": str(T)})
    one, requested = heated()
    found = judge_numbers(hot, Sampling(), at_one=one, at_requested=requested)
    assert [r.code for r in found] == ["scored_at_temperature"]
    assert headline_temperature(hot, Sampling(), at_one=one, at_requested=requested) == T


def test_what_was_sent_wins_over_the_default() -> None:
    settings = {"default_top_k": "20", "default_top_p": "not a number", "default_min_p": "nan"}
    found = engine("raw_logprobs", settings)
    sent = Sampling(temperature=0.5, seed=3)
    assert as_sampled(found, sent) == Sampling(temperature=0.5, seed=3, top_k=20)
    assert unsent(found, sent) == ["top_p", "min_p", "repetition_penalty"]


@pytest.mark.parametrize(
    ("asked", "effective"), [(None, 1.0), (0.0, 0.0), (1e-6, 0.01), (0.005, 0.01), (0.7, 0.7)]
)
def test_tiny_temperatures_are_raised_as_vllm_raises_them(
    asked: float | None, effective: float
) -> None:
    assert effective_temperature(asked) == effective
    found = headline_temperature(
        engine("processed_logprobs"),
        Sampling(temperature=asked),
        at_one=small(),
        at_requested=small(),
    )
    assert found == effective

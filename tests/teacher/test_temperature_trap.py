"""The example of a bias that is none, run: the bias is there, and is named for what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.temperature_trap import ANSWERS, Finding, run

CLOSE = 1e-5
"""Nats a token, float32: sampled with a cache, scored without."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finding]:
    root: Path = tmp_path_factory.mktemp("trap")
    return {one.name: one for one in run(root)}


def test_the_naive_comparison_finds_nats_that_are_not_there(found: dict[str, Finding]) -> None:
    honest, *scaled = found.values()
    assert abs(honest.naive_bias) < 1e-3
    for one in scaled:
        assert one.naive_bias < -4.0
        assert one.naive_bias == scaled[0].naive_bias, "the same answers"
        assert len(one.scores) == ANSWERS


def test_a_wrong_declaration_is_named_and_counts_as_no_drift(found: dict[str, Finding]) -> None:
    one = found["records after T, taken for raw"]
    assert one.verdicts == {"no"}
    reason = one.reasons["logprob_convention_mismatch"]
    assert reason.detail.startswith("declared raw_logprobs, so T = 1: mean|D| 0.")
    assert "but T = 0.7 fits" in reason.detail
    assert "--logprobs-mode" in reason.fix


@pytest.mark.parametrize(
    ("name", "code", "temperature"),
    [
        ("records before T, says so", "raw_logprobs_not_sampling_density", 1.0),
        ("records after T, says so", "scored_at_temperature", 0.7),
        ("records after T, says nothing", "logprobs_mode_inferred", 0.7),
    ],
)
def test_the_right_convention_shows_that_there_is_no_drift(
    found: dict[str, Finding], name: str, code: str, temperature: float
) -> None:
    one = found[name]
    assert one.verdicts == {"converted"}
    assert code in one.reasons
    assert {score.meta.temperature for score in one.scores} == {temperature}
    assert one.mean_abs < CLOSE

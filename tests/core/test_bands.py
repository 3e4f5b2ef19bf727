"""Colour bands at their edges."""

from __future__ import annotations

import pytest

from driftgate.bands import BANDS, MOE_FP8_SLACK, band, slack_of
from driftgate.glossary import METRICS, ROUTER_METRICS
from driftgate.trace import Engine

K3 = "kl_k3_rollout_train"


@pytest.mark.parametrize(
    ("metric", "value", "colour"),
    [
        (K3, 0.0, "green"),
        (K3, 9.9e-4, "green"),
        (K3, 1e-3, "amber"),
        (K3, 7e-3, "amber"),
        (K3, 1e-2, "red"),
        ("abs_log_ratio_mean", 0.019, "green"),
        ("abs_log_ratio_mean", 0.1, "red"),
        ("extreme_frac_tau2", 0.05, "amber"),
        ("router_set_disagree_rate", 0.1, "amber"),
        ("router_set_disagree_rate", 0.2, "red"),
        ("ess_kish_response", 0.99, "green"),
        ("ess_kish_response", 0.96, "amber"),
        ("ess_kish_response", 0.94, "red"),
        (K3, None, None),
        ("train_ppl", 3.0, None),
    ],
)
def test_colour(metric: str, value: float | None, colour: str | None) -> None:
    assert band(metric, value) == colour


def test_bad_tokens_are_never_green() -> None:
    assert band(K3, 0.0, n_bad_tokens=1) == "amber"
    assert band("ess_kish_response", 1.0, n_bad_tokens=1) == "amber"


def test_moe_and_fp8_widen_k3_alone() -> None:
    assert band(K3, 2e-3, slack=MOE_FP8_SLACK) == "green"
    assert band("abs_log_ratio_mean", 0.03, slack=MOE_FP8_SLACK) == "amber"


@pytest.mark.parametrize(
    ("settings", "routed", "slack"),
    [
        ({}, False, 1.0),
        ({}, True, MOE_FP8_SLACK),
        ({"quantization": "fp8"}, False, MOE_FP8_SLACK),
        ({"quantization": "fbgemm_fp8"}, True, MOE_FP8_SLACK),
        ({"dtype": "torch.float8_e4m3fn"}, False, MOE_FP8_SLACK),
        ({"quantization": "awq", "dtype": "bfloat16"}, False, 1.0),
    ],
)
def test_routes_and_fp8_are_what_widens_it(
    settings: dict[str, str], routed: bool, slack: float
) -> None:
    side = Engine(name="vllm", version="0.29.0", model="m", settings=settings)
    assert slack_of(side, routed=routed) == slack
    assert slack_of(None, routed=routed) == (MOE_FP8_SLACK if routed else 1.0)


def test_bands_are_of_metrics() -> None:
    assert set(BANDS) <= set(METRICS) | set(ROUTER_METRICS)

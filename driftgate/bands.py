"""Colour bands of METRICS 2: where a number is fine, to be watched, or a reason to stop.

Defaults of the field, not laws: print them beside the measured noise floor.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from driftgate.trace import Engine, Trainer

__all__ = ["BANDS", "GATED", "MOE_FP8_SLACK", "ROUTES", "Band", "Colour", "band", "slack_of"]

Colour = Literal["green", "amber", "red"]

MOE_FP8_SLACK = 2.5
"""Widening of the k3 band for MoE and for FP8 engines: METRICS says x2-3."""
FP8 = ("fp8", "float8")
"""In what an engine says of its quantisation or dtype: ``fp8``, ``fbgemm_fp8``,
``torch.float8_e4m3fn``."""


class Band(msgspec.Struct, frozen=True):
    """Green short of ``green``, red from ``red`` on, amber between.

    ``amber`` is the end of the field's amber: between it and ``red`` METRICS names no colour, and
    the answer stays amber: red should mean stop. Descending bands (effective sample sizes) are
    green at or above ``green`` and red below ``red``.
    """

    green: float
    amber: float
    red: float
    ascending: bool = True


ROUTES = "router_set_disagree_rate"

BANDS: dict[str, Band] = {
    "kl_k3_rollout_train": Band(1e-3, 5e-3, 1e-2),
    "abs_log_ratio_mean": Band(0.02, 0.05, 0.1),
    "extreme_frac_tau2": Band(1e-3, 1e-2, 0.1),
    ROUTES: Band(0.10, 0.20, 0.20),
    "ess_kish_response": Band(0.99, 0.95, 0.95, ascending=False),
}

GATED = ("kl_k3_rollout_train", "abs_log_ratio_mean", "extreme_frac_tau2", ROUTES)
"""Whose bands colour a score and sound an alarm, by the headline first."""


def band(
    metric: str, value: float | None, *, n_bad_tokens: int = 0, slack: float = 1.0
) -> Colour | None:
    """The colour of a metric's value; None where it is undefined or has no band.

    A bucket with bad tokens is never green. ``slack`` widens an ascending k3 band
    (`MOE_FP8_SLACK`); it does nothing elsewhere.
    """
    limits = BANDS.get(metric)
    if limits is None or value is None:
        return None
    if limits.ascending:
        scale = slack if metric == "kl_k3_rollout_train" else 1.0
        green, red = value < limits.green * scale, value >= limits.red * scale
    else:
        green, red = value >= limits.green, value < limits.red
    if red:
        return "red"
    return "green" if green and not n_bad_tokens else "amber"


def slack_of(side: Engine | Trainer | None, *, routed: bool) -> float:
    """How much wider the k3 band of a rollout is: ``routed``, it has routes, or FP8 is declared.

    ``side``: what sampled; None where that is not known.
    """
    said = () if side is None else (side.settings.get("quantization"), side.settings.get("dtype"))
    fp8 = any(name in (word or "").lower() for word in said for name in FP8)
    return MOE_FP8_SLACK if routed or fp8 else 1.0

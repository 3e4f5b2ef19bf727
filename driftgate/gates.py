"""Trainers' own gates: which of them would clip or drop a sample that this store holds.

A trainer that corrects for the mismatch of engine and trainer looks at ``rho = p_train /
p_rollout`` and clips a weight or drops a token or a response. Each gate here is one such rule with
the threshold that its project ships, named ``gate_*_clip_frac`` or ``gate_*_drop_frac`` as in
METRICS 2: the share of tokens, or of responses, that it catches. What a project's own settings
change is the user's business: a gate says what the shipped numbers would do.

Sources were read from the projects' public repositories at the version that each gate names.
NeMo-RL ships its truncation off and without a threshold (``truncated_importance_sampling_ratio:
null``), so it has no gate of its own; rules that look at the advantage are upper bounds, since no
advantage is known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = ["GATES", "SEQ_GATES", "TOKEN_GATES", "Gate", "seq_hits", "token_hits"]

F64 = npt.NDArray[np.float64]
Hits: TypeAlias = npt.NDArray[np.bool_]


class _Tokens(NamedTuple):
    """The compared tokens of one response."""

    d: F64
    """[n] nats, logp_train - logp_rollout."""
    prob_diff: F64
    """[n] p_train - p_rollout."""


def verl_tis(x: _Tokens) -> Hits:
    """Clips weights above 2.

    verl ``RolloutCorrectionConfig.decoupled_token_is(threshold=2.0)`` (main, 0482624); the same
    number in slime and miles (``--use-tis``, off; ``--tis-clip 2.0 --tis-clip-low 0``) and SkyRL
    (``tis_ratio_type="token"``, off; ``token_tis_ratio_clip_high = 2.0``).
    """
    return x.d > math.log(2.0)


def icepop(x: _Tokens) -> Hits:
    """Drops tokens outside [0.5, 5].

    verl ``decoupled_token_icepop(threshold=5.0, threshold_lower=0.5)`` (main, 0482624); IcePop of
    Ring-1T (arXiv 2510.18855). slime's ``icepop_function`` takes the bounds from --tis-clip.
    """
    return (x.d < math.log(0.5)) | (x.d > math.log(5.0))


def dppo(x: _Tokens) -> Hits:
    """Drops tokens whose probability moved by more than 0.2.

    prime-rl ``DefaultLossConfig`` (main, 2026): ``dppo_mask_low = dppo_mask_high = 0.2``, on by
    default; SkyRL ``DPPOConfig`` the same. They drop only the side that the advantage pushes
    further out; without advantages both are counted: an upper bound.
    """
    return np.abs(x.prob_diff) > 0.2


def areal(x: _Tokens) -> Hits:
    """Drops tokens above 5.

    AReaL ``RejectionSamplingConfig`` (main, 2026): level token, action mask, metric ratio,
    ``upper = 5.0``, no lower bound; in force once ``use_decoupled_loss`` and
    ``rejection_sampling`` are set.
    """
    return x.d > math.log(5.0)


def verl_seqtis(x: _Tokens) -> bool:
    """Clips the response's weight above 2.

    verl ``RolloutCorrectionConfig()`` (main, 0482624): ``rollout_is = "sequence"``,
    ``rollout_is_threshold = 2.0``: what the bare class does.
    """
    return float(x.d.sum()) > math.log(2.0)


def verl_seqrs(x: _Tokens) -> bool:
    """Drops responses whose weight is outside [0.5, 2].

    verl ``decoupled_seq_is_rs`` (main, 0482624): ``rollout_rs = "seq_sum_k1"``, threshold
    ``"0.5_2.0"``; SkyRL ``sequence_mask_metric="product"`` (off): ``product_mask_low/high`` the
    same.
    """
    return abs(float(x.d.sum())) > math.log(2.0)


def trl_seqmask(x: _Tokens) -> bool:
    """Drops responses whose weight is above 3.

    TRL ``GRPOConfig`` (1.10 to 1.12): ``vllm_importance_sampling_correction = True``, mode
    ``sequence_mask``, ``vllm_importance_sampling_clip_max = 3.0`` (``..._cap`` before), no lower
    bound: on by default where vLLM samples.
    """
    return float(x.d.sum()) > math.log(3.0)


def geo(x: _Tokens) -> bool:
    """Drops responses whose geometric mean ratio is outside [0.999, 1.001].

    verl ``decoupled_geo_rs`` and ``bypass_ppo_clip_geo_rs`` (main, 0482624): ``rollout_rs =
    "seq_mean_k1"``, threshold ``"0.999_1.001"``.
    """
    return not math.log(0.999) <= float(x.d.mean()) <= math.log(1.001)


def skyrl_geo(x: _Tokens) -> bool:
    """Drops responses whose geometric mean ratio is outside [0.99, 1.01].

    SkyRL ``OffPolicyCorrectionConfig`` (main, 2026): ``sequence_mask_metric="geometric"`` (off),
    ``geo_mask_low = 0.99``, ``geo_mask_high = 1.01``.
    """
    return not math.log(0.99) <= float(x.d.mean()) <= math.log(1.01)


def verl_k3rs(x: _Tokens) -> bool:
    """Drops responses whose mean k3 is above 0.01.

    verl ``bypass_ppo_clip_k3_rs`` (main, 0482624): ``rs_threshold = 0.01`` on ``seq_mean_k3``.
    """
    with np.errstate(over="ignore"):
        return float((np.expm1(x.d) - x.d).mean()) > 0.01


def veto(x: _Tokens) -> bool:
    """Drops responses with a token below 1e-4.

    SkyRL ``OffPolicyCorrectionConfig`` (main, 2026): ``outlier_token_is_threshold_low`` (off),
    1e-4 suggested; verl's ``rollout_token_veto_threshold`` (off, 1e-4 in its presets) until main
    dropped it (it is gone in 0482624).
    """
    return float(x.d.min()) < math.log(1e-4)


def opsm(x: _Tokens) -> bool:
    """Drops responses whose mean of logp_rollout - logp_train is above 1e-4.

    slime and miles ``--use-opsm`` (off), ``--opsm-delta 1e-4``, after DeepSeek-V3.2 (arXiv
    2512.02556, equation 9), with ``--use-rollout-logprobs``. Only responses of negative advantage
    are dropped: an upper bound.
    """
    return -float(x.d.mean()) > 1e-4


class Gate(msgspec.Struct, frozen=True, kw_only=True):
    """One rule, as the API shows it."""

    metric: str
    """``gate_{name}_{drop,clip}_frac``"""
    of: Literal["tokens", "responses"]
    action: Literal["clip", "drop"]
    rule: str
    """Its first sentence."""
    on: Literal["default", "preset", "option"]
    """``default``: in force unless switched off; ``preset``: a named preset of the project;
    ``option``: off until asked for, with this threshold."""
    source: str
    """Projects, versions and settings that it was read from."""


_ON: dict[str, Literal["default", "preset", "option"]] = {
    "gate_dppo_drop_frac": "default",
    "gate_trl_seqmask_drop_frac": "default",
    "gate_verl_seqtis_clip_frac": "preset",
    "gate_verl_tis_clip_frac": "preset",
    "gate_icepop_drop_frac": "preset",
    "gate_verl_seqrs_drop_frac": "preset",
    "gate_geo_drop_frac": "preset",
    "gate_verl_k3rs_drop_frac": "preset",
    "gate_veto_drop_frac": "option",
    "gate_areal_drop_frac": "option",
    "gate_skyrl_geo_drop_frac": "option",
    "gate_opsm_drop_frac": "option",
}

TOKEN_GATES: dict[str, Callable[[_Tokens], Hits]] = {
    "gate_verl_tis_clip_frac": verl_tis,
    "gate_icepop_drop_frac": icepop,
    "gate_dppo_drop_frac": dppo,
    "gate_areal_drop_frac": areal,
}
"""Metric -> rule that says of each token whether it is caught."""

SEQ_GATES: dict[str, Callable[[_Tokens], bool]] = {
    "gate_verl_seqtis_clip_frac": verl_seqtis,
    "gate_verl_seqrs_drop_frac": verl_seqrs,
    "gate_trl_seqmask_drop_frac": trl_seqmask,
    "gate_geo_drop_frac": geo,
    "gate_skyrl_geo_drop_frac": skyrl_geo,
    "gate_verl_k3rs_drop_frac": verl_k3rs,
    "gate_veto_drop_frac": veto,
    "gate_opsm_drop_frac": opsm,
}
"""Metric -> rule that says whether the response is caught."""


def token_hits(d: F64, prob_diff: F64) -> dict[str, int]:
    """How many of the tokens each token gate catches.

    ``d``: [n] nats; ``prob_diff``: [n] p_train - p_rollout; the compared tokens of one response.
    """
    return {name: int(gate(_Tokens(d, prob_diff)).sum()) for name, gate in TOKEN_GATES.items()}


def seq_hits(d: F64) -> dict[str, int]:
    """1 for each sequence gate that catches the response whose log ratios are ``d`` [n >= 1]."""
    x = _Tokens(d, np.zeros_like(d))
    return {name: int(gate(x)) for name, gate in SEQ_GATES.items()}


def _described(metric: str, rule: Callable[..., object]) -> Gate:
    first, _, source = (rule.__doc__ or "").partition("\n")
    return Gate(
        metric=metric,
        of="tokens" if metric in TOKEN_GATES else "responses",
        action="clip" if metric.endswith("_clip_frac") else "drop",
        rule=first,
        on=_ON[metric],
        source=" ".join(source.split()),
    )


GATES: dict[str, Gate] = {
    name: _described(name, rule) for name, rule in {**TOKEN_GATES, **SEQ_GATES}.items()
}
"""Every gate by metric, in the order that they are shown."""

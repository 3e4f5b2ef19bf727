"""The same numbers from elsewhere: plain Hugging Face, and METRICS 2 and 3 written out by hand.

Shares no code with driftgate: whole logits, softmax in float64, Python sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from driftgate.trace import Trace

F64 = npt.NDArray[np.float64]
Pair = tuple[F64, F64]
"""The trainer's and the engine's logprobs of one response, [R] nats."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What Hugging Face says of one trace's response of R tokens."""

    logprobs: F64
    """[R] nats."""
    entropy: F64
    """[R] nats."""
    at_temperature: F64 | None
    """[R] nats, under the logits divided by the temperature that the agent asked for."""
    experts: list[list[list[int]]]
    """[R][L][K] experts, the most probable first; no layers for a dense model."""
    margins: F64
    """[R, L] probability of the last chosen expert minus that of the first not chosen."""


class HuggingFace:
    """A checkpoint as its library loads it; one forward per trace."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
        self._model = model.eval()

    @torch.no_grad()
    def answer(self, trace: Trace) -> Answer:
        """Its numbers for ``trace``, whose last token is not fed: nothing is asked behind it."""
        assert trace.prompt_ids is not None
        assert trace.response_ids is not None
        ids = torch.from_numpy(np.concatenate([trace.prompt_ids, trace.response_ids])).long()
        first = len(trace.prompt_ids) - 1
        routed = {"output_router_logits": True} if hasattr(self._model, "num_experts") else {}
        given = self._model(input_ids=ids[None, :-1], use_cache=False, **routed)
        logits, target = given.logits[0, first:].double(), ids[first + 1 :, None]
        full = logits.log_softmax(-1)
        hot = trace.meta.sampling.temperature
        scaled = None if hot in (None, 1.0) else (logits / hot).log_softmax(-1)
        layers = (
            [layer[first:].float().softmax(-1) for layer in given.router_logits or ()]
            if routed
            else []
        )
        experts, margins = self._chosen(layers)
        return Answer(
            logprobs=full.gather(-1, target)[:, 0].numpy(),
            entropy=-(full.exp() * full).sum(-1).numpy(),
            at_temperature=None if scaled is None else scaled.gather(-1, target)[:, 0].numpy(),
            experts=experts,
            margins=margins,
        )

    def _chosen(self, layers: list[torch.Tensor]) -> tuple[list[list[list[int]]], F64]:
        if not layers:
            return [], np.zeros((0, 0))
        k = self._model.config.num_experts_per_tok
        top = torch.stack(layers, 1).topk(k + 1, dim=-1)
        margins = (top.values[..., k - 1] - top.values[..., k]).double().numpy()
        return top.indices[..., :k].tolist(), margins


def by_hand(pairs: Sequence[Pair]) -> dict[str, float]:
    """METRICS 2 over these responses, but for the quantiles."""
    t, r = (np.concatenate(side) for side in zip(*pairs, strict=True))
    d, p, q = t - r, np.exp(t), np.exp(r)
    w, diff, n = np.exp(d), np.abs(p - q), len(d)
    slope = np.polyfit(np.log(q / (1 - q)), np.log(p / (1 - p)), 1)[0]
    found: dict[str, Any] = {
        "n_tokens": n,
        "n_bad_tokens": 0,
        "kl_k1_rollout_train": -d.mean(),
        "kl_k2_rollout_train": (d * d).mean() / 2,
        "kl_k3_rollout_train": (w - 1 - d).mean(),
        "kl_train_rollout_is": (w * d - (w - 1)).mean(),
        "js_is": (0.5 * (w * d - (1 + w) * (np.log1p(w) - math.log(2)))).mean(),
        "tv_is": np.abs(w - 1).mean() / 2,
        "log_ratio_mean": d.mean(),
        "log_ratio_std": d.std(ddof=1),
        "abs_log_ratio_mean": np.abs(d).mean(),
        "abs_log_ratio_max": np.abs(d).max(),
        "mult_prob_error": np.exp(np.abs(d)).mean(),
        "prob_abs_diff_mean": diff.mean(),
        "prob_abs_diff_max": diff.max(),
        "prob_abs_diff_std": diff.std(ddof=1),
        "prob_pearson": np.corrcoef(q, p)[0, 1],
        "logodds_slope": slope,
        "chi2_token": (w * w).mean() - 1,
        "mean_weight_token": w.mean(),
        "mean_weight_token_se": w.std(ddof=1) / math.sqrt(n),
        "ess_kish_token": kish(w),
        "ess_chi2_token": 1 / (w * w).mean(),
        "ess_verl_token_trunc2": kish(w.clip(0.5, 2)),
        "gate_verl_tis_clip_frac": (w > 2).mean(),
        "gate_icepop_drop_frac": ((w < 0.5) | (w > 5)).mean(),
        "gate_dppo_drop_frac": (diff > 0.2).mean(),
        "gate_areal_drop_frac": (w > 5).mean(),
    }
    for tau in ("1.25", "2", "5", "10"):
        found[f"extreme_frac_tau{tau}"] = (np.maximum(w, 1 / w) > float(tau)).mean()
    return {name: float(value) for name, value in (found | _by_sequence(pairs)).items()}


def _by_sequence(pairs: Sequence[Pair]) -> dict[str, Any]:
    d = [t - r for t, r in pairs]
    sums, means = np.array([x.sum() for x in d]), np.array([x.mean() for x in d])
    t_mean, r_mean = (
        np.array([side.mean() for side in sides]) for sides in zip(*pairs, strict=True)
    )
    square = np.exp(2 * sums).mean()
    truncated = np.repeat(np.exp(sums).clip(0.5, 2), [len(x) for x in d])
    return {
        "n_seqs": len(d),
        "log_ratio_sum_mean": sums.mean(),
        "log_ratio_sum_std": sums.std(ddof=1),
        "train_ppl": np.exp(-t_mean).mean(),
        "rollout_ppl": np.exp(-r_mean).mean(),
        "log_ppl_diff": (r_mean - t_mean).mean(),
        "log_ppl_abs_diff": np.abs(r_mean - t_mean).mean(),
        "ppl_ratio": np.exp(r_mean - t_mean).mean(),
        "log1p_chi2_seq": np.log(square),
        "log_mean_weight_seq": np.log(np.exp(sums).mean()),
        "ess_inv_second_moment_seq": 1 / square,
        "log_ess_inv_second_moment_seq": -np.log(square),
        "ess_kish_response": np.mean([kish(np.exp(x.clip(-20, 20))) for x in d]),
        "ess_kish_seq": kish(np.exp(sums)),
        "ess_kish_seq_n": len(d),
        "ess_kish_geo": kish(np.exp(means)),
        "ess_verl_sequence_trunc2": kish(truncated),
        "gate_verl_seqtis_clip_frac": (np.exp(sums) > 2).mean(),
        "gate_trl_seqmask_drop_frac": (np.exp(sums) > 3).mean(),
        "gate_verl_seqrs_drop_frac": ((np.exp(sums) < 0.5) | (np.exp(sums) > 2)).mean(),
        "gate_geo_drop_frac": ((np.exp(means) < 0.999) | (np.exp(means) > 1.001)).mean(),
        "gate_skyrl_geo_drop_frac": ((np.exp(means) < 0.99) | (np.exp(means) > 1.01)).mean(),
        "gate_verl_k3rs_drop_frac": np.mean([(np.exp(x) - 1 - x).mean() > 0.01 for x in d]),
        "gate_opsm_drop_frac": (r_mean - t_mean > 1e-4).mean(),
        "gate_veto_drop_frac": np.mean([np.exp(x.min()) < 1e-4 for x in d]),
    }


QUANTILES = {"abs_log_ratio_p50": 0.5, "abs_log_ratio_p99": 0.99, "abs_log_ratio_p999": 0.999}


def nearest_rank(pairs: Sequence[Pair], q: float) -> float:
    """The ceil(q n)-th smallest |D|."""
    values = sorted(abs(x) for t, r in pairs for x in (t - r).tolist())
    return float(values[math.ceil(q * len(values)) - 1])


def kish(w: F64) -> float:
    """(sum w)^2 / (n sum w^2)."""
    return float(w.sum() ** 2 / (len(w) * (w @ w)))


Cell = tuple[list[int], list[int]]
"""The experts of engine and trainer for one token in one layer."""


def share(cells: Sequence[Cell], holds: Callable[[list[int], list[int]], float]) -> float:
    """Mean of ``holds`` over cells."""
    return math.fsum(holds(a, b) for a, b in cells) / len(cells)


ROUTER_BY_HAND: dict[str, Callable[[list[int], list[int]], float]] = {
    "router_set_disagree_rate": lambda a, b: set(a) != set(b),
    "router_expert_miss_rate": lambda a, b: 1 - len(set(a) & set(b)) / len(a),
    "router_jaccard_mean": lambda a, b: len(set(a) & set(b)) / len(set(a) | set(b)),
    "router_zero_overlap_rate": lambda a, b: not set(a) & set(b),
    "router_slot0_flip_rate": lambda a, b: a[0] != b[0],
}
"""METRICS 3, of one cell."""

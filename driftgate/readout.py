"""Reads the metrics of METRICS 2 off a `driftgate.mismatch.Bucket`, and says why one is missing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from driftgate.gates import SEQ_GATES, TOKEN_GATES
from driftgate.sums import MAX_EXPONENT, LogSum, kish

if TYPE_CHECKING:
    from driftgate.mismatch import Bucket

__all__ = ["Value", "read", "reasons"]

Value = float | int | None

QUANTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
TOKEN_HITS = (
    "extreme_frac_tau1.25",
    "extreme_frac_tau2",
    "extreme_frac_tau5",
    "extreme_frac_tau10",
    *TOKEN_GATES,
)
NEEDS_TWO_SEQS = ("log_ratio_sum_std", "ess_kish_seq", "ess_kish_geo")
NEEDS_TWO_TOKENS = ("log_ratio_std", "prob_abs_diff_std", "mean_weight_token_se")
NEEDS_VARIATION = ("prob_pearson", "logodds_slope")


def read(b: Bucket) -> dict[str, Value]:
    """Every metric by name, as `driftgate.glossary.METRICS` lists them; None where undefined."""
    counts: dict[str, Value] = {
        "n_tokens": b.n_tokens,
        "n_seqs": b.n_seqs,
        "n_bad_tokens": b.n_bad_tokens,
    }
    return counts | _divergences(b) | _ratios(b) | _probabilities(b) | _weights(b) | _ess(b)


def reasons(b: Bucket) -> dict[str, str]:
    """A sentence for every metric that is None."""
    return {name: _why(b, name) for name, value in read(b).items() if value is None}


def _why(b: Bucket, name: str) -> str:
    if not b.n_tokens:
        return f"no comparable token ({b.n_bad_tokens} bad)"
    if name in NEEDS_TWO_SEQS and b.n_seqs < 2:
        return "needs two sequences, has 1"
    if name in NEEDS_TWO_TOKENS and b.n_tokens < 2:
        return "needs two tokens, has 1"
    if name in TOKEN_HITS or name in SEQ_GATES:
        return "some of these were scored before this was counted: score them again"
    if name in NEEDS_VARIATION:
        return "one side does not vary over these tokens"
    return "beyond float64 for so large a log ratio: read the log_ form or the worst token"


def _share(hits: dict[str, int], name: str, n: int) -> float | None:
    return _over(hits[name], n) if name in hits else None


def _over(total: float, n: int) -> float | None:
    return total / n if n else None


def _divergences(b: Bucket) -> dict[str, Value]:
    n, linear = b.n_tokens, b.linear
    return {
        "kl_k1_rollout_train": 0.0 - b.log_ratio.mean if n else None,
        "kl_k2_rollout_train": _over(b.sum_sq / 2.0, n),
        "kl_k3_rollout_train": _over(linear.k3, n) if linear else None,
        "kl_train_rollout_is": _over(linear.kl_train, n) if linear else None,
        "js_is": _over(linear.js, n) if linear else None,
        "tv_is": _over(linear.tv, n) if linear else None,
    }


def _ratios(b: Bucket) -> dict[str, Value]:
    n, m = b.n_tokens, b.n_seqs
    out: dict[str, Value] = {
        "log_ratio_mean": b.log_ratio.mean if n else None,
        "log_ratio_std": b.log_ratio.std(),
        "log_ratio_sum_mean": b.log_ratio_sum.mean if m else None,
        "log_ratio_sum_std": b.log_ratio_sum.std(),
        "abs_log_ratio_mean": _over(b.sum_abs, n),
    }
    largest = abs(b.worst.log_ratio) if b.worst else None
    for name, q in QUANTILES.items():
        value = b.sketch.quantile(q)
        capped = value if value is None or largest is None else min(value, largest)
        out[f"abs_log_ratio_{name}"] = capped
    out["abs_log_ratio_max"] = largest
    out |= {name: _share(b.token_hits, name, n) for name in TOKEN_HITS}
    out |= {name: _share(b.seq_hits, name, m) for name in SEQ_GATES}
    out["mult_prob_error"] = b.mult.mean(n) if n else None
    return out


def _probabilities(b: Bucket) -> dict[str, Value]:
    n, m = b.n_tokens, b.n_seqs
    return {
        "prob_abs_diff_mean": b.prob_abs_diff.mean if n else None,
        "prob_abs_diff_max": b.prob_abs_diff_max if n else None,
        "prob_abs_diff_std": b.prob_abs_diff.std(),
        "prob_pearson": b.probs.correlation(),
        "logodds_slope": b.logits.slope(),
        "train_ppl": b.train_ppl.mean(m) if m else None,
        "rollout_ppl": b.rollout_ppl.mean(m) if m else None,
        "log_ppl_diff": _over(b.log_ppl_diff, m),
        "log_ppl_abs_diff": _over(b.log_ppl_abs_diff, m),
        "ppl_ratio": b.ppl_ratio.mean(m) if m else None,
    }


def _weights(b: Bucket) -> dict[str, Value]:
    n, m = b.n_tokens, b.n_seqs
    square = b.weight_sq.mean(n) if n else None
    spread = b.linear.excess.std() if b.linear else None
    return {
        "chi2_token": None if square is None else square - 1.0,
        "log1p_chi2_seq": b.seq_weight_sq.log_mean(m) if m else None,
        "mean_weight_token": b.weight.mean(n) if n else None,
        "mean_weight_token_se": None if spread is None else spread / math.sqrt(n),
        "log_mean_weight_seq": b.seq_weight.log_mean(m) if m else None,
    }


def _ess(b: Bucket) -> dict[str, Value]:
    n, m = b.n_tokens, b.n_seqs
    return {
        "ess_inv_second_moment_seq": _inverse_mean(b.seq_weight_sq, m) if m else None,
        "log_ess_inv_second_moment_seq": 0.0 - b.seq_weight_sq.log_mean(m) if m else None,
        "ess_kish_response": _over(b.kish_response, m),
        "ess_kish_seq": kish(b.seq_weight, b.seq_weight_sq, m) if m > 1 else None,
        "ess_kish_seq_n": m,
        "ess_kish_token": kish(b.weight, b.weight_sq, n),
        "ess_kish_geo": kish(b.geo_weight, b.geo_weight_sq, m) if m > 1 else None,
        "ess_chi2_token": _inverse_mean(b.weight_sq, n) if n else None,
        "ess_verl_token_trunc2": _truncated(b.trunc_token, b.trunc_token_sq, n),
        "ess_verl_sequence_trunc2": _truncated(b.trunc_seq, b.trunc_seq_sq, n),
    }


def _inverse_mean(square: LogSum, n: int) -> float | None:
    """1 / mean; None where float64 cannot hold it."""
    log_mean = square.log_mean(n)
    if abs(log_mean) > MAX_EXPONENT:
        return None
    mean = square.mean(n)
    return 1.0 / mean if mean else math.exp(-log_mean)


def _truncated(total: float, square: float, n: int) -> float | None:
    return min(total * total / (n * square), 1.0) if n else None

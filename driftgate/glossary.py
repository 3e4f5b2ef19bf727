"""What each metric is, how it reads and how it misleads: one table for API, CLI and docs.

Tested to name exactly what `Bucket.metrics` and `RouterBucket.metrics` return.
"""

from __future__ import annotations

import msgspec

from driftgate.gates import GATES

__all__ = ["METRICS", "ROUTER_METRICS", "Metric"]


class Metric(msgspec.Struct, frozen=True):
    """One metric. ``D = logp_train - logp_rollout``, ``L`` its sum per response, rho = e^D."""

    name: str
    formula: str
    reads: str
    """How to read it, and what others call it."""
    trap: str = ""
    unit: str = "1"


def _table(*rows: tuple[str, ...]) -> dict[str, Metric]:
    return {row[0]: Metric(*row) for row in rows}


METRICS: dict[str, Metric] = _table(
    ("n_tokens", "count", "tokens compared", "", "tokens"),
    ("n_seqs", "count", "responses with a compared token", "", "responses"),
    (
        "n_bad_tokens",
        "count of logprobs not finite, <= -9000 or > 1e-6 on either side",
        "left out of everything",
        "a bucket with any is never green",
        "tokens",
    ),
    (
        "kl_k1_rollout_train",
        "mean(-D)",
        "unbiased KL(rollout || train); verl kl, OpenRLHF vllm_kl, Tinker v1",
        "signed noise at small n: can be negative",
        "nats",
    ),
    ("kl_k2_rollout_train", "mean(D^2)/2", "low variance; Tinker v2", "biased for large D", "nats"),
    (
        "kl_k3_rollout_train",
        "mean(expm1(D) - D)",
        "the headline; prime-rl mismatch_kl, NeMo-RL gen_kl_error, verl k3_kl",
        "one token with large positive D dominates; unbiased only under the sampling density",
        "nats",
    ),
    (
        "kl_train_rollout_is",
        "mean(e^D D - expm1(D))",
        "KL(train || rollout) from rollout samples",
        "importance weighted: heavy tail",
        "nats",
    ),
    (
        "js_is",
        "mean(.5(e^D D - (1+e^D)(softplus(D) - ln 2)))",
        "Jensen-Shannon, at most ln 2",
        "importance weighted",
        "nats",
    ),
    ("tv_is", "mean|expm1(D)|/2", "total variation", "importance weighted"),
    ("log_ratio_mean", "mean(D)", "sign says who is more sure", "hides spread", "nats"),
    ("log_ratio_std", "std(D), n-1", "token noise", "", "nats"),
    ("log_ratio_sum_mean", "mean(L)", "per response", "grows with length", "nats"),
    ("log_ratio_sum_std", "std(L), n-1", "per response", "grows with length", "nats"),
    (
        "abs_log_ratio_mean",
        "mean|D|",
        "the plainest drift; slime, TRL",
        "averages away rare large tokens",
        "nats",
    ),
    ("abs_log_ratio_p50", "median |D|", "within 0.5 % (sketch, nearest rank)", "", "nats"),
    ("abs_log_ratio_p99", "99 % quantile of |D|", "within 0.5 %", "needs 100s of tokens", "nats"),
    ("abs_log_ratio_p999", "99.9 % quantile", "within 0.5 %", "is the max below 1000", "nats"),
    (
        "abs_log_ratio_max",
        "max|D|",
        "the observatory's max|log_ratio|; see the worst token",
        "grows with n: compare at equal n",
        "nats",
    ),
    ("extreme_frac_tau1.25", "P(max(rho, 1/rho) > 1.25)", "R3 paper's F(tau)"),
    ("extreme_frac_tau2", "P(max(rho, 1/rho) > 2)", "F(2) > 0.1 precedes collapse (R3)"),
    ("extreme_frac_tau5", "P(max(rho, 1/rho) > 5)", "rho outside [.2, 5]"),
    ("extreme_frac_tau10", "P(max(rho, 1/rho) > 10)", "R3 paper's F(10)"),
    (
        "mult_prob_error",
        "mean e^|D|",
        "NeMo-RL token_mult_prob_error; 1 is equal",
        "one token can dominate",
    ),
    (
        "prob_abs_diff_mean",
        "mean|p_train - p_rollout|",
        "verl rollout_probs_diff_mean",
        "blind to rare tokens",
    ),
    ("prob_abs_diff_max", "max|p_train - p_rollout|", "verl rollout_probs_diff_max"),
    ("prob_abs_diff_std", "std|p_train - p_rollout|, n-1", "verl rollout_probs_diff_std"),
    (
        "prob_pearson",
        "Pearson r of p_train, p_rollout",
        "verl rollout_actor_probs_pearson_corr",
        "stays near 1 through a temperature error",
    ),
    ("train_ppl", "mean over responses of e^(-mean logp_train)", "verl training_ppl"),
    ("rollout_ppl", "mean over responses of e^(-mean logp_rollout)", "verl rollout_ppl"),
    ("log_ppl_diff", "mean over responses of -mean(D)", "responses weigh equally", "", "nats"),
    ("log_ppl_abs_diff", "mean over responses of |mean(D)|", "verl log_ppl_abs_diff", "", "nats"),
    ("ppl_ratio", "mean over responses of e^(-mean D)", "verl ppl_ratio"),
    (
        "chi2_token",
        "mean e^2D - 1",
        "verl chi2_token, without its clamp",
        "can be negative at small n",
    ),
    (
        "log1p_chi2_seq",
        "log mean e^2L",
        "log(1 + verl chi2_seq)",
        "heavy tail; needs many responses",
    ),
    (
        "mean_weight_token",
        "mean e^D",
        "must be 1 within its error, else the recorded logprob is not the sampling density",
        "does not apply to raw logprobs at T != 1; low ESS makes its error too small",
    ),
    (
        "mean_weight_token_se",
        "std(e^D)/sqrt(n)",
        "e^D - 1 are martingale differences: tokens count singly",
    ),
    (
        "log_mean_weight_seq",
        "log mean e^L",
        "0 in expectation",
        "dominated by one response when long",
    ),
    *(
        (gate.metric, f"share of {gate.of}: {gate.rule}", gate.source, "the shipped threshold")
        for gate in GATES.values()
    ),
    (
        "ess_inv_second_moment_seq",
        "1 / mean e^2L",
        "the observatory's printed formula",
        "unbounded above; w^-2 at n = 1; only with E[w] = 1",
    ),
    (
        "log_ess_inv_second_moment_seq",
        "-log mean e^2L",
        "the same, when it leaves float64",
        "as above",
    ),
    (
        "ess_kish_response",
        "mean over responses of token Kish, D clamped to +-20",
        "the observatory's tiles",
        "blind to a constant shift: 1 when every D = -1",
    ),
    (
        "ess_kish_seq",
        "(sum e^L)^2 / (n sum e^2L)",
        "can sequence-level IS work here",
        "falls as e^(-T sigma^2)",
    ),
    ("ess_kish_seq_n", "count", "responses behind ess_kish_seq", "its floor is 1/n", "responses"),
    ("ess_kish_token", "(sum e^D)^2 / (n sum e^2D)", "token-level IS", "blind to a constant shift"),
    ("ess_kish_geo", "Kish over e^mean(D)", "GSPO-style weights", "blind to a constant shift"),
    (
        "ess_chi2_token",
        "1/(1 + chi2_token)",
        "verl parity, without its clamp",
        "exceeds 1 when E[w] < 1",
    ),
    (
        "ess_verl_token_trunc2",
        "Kish of clip(rho, 1/2, 2)",
        "verl rollout_is_eff_sample_size",
        "clamped: flatters",
    ),
    (
        "ess_verl_sequence_trunc2",
        "Kish of clip(e^L, 1/2, 2), token weighted",
        "verl, rollout_is = sequence",
        "never below .64, however wrong",
    ),
    (
        "logodds_slope",
        "least squares of logit p_train on logit p_rollout, p_rollout <= 1 - 1e-4",
        "1 when both are at one temperature",
        "about the ratio of temperatures, nearer to 1 on mixed text",
    ),
)

_SET = (
    ("router_set_disagree_rate", "mean 1[A != B as sets]", "primary; about .10 in the R3 paper"),
    ("router_expert_miss_rate", "mean 1 - |A & B|/K", "primary; graded, needs no order"),
    ("router_jaccard_mean", "mean |A & B|/|A | B|", "1 is equal"),
    (
        "router_zero_overlap_rate",
        "mean 1[A & B empty]",
        "the misalignment alarm; C(E-K,K)/C(E,K) for unrelated rows",
        "blind when 2K > E",
    ),
)

ROUTER_METRICS: dict[str, Metric] = _table(
    ("n_cells", "count", "valid (token, layer) pairs", "", "cells"),
    ("n_rows", "count", "tokens with a valid cell", "", "tokens"),
    ("n_excluded", "count", "cells that are no choice", "", "cells"),
    (
        "n_excluded_out_of_range",
        "count",
        "negative ids, or at or past the number of experts",
        "",
        "cells",
    ),
    ("n_excluded_all_zero", "count", "padding", "", "cells"),
    ("n_excluded_duplicate", "count", "an expert named twice", "", "cells"),
    *_SET,
    (
        "router_token_any_layer_rate",
        "mean over tokens of 1[any layer differs]",
        "",
        "saturates near 1",
    ),
    (
        "router_layers_disagree_per_token",
        "mean over tokens of layers that differ",
        "",
        "",
        "layers",
    ),
    ("router_top1_flip_rate", "mean 1[argmax differs]", "only where both sides prove their order"),
    (
        "router_slot0_flip_rate",
        "mean 1[slot 0 differs]",
        "legacy: the observatory's definition",
        "98.9 % on an unordered engine whose sets agree",
    ),
    (
        "router_worst_layer",
        "argmax of router_set_disagree_rate_by_layer",
        "layer number",
        "",
        "layer",
    ),
    ("layers", "absolute numbers", "what the by-layer vectors are over", "", "layer"),
    *((f"{row[0]}_by_layer", row[1] + ", by layer", *row[2:]) for row in _SET),
    ("router_slot0_flip_rate_by_layer", "mean 1[slot 0 differs], by layer", "legacy"),
    (
        "router_set_disagree_rate_by_position",
        "by bin of the response position, bin b is [2^b - 1, 2^(b+1) - 1)",
        "does drift grow along the response",
    ),
    (
        "router_flip_margin_mean",
        "mean of s_(K) - s_(K+1) where sets differ",
        "small: near ties",
        "",
        "score",
    ),
    ("router_flip_margin_near_tie_frac", "P(margin < 2^-6 | differ)", "share that is no drift"),
    ("router_flip_margin_near_tie_rate", "P(differ | margin < 2^-6)", "expected to be large"),
    (
        "router_flip_margin_clear_rate",
        "P(differ | margin >= 2^-6)",
        "drift that no rounding explains",
    ),
    ("router_tie_count", "count of margin = 0", "exact ties", "", "cells"),
    ("router_near_tie_count", "count of margin < 2^-6", "", "", "cells"),
)

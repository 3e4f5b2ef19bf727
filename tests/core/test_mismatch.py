"""Every metric of METRICS 2 against plain-Python formulas, written from the table, not the code."""

from __future__ import annotations

import math
from statistics import correlation, fmean, linear_regression, stdev
from typing import Any

import msgspec
import numpy as np
import pytest

from driftgate.glossary import METRICS
from driftgate.mismatch import Bucket, worst
from driftgate.sums import LogSum
from driftgate.sums import kish as kish_of

Sequences = list[tuple[list[float], list[float]]]


def sequences(seed: int = 0, noise: float = 0.4) -> Sequences:
    rng = np.random.default_rng(seed)
    out = []
    for length in (1, 7, 40, 113):
        rollout = np.log(rng.uniform(0.02, 0.98, length))
        train = np.minimum(rollout + rng.normal(0.02, noise, length), -1e-3)
        out.append((train.tolist(), rollout.tolist()))
    return out


def bucket_of(data: Sequences) -> Bucket:
    total = Bucket()
    for train, rollout in data:
        total = total.merge(Bucket.of(np.array(train), np.array(rollout)))
    return total


def mean(values: Any) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def kish(weights: list[float]) -> float:
    return math.fsum(weights) ** 2 / (len(weights) * math.fsum(w * w for w in weights))


def logit(lp: float) -> float:
    return math.log(math.exp(lp) / (1 - math.exp(lp)))


def clip(x: float, low: float, high: float) -> float:
    return max(low, min(high, x))


def nearest_rank(values: list[float], q: float) -> float:
    return sorted(values)[math.ceil(q * len(values)) - 1]


def token_formulas(data: Sequences) -> dict[str, float]:
    t = [x for train, _ in data for x in train]
    r = [x for _, rollout in data for x in rollout]
    d = [a - b for a, b in zip(t, r, strict=True)]
    dp = [abs(math.exp(a) - math.exp(b)) for a, b in zip(t, r, strict=True)]
    w = [math.exp(x) for x in d]
    out = {
        "n_tokens": len(d),
        "n_bad_tokens": 0,
        "kl_k1_rollout_train": mean(-x for x in d),
        "kl_k2_rollout_train": mean(x * x for x in d) / 2,
        "kl_k3_rollout_train": mean(math.exp(x) - 1 - x for x in d),
        "kl_train_rollout_is": mean(math.exp(x) * x - math.exp(x) + 1 for x in d),
        "js_is": mean(
            0.5 * (math.exp(x) * x - (1 + math.exp(x)) * math.log((1 + math.exp(x)) / 2)) for x in d
        ),
        "tv_is": mean(abs(math.exp(x) - 1) for x in d) / 2,
        "log_ratio_mean": mean(d),
        "log_ratio_std": stdev(d),
        "abs_log_ratio_mean": mean(map(abs, d)),
        "abs_log_ratio_max": max(map(abs, d)),
        "mult_prob_error": mean(math.exp(abs(x)) for x in d),
        "prob_abs_diff_mean": mean(dp),
        "prob_abs_diff_max": max(dp),
        "prob_abs_diff_std": stdev(dp),
        "prob_pearson": correlation([math.exp(x) for x in r], [math.exp(x) for x in t]),
        "logodds_slope": linear_regression([logit(x) for x in r], [logit(x) for x in t]).slope,
        "chi2_token": mean(x * x for x in w) - 1,
        "mean_weight_token": mean(w),
        "mean_weight_token_se": stdev(w) / math.sqrt(len(w)),
        "ess_kish_token": kish(w),
        "ess_chi2_token": 1 / mean(x * x for x in w),
        "ess_verl_token_trunc2": kish([clip(x, 0.5, 2) for x in w]),
        "gate_verl_tis_clip_frac": mean(x > 2.0 for x in w),
        "gate_icepop_drop_frac": mean(x < 0.5 or x > 5.0 for x in w),
        "gate_dppo_drop_frac": mean(x > 0.2 for x in dp),
        "gate_areal_drop_frac": mean(x > 5.0 for x in w),
    }
    for name, tau in (("1.25", 1.25), ("2", 2.0), ("5", 5.0), ("10", 10.0)):
        out[f"extreme_frac_tau{name}"] = mean(max(x, 1 / x) > tau for x in w)
    return out


def sequence_formulas(data: Sequences) -> dict[str, float]:
    d = [[a - b for a, b in zip(t, r, strict=True)] for t, r in data]
    sums = [math.fsum(x) for x in d]
    means = [mean(x) for x in d]
    ppl_diff = [mean(r) - mean(t) for t, r in data]
    truncated = [
        clip(math.exp(clip(s, -20, 20)), 0.5, 2) for s, x in zip(sums, d, strict=True) for _ in x
    ]
    square = mean(math.exp(2 * s) for s in sums)
    return {
        "n_seqs": len(data),
        "log_ratio_sum_mean": mean(sums),
        "log_ratio_sum_std": stdev(sums),
        "train_ppl": mean(math.exp(-mean(t)) for t, _ in data),
        "rollout_ppl": mean(math.exp(-mean(r)) for _, r in data),
        "log_ppl_diff": mean(ppl_diff),
        "log_ppl_abs_diff": mean(map(abs, ppl_diff)),
        "ppl_ratio": mean(math.exp(x) for x in ppl_diff),
        "log1p_chi2_seq": math.log(square),
        "log_mean_weight_seq": math.log(mean(math.exp(s) for s in sums)),
        "ess_inv_second_moment_seq": 1 / square,
        "log_ess_inv_second_moment_seq": -math.log(square),
        "ess_kish_response": mean(kish([math.exp(clip(x, -20, 20)) for x in seq]) for seq in d),
        "ess_kish_seq": kish([math.exp(s) for s in sums]),
        "ess_kish_seq_n": len(data),
        "ess_kish_geo": kish([math.exp(x) for x in means]),
        "ess_verl_sequence_trunc2": kish(truncated),
        "gate_verl_seqtis_clip_frac": mean(math.exp(s) > 2 for s in sums),
        "gate_trl_seqmask_drop_frac": mean(math.exp(s) > 3 for s in sums),
        "gate_verl_seqrs_drop_frac": mean(not 0.5 <= math.exp(s) <= 2 for s in sums),
        "gate_geo_drop_frac": mean(not 0.999 <= math.exp(x) <= 1.001 for x in means),
        "gate_skyrl_geo_drop_frac": mean(not 0.99 <= math.exp(x) <= 1.01 for x in means),
        "gate_verl_k3rs_drop_frac": mean(mean(math.exp(x) - 1 - x for x in q) > 0.01 for q in d),
        "gate_opsm_drop_frac": mean(-x > 1e-4 for x in means),
        "gate_veto_drop_frac": mean(min(math.exp(x) for x in seq) < 1e-4 for seq in d),
    }


FORMULAS = token_formulas(sequences()) | sequence_formulas(sequences())
QUANTILES = {"abs_log_ratio_p50": 0.5, "abs_log_ratio_p99": 0.99, "abs_log_ratio_p999": 0.999}


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_metric_equals_its_formula(name: str) -> None:
    assert bucket_of(sequences()).metrics()[name] == pytest.approx(FORMULAS[name], rel=1e-11)


@pytest.mark.parametrize("name", sorted(QUANTILES))
def test_quantile_within_half_a_percent(name: str) -> None:
    d = [abs(a - b) for t, r in sequences() for a, b in zip(t, r, strict=True)]
    expected = nearest_rank(d, QUANTILES[name])
    assert bucket_of(sequences()).metrics()[name] == pytest.approx(expected, rel=0.005)


def test_every_metric_has_a_formula_here_and_an_entry_in_the_glossary() -> None:
    names = set(Bucket().metrics())
    assert names == set(FORMULAS) | set(QUANTILES)
    assert names == set(METRICS)
    assert all(METRICS[name].name == name and METRICS[name].formula for name in names)


def test_no_metric_is_called_ess() -> None:
    assert not {"ess", "effective_sample_size"} & set(Bucket().metrics())


def test_identical_sides_are_exactly_zero_and_one() -> None:
    lp = np.log(np.random.default_rng(1).uniform(0.01, 0.9, 333)).astype(np.float32)
    values = Bucket.of(lp, lp).merge(Bucket.of(lp[:100], lp[:100])).metrics()
    zero = [n for n in METRICS if n.startswith(("kl_", "js", "tv", "log_", "abs_", "chi2", "gate"))]
    assert {values[name] for name in zero} == {0.0}
    assert {v for n, v in values.items() if n.startswith("ess_") and n != "ess_kish_seq_n"} == {1.0}
    assert values["mean_weight_token"] == values["logodds_slope"] == 1.0


def test_token_kish_is_blind_to_a_constant_shift() -> None:
    lp = np.full(50, -3.0)
    values = Bucket.of(lp - 1.0, lp).metrics()
    assert values["ess_kish_token"] == pytest.approx(1.0, abs=1e-15)
    assert values["ess_kish_response"] == pytest.approx(1.0, abs=1e-15)
    assert values["abs_log_ratio_mean"] == 1.0


@pytest.mark.parametrize(("length", "expected"), [(128, 0.95), (1000, 0.67), (8000, 0.04)])
def test_sequence_ess_falls_as_exp_of_minus_t_sigma_squared(length: int, expected: float) -> None:
    sums = np.random.default_rng(3).normal(0, 0.02 * math.sqrt(length), 400_000)
    value = kish_of(LogSum.of(sums), LogSum.of(2 * sums), sums.size)
    # with 8000 tokens the second moment is itself hard to sample: e^(4 sigma^2 T) is 4e5
    rel = 0.02 if length < 8000 else 0.35
    assert value == pytest.approx(math.exp(-length * 0.02**2), rel=rel)
    assert math.exp(-length * 0.02**2) == pytest.approx(expected, abs=0.005)


def test_observatory_ess_is_w_to_the_minus_two_at_n_1() -> None:
    values = Bucket.of(np.array([-2.0, -1.0]), np.array([-1.5, -1.2])).metrics()
    assert values["ess_inv_second_moment_seq"] == pytest.approx(math.exp(-2 * (-0.5 + 0.2)))
    assert values["ess_kish_seq"] is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -9000.0, -9999.0, 1.1e-6])
@pytest.mark.parametrize("side", [0, 1])
def test_bad_tokens_are_counted_and_left_out(bad: float, side: int) -> None:
    both = [np.array([-1.0, -2.0, -0.5]), np.array([-1.1, -2.2, -0.4])]
    clean = Bucket.of(both[0][[0, 2]], both[1][[0, 2]])
    both[side][1] = bad
    bucket = Bucket.of(both[0], both[1])
    assert bucket.n_bad_tokens == 1
    expected = clean.metrics() | {"n_bad_tokens": 1}
    assert bucket.metrics() == expected


def test_rounding_above_zero_is_a_probability_of_one() -> None:
    assert Bucket.of(np.array([1e-7]), np.array([0.0])).n_tokens == 1


def test_masked_tokens_are_neither_compared_nor_bad() -> None:
    train, rollout = np.array([-1.0, math.nan, -2.0]), np.array([-1.5, -1.0, -2.0])
    bucket = Bucket.of(train, rollout, np.array([True, False, True]))
    assert (bucket.n_tokens, bucket.n_bad_tokens) == (2, 0)


def test_all_tokens_bad_leaves_nothing_but_the_count() -> None:
    bucket = Bucket.of(np.array([math.nan, -9999.0]), np.array([-1.0, -1.0]))
    assert (bucket.n_tokens, bucket.n_seqs, bucket.n_bad_tokens) == (0, 0, 2)
    assert bucket.undefined()["kl_k3_rollout_train"] == "no comparable token (2 bad)"


def test_shapes_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3,\)"):
        Bucket.of(np.zeros(3), np.zeros(2))


@pytest.mark.parametrize("d", [-1000.0, -400.0, 340.0, 400.0, 1000.0])
def test_huge_ratios_never_leave_as_infinity(d: float) -> None:
    rollout = np.array([-1.0 - max(d, 0.0), -1.0])
    bucket = Bucket.of(rollout + np.array([d, 0.0]), rollout).merge(Bucket.of(rollout, rollout))
    values = bucket.metrics()
    encoded = msgspec.json.encode({"bucket": bucket, "metrics": values})
    assert all(v is None or math.isfinite(v) for v in values.values())
    assert set(bucket.undefined()) == {name for name, v in values.items() if v is None}
    assert msgspec.json.decode(msgspec.json.encode(bucket), type=Bucket) == bucket
    assert b"NaN" not in encoded
    assert b"nfinity" not in encoded
    assert values["log1p_chi2_seq"] == pytest.approx(max(2 * d, 0.0) - math.log(2), abs=1e-9)
    # three weights: e^d, 1, 1, 1 of four tokens
    assert values["ess_kish_token"] == pytest.approx(0.25 if d > 0 else 0.75)


def test_overflowing_sums_say_so_and_the_log_domain_goes_on() -> None:
    bucket = Bucket.of(np.array([-1.0, -1.0]), np.array([-901.0, -1.0]))
    reasons = bucket.undefined()
    assert reasons["kl_k3_rollout_train"].startswith("beyond float64")
    assert bucket.metrics()["log_mean_weight_seq"] == 900.0


def test_an_inverse_that_underflows_is_not_0() -> None:
    values = Bucket.of(np.array([-1.0, -1.0]), np.array([-801.0, -1.0]))
    for name in ("ess_inv_second_moment_seq", "ess_chi2_token"):
        assert values.metrics()[name] is None
        assert values.undefined()[name].startswith("beyond float64")
    assert values.metrics()["log_ess_inv_second_moment_seq"] == -1600.0


def test_tiny_differences_keep_their_divergences() -> None:
    d = 1e-7
    values = Bucket.of(np.array([-1.0 + d, -1.0 - d]), np.array([-1.0, -1.0])).metrics()
    for name, expected in (
        ("kl_k2_rollout_train", d * d / 2),
        ("kl_k3_rollout_train", d * d / 2),
        ("kl_train_rollout_is", d * d / 2),
        ("js_is", d * d / 8),
    ):
        # the logprobs themselves carry 1e-16 / 1e-7
        assert values[name] == pytest.approx(expected, rel=1e-7), name


def test_worst_is_located_in_the_response_and_travels_through_merges() -> None:
    train, rollout = np.array([-1.0, -2.0, -5.0, math.nan]), np.array([-1.1, -2.0, -3.0, -1.0])
    ids = np.array([11, 12, 13, 14])
    found = worst(train, rollout, ids, trace_id="a.0")
    assert found is not None
    assert (found.token_index, found.token_id, found.log_ratio) == (2, 13, -2.0)
    assert (found.train_logprob, found.rollout_logprob) == (-5.0, -3.0)
    bucket = Bucket.of(train, rollout, token_ids=ids, trace_id="a.0")
    other = Bucket.of(rollout[:2], train[:2], token_ids=ids, trace_id="b.0")
    assert bucket.merge(other).worst == other.merge(bucket).worst == found


def test_worst_of_nothing_is_none() -> None:
    assert worst(np.array([math.nan]), np.array([-1.0]), np.array([3])) is None


@pytest.mark.parametrize("n", [1, 3, 7, 100])
def test_a_side_that_does_not_vary_has_no_correlation(n: int) -> None:
    rollout = np.full(n, math.log(0.1))
    train = rollout + np.linspace(0.0, 0.1, n)
    reasons = Bucket.of(train, rollout).undefined()
    assert reasons["logodds_slope"] == reasons["prob_pearson"]
    assert "vary" in reasons["logodds_slope"]


def test_certain_tokens_do_not_make_the_slope() -> None:
    rng = np.random.default_rng(5)
    rollout = np.log(rng.uniform(0.05, 0.95, 300))
    train = np.log(np.exp(rollout) ** 0.7)
    alone = Bucket.of(train, rollout).metrics()["logodds_slope"]
    certain = np.zeros(100)
    mixed = Bucket.of(np.append(train, certain), np.append(rollout, certain))
    assert mixed.metrics()["logodds_slope"] == alone
    assert fmean([mixed.logits.n]) == 300

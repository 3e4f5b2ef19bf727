"""The verdict: facts, numbers, and the simulated signatures of METRICS 4."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from driftgate import evidence
from driftgate.codes import CODES, SEVERITY
from driftgate.comparable import headline_temperature, judge
from driftgate.facts import NEUTRAL_DEFAULTS
from driftgate.mismatch import Bucket
from driftgate.router import RouterBucket, route_shift
from driftgate.trace import Comparable, Engine, Reason, Sampling, TraceMeta, Trainer, WeightSpan
from driftgate.weights import changed, joined

F64 = npt.NDArray[np.float64]
T = 0.7


NEUTRAL = {f"default_{name}": str(value) for name, value in NEUTRAL_DEFAULTS.items()}


def engine(
    mode: str = "raw_logprobs", *, defaults: dict[str, str] = NEUTRAL, **fields: Any
) -> Engine:
    """An engine whose sampling ``defaults`` are known: neutral ones unless given."""
    base = {"name": "vllm", "version": "0.29.0", "model": "m", "logprobs_mode": mode}
    settings = {"settings": defaults | fields.pop("settings", {})}
    return msgspec.convert(base | fields | settings, Engine)


def meta(mode: str = "raw_logprobs", sampling: Sampling | None = None, **fields: Any) -> TraceMeta:
    base: dict[str, Any] = {
        "trace_id": "c.0",
        "call_id": "c",
        "trajectory": "t",
        "step": 0,
        "choice": 0,
        "api": "chat",
        "model": "m",
        "attribution": "url",
        "engine": engine(mode),
        "sampling": sampling or Sampling(temperature=1.0),
        "streamed": False,
        "started_ns": 0,
        "ended_ns": 1,
        "weight_version": "7",
    }
    return TraceMeta(**(base | fields))


TRAINER = Trainer(backend="reference", model="m", dtype="float32", settings={"weight_version": "7"})


def codes(result: Comparable) -> list[str]:
    return [reason.code for reason in result.reasons]


def log_softmax(z: F64) -> F64:
    z = z - z.max(axis=-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)))


def nucleus(lp: F64, mass: float) -> F64:
    """[n, V] renormalised log-probabilities of the smallest set with at least ``mass``."""
    order = np.argsort(-lp, axis=-1)
    sorted_p = np.take_along_axis(np.exp(lp), order, -1)
    keep = np.empty(lp.shape, dtype=np.bool_)
    np.put_along_axis(keep, order, np.cumsum(sorted_p, -1) - sorted_p < mass, -1)
    kept = np.where(keep, lp, -np.inf)
    return np.asarray(kept - np.log(np.exp(kept).sum(axis=-1, keepdims=True)))


@cache
def simulated() -> dict[str, Bucket]:
    """Signatures of METRICS 4: V = 2000, T = .7, logits of std 1 to 9, noise .042.

    Named trainer_engine; the tokens are sampled at T (``scaled``, ``raw``) or from top-p .9 at T.
    """
    rng = np.random.default_rng(0)
    columns: dict[str, tuple[list[F64], list[F64]]] = {}

    def add(name: str, train: F64, rollout: F64, token: npt.NDArray[np.intp]) -> None:
        t, r = columns.setdefault(name, ([], []))
        at = np.arange(len(token))
        t.append(train[at, token])
        r.append(rollout[at, token])

    for _ in range(8):
        z = rng.normal(size=(500, 2000)) * rng.uniform(1, 9, (500, 1))
        noisy = z + rng.normal(0, 0.042, z.shape)
        gumbel = rng.gumbel(size=z.shape)
        raw, scaled, cut = log_softmax(z), log_softmax(z / T), nucleus(log_softmax(z / T), 0.9)
        train_one, train_t = log_softmax(noisy), log_softmax(noisy / T)
        token = (scaled + gumbel).argmax(axis=-1)
        for name, rollout in (("raw", raw), ("scaled", scaled)):
            add(f"one_{name}", train_one, rollout, token)
            add(f"T_{name}", train_t, rollout, token)
        other = log_softmax(rng.normal(size=z.shape) * 3.0)
        add("other_scaled", other, scaled, token)
        token = (cut + gumbel).argmax(axis=-1)
        add("one_cut", train_one, cut, token)
        add("T_cut", train_t, cut, token)
    return {name: Bucket.of(*map(np.concatenate, both)) for name, both in columns.items()}


@pytest.mark.parametrize(
    ("pairing", "mean_d", "k3", "weight", "slope"),
    [
        ("T_scaled", -0.001, 0.0009, -0.0004, 1.00),
        ("one_scaled", -0.130, 0.114, -0.016, 0.79),
        ("T_raw", 0.127, 0.111, 0.24, 1.24),
        ("T_cut", -0.062, 0.0035, -0.058, 0.96),
    ],
)
def test_signatures_of_the_four_pairings(
    pairing: str, mean_d: float, k3: float, weight: float, slope: float
) -> None:
    """The distribution behind METRICS' table is not given; the signatures agree to its scale."""
    values = simulated()[pairing].metrics()
    assert values["log_ratio_mean"] == pytest.approx(mean_d, abs=0.02)
    assert values["kl_k3_rollout_train"] == pytest.approx(k3, rel=0.25)
    mean, error = values["mean_weight_token"], values["mean_weight_token_se"]
    assert mean is not None
    assert error is not None
    assert mean - 1 == pytest.approx(weight, abs=0.04 + 2 * error)
    assert values["logodds_slope"] == pytest.approx(slope, abs=0.02)


AT_T = Sampling(temperature=T)


def verdict(mode: str, rollout: str, sampling: Sampling = AT_T) -> Comparable:
    data = simulated()
    return judge(
        meta(mode, sampling),
        TRAINER,
        at_one=data[f"one_{rollout}"],
        at_requested=data[f"T_{rollout}"],
    )


def test_right_pairings_are_converted_and_say_under_what() -> None:
    processed = verdict("processed_logprobs", "scaled")
    assert (processed.verdict, codes(processed)) == ("converted", ["scored_at_temperature"])
    raw = verdict("raw_logprobs", "raw")
    assert (raw.verdict, codes(raw)) == ("converted", ["raw_logprobs_not_sampling_density"])
    assert "temperature=0.7" in raw.reasons[0].detail


def test_scaled_logprobs_declared_raw_name_the_temperature_that_fits() -> None:
    result = verdict("raw_logprobs", "scaled")
    assert result.verdict == "no"
    mismatch = next(r for r in result.reasons if r.code == "logprob_convention_mismatch")
    assert "but T = 0.7 fits" in mismatch.detail


def test_raw_logprobs_declared_processed_name_t_1() -> None:
    result = verdict("processed_logprobs", "raw")
    assert result.verdict == "no"
    mismatch = next(r for r in result.reasons if r.code == "logprob_convention_mismatch")
    assert "but T = 1 fits" in mismatch.detail


@pytest.mark.parametrize(
    ("rollout", "says", "headline"), [("raw", "raw", 1.0), ("scaled", "processed", T)]
)
def test_an_undeclared_mode_is_inferred_where_both_temperatures_tell(
    rollout: str, says: str, headline: float
) -> None:
    result = verdict("unknown", rollout)
    inferred = next(r for r in result.reasons if r.code == "logprobs_mode_inferred")
    assert inferred.detail.startswith(says)
    assert result.verdict == "converted"
    data = simulated()
    found = headline_temperature(
        engine("unknown"), AT_T, at_one=data[f"one_{rollout}"], at_requested=data[f"T_{rollout}"]
    )
    assert found == headline


def test_truncation_that_was_declared_is_a_no_by_name() -> None:
    cut = Sampling(temperature=T, top_p=0.9)
    result = verdict("processed_logprobs", "cut", cut)
    assert (result.verdict, codes(result)[0]) == ("no", "processed_truncation")


def test_truncation_that_nobody_declared_fails_the_mean_weight_test() -> None:
    result = verdict("processed_logprobs", "cut")
    assert result.verdict == "no"
    assert "not_sampling_density" in codes(result)


def heavy(seed: int) -> Bucket:
    """A valid pair, E[e^D] = 1, whose log ratios are far off at one token of twenty."""
    rng = np.random.default_rng(seed)
    sigma = np.where(rng.random(1000) < 0.05, 2.0, 0.02)
    d = rng.normal(-(sigma**2) / 2, sigma)
    rollout = -rng.exponential(1.0, 1000) - 0.01 - np.maximum(d, 0.0)
    return Bucket.of(rollout + d, rollout)


def test_heavy_tailed_drift_is_no_other_density() -> None:
    """The rare large weights are not in the sample: its mean is low, its error too small."""
    found = [evidence.tests(heavy(seed), is_density=True) for seed in range(60)]
    codes = [{reason.code for reason in reasons} for reasons in found]
    assert "not_sampling_density" not in set[str]().union(*codes)
    assert codes.count({"low_power"}) > 10
    short = next(r for reasons in found for r in reasons if "leaves a sample short" in r.detail)
    assert short.code == "low_power"


def test_a_cut_density_is_found_below_drift_that_is_not_heavy_tailed() -> None:
    cut = Bucket.of(np.full(400, -1.0), np.full(400, -1.0) - math.log(0.9))
    (reason,) = evidence.tests(cut, is_density=True)
    assert reason.code == "not_sampling_density"


def test_noise_on_the_engines_side_is_no_temperature() -> None:
    """The numbers of `test_explain`: slope .855 is correlation^2, as noise in x gives."""
    rng = np.random.default_rng(5)
    odds = rng.normal(0, 2.0, 800)
    noisy = odds + np.random.default_rng(6).normal(0, 0.8, 800)
    bucket = Bucket.of(-np.logaddexp(0, -odds), -np.logaddexp(0, -noisy))
    assert bucket.logits.slope() == pytest.approx(0.855, abs=1e-3)
    assert not evidence.slope_is_off(bucket.logits)
    assert evidence.tests(bucket, is_density=False) == []


def test_a_hidden_temperature_is_seen_in_the_slope() -> None:
    """Agent sends no temperature, the engine's default is .7: nothing but the numbers can tell."""
    trace = meta(sampling=Sampling(), engine=engine("processed_logprobs", defaults={}))
    result = judge(trace, TRAINER, at_one=simulated()["one_scaled"])
    assert result.verdict == "no"
    assert "logodds_slope_off" in codes(result)
    assert "sampling_default_assumed" in codes(result)


def test_digests_that_differ_refuse_only_numbers_that_do_too() -> None:
    trace = meta(engine=engine(checkpoint="a"))
    trainer = msgspec.structs.replace(TRAINER, checkpoint="b")
    result = judge(trace, trainer, at_one=small(40, d=0.001))
    assert (result.verdict, codes(result)[0]) == ("yes", "checkpoint_digest_differs")
    assert "mean|D| 0.001" in result.reasons[0].detail
    for unlike in (small(40, d=0.05), small(20, d=0.001)):
        assert judge(trace, trainer, at_one=unlike).verdict == "no"


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_another_checkpoint_is_suspected_and_not_called_a_temperature(mode: str) -> None:
    wrong = simulated()["other_scaled"]
    result = judge(meta(mode), TRAINER, at_one=wrong)
    assert result.verdict == "no"
    assert codes(result) == ["checkpoint_mismatch_suspected"]


def test_plain_sampling_with_good_numbers_is_a_plain_yes() -> None:
    """What is sampled at T = 1 has one meaning, declared or not."""
    good = simulated()["T_scaled"]  # a right pairing, whatever its temperature is called
    for mode in ("raw_logprobs", "processed_logprobs", "unknown"):
        result = judge(meta(mode), TRAINER, at_one=good)
        assert (result.verdict, codes(result)) == ("yes", [])


def small(n: int = 20, d: float = 0.01) -> Bucket:
    rollout = np.log(np.random.default_rng(n).uniform(0.1, 0.9, n))
    return Bucket.of(rollout + d, rollout)


def test_few_tokens_are_not_tested_and_it_says_so() -> None:
    result = judge(meta(), TRAINER, at_one=small())
    assert (result.verdict, codes(result)) == ("yes", ["low_power"])
    assert "20" in result.reasons[0].detail


CONSTRAINED = {
    "processed_truncation": Sampling(temperature=1.0, top_k=50),
    "processed_penalties": Sampling(temperature=1.0, repetition_penalty=1.1),
    "processed_logit_bias": Sampling(temperature=1.0, logit_bias=True),
    "processed_min_tokens": Sampling(temperature=1.0, min_tokens=5),
}


@pytest.mark.parametrize("code", sorted(CONSTRAINED))
def test_constraints_spoil_processed_logprobs_convert_raw_ones_and_need_a_mode(code: str) -> None:
    sampling = CONSTRAINED[code]
    processed = judge(meta("processed_logprobs", sampling), TRAINER, at_one=small())
    assert (processed.verdict, codes(processed)[0]) == ("no", code)
    raw = judge(meta("raw_logprobs", sampling), TRAINER, at_one=small())
    assert (raw.verdict, codes(raw)[0]) == ("converted", "raw_logprobs_not_sampling_density")
    unknown = judge(meta("unknown", sampling), TRAINER, at_one=small())
    assert (unknown.verdict, codes(unknown)[0]) == ("no", "logprobs_mode_unknown")


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", "unknown"])
def test_a_grammar_spoils_logprobs_of_any_mode_and_blames_no_checkpoint(mode: str) -> None:
    rng = np.random.default_rng(0)
    masked = Bucket.of(np.log(rng.uniform(1e-14, 1e-10, 100)), np.log(rng.uniform(0.3, 1, 100)))
    sampling = Sampling(temperature=0.7, structured="tool_choice=required")
    result = judge(meta(mode, sampling), TRAINER, at_one=masked, at_requested=masked)
    assert (result.verdict, codes(result)) == ("no", ["grammar_masked"])


def test_neutral_settings_are_no_constraint() -> None:
    neutral = Sampling(temperature=1.0, top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0)
    assert judge(meta("processed_logprobs", neutral), TRAINER, at_one=small()).verdict == "yes"


def test_sglang_scales_before_it_truncates() -> None:
    trace = meta(sampling=Sampling(temperature=1.0, top_p=0.9))
    trace.engine = engine("processed_logprobs", name="sglang")
    result = judge(trace, TRAINER, at_one=small())
    assert (result.verdict, codes(result)[0]) == ("converted", "scaled_before_truncation")


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=0.0), ("converted", "greedy")),
        (Sampling(temperature=1.0, beam_search=True), ("no", "beam_search")),
    ],
)
def test_answers_that_were_not_sampled(sampling: Sampling, expected: tuple[str, str]) -> None:
    result = judge(meta(sampling=sampling), TRAINER, at_one=small())
    assert (result.verdict, codes(result)[0]) == expected


@pytest.mark.parametrize(
    ("name", "penalty", "expected"),
    [
        ("vllm", 0.0, ("converted", "greedy")),
        ("sglang", 0.0, ("converted", "greedy")),
        ("another", 0.0, ("no", "logprobs_mode_unknown")),
        ("vllm", 1.0, ("no", "logprobs_mode_unknown")),
    ],
)
def test_greedy_answers_need_no_mode_where_the_engine_divides_by_one(
    name: str, penalty: float, expected: tuple[str, str]
) -> None:
    sampling = Sampling(temperature=0.0, presence_penalty=penalty)
    trace = meta(sampling=sampling, engine=engine("unknown", name=name))
    result = judge(trace, TRAINER, at_one=small())
    assert (result.verdict, codes(result)[0]) == expected


def test_bad_tokens_convert_and_nothing_but_bad_ones_is_a_no() -> None:
    lp = np.full(4, -1.0)
    some = Bucket.of(np.array([-1.0, np.nan, -1.0, -9999.0]), lp)
    assert "2 of 4" in judge(meta(), TRAINER, at_one=some).reasons[0].detail
    assert judge(meta(), TRAINER, at_one=some).verdict == "converted"
    for nothing in (None, Bucket.of(np.full(4, -9999.0), lp)):
        result = judge(meta(), TRAINER, at_one=nothing)
        assert (result.verdict, codes(result)) == ("no", ["nothing_to_compare"])


def test_logits_are_not_logprobs() -> None:
    result = judge(meta("raw_logits"), TRAINER, at_one=small())
    assert (result.verdict, codes(result)[0]) == ("no", "logits_not_logprobs")


SAME = {"weight_version": "7"}
FACTS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("checkpoint_mismatch", {"checkpoint": "a"}, {"checkpoint": "b"}, "no"),
    (
        "tokenizer_mismatch",
        {"settings": {"tokenizer": "a"}},
        {"settings": SAME | {"tokenizer": "b"}},
        "no",
    ),
    (
        "template_mismatch",
        {"settings": {"chat_template": "a"}},
        {"settings": SAME | {"chat_template": "b"}},
        "yes",
    ),
    ("precision_class_differs", {"settings": {"dtype": "bfloat16"}}, {}, "converted"),
    (
        "precision_class_differs",
        {"settings": {"dtype": "float32", "quantization": "fp8"}},
        {},
        "converted",
    ),
    ("scored_at_wrong_precision", {}, {"settings": SAME | {"train_dtype": "bfloat16"}}, "no"),
    ("speculative_decoding", {"settings": {"speculative": "eagle"}}, {}, "yes"),
    ("weight_version_differs", {}, {"settings": {"weight_version": "8"}}, "converted"),
    ("weight_version_unknown", {}, {"settings": {}}, "yes"),
]


@pytest.mark.parametrize(
    "spans",
    [
        [WeightSpan(0, "6"), WeightSpan(30, "7")],
        [WeightSpan(0, "unknown"), WeightSpan(30, "7")],
        [WeightSpan(0, changed(["6", "7"]))],
    ],
)
def test_an_answer_of_several_policies_says_so(spans: list[WeightSpan]) -> None:
    trace = meta(weight_spans=spans, weight_version=joined(spans))
    result = judge(trace, TRAINER, at_one=simulated()["T_scaled"])
    assert (result.verdict, codes(result)) == ("converted", ["weight_versions_mixed"])
    assert spans[0].version in result.reasons[0].detail
    whole = meta(weight_spans=[WeightSpan(0, "7")], weight_version="7")
    assert codes(judge(whole, TRAINER, at_one=simulated()["T_scaled"])) == []


@pytest.mark.parametrize(("code", "rollout", "train", "expected"), FACTS)
def test_facts_of_both_sides(
    code: str, rollout: dict[str, Any], train: dict[str, Any], expected: str
) -> None:
    trainer = msgspec.structs.replace(TRAINER, **train)
    trace = meta()
    trace.engine = engine(**rollout)
    result = judge(trace, trainer, at_one=simulated()["T_scaled"])
    assert (result.verdict, codes(result)) == (expected, [code])


def test_the_same_precision_in_other_words_is_the_same() -> None:
    trace = meta()
    trace.engine = engine(settings={"dtype": "torch.float32", "quantization": "None"})
    assert judge(trace, TRAINER, at_one=simulated()["T_scaled"]).verdict == "yes"


def test_a_broken_prefix_and_a_partial_capture_are_notes() -> None:
    trace = meta(parent="b.0", prefix_len=10, status="partial", missing=["routed_experts: none"])
    result = judge(trace, TRAINER, at_one=simulated()["T_scaled"])
    assert (result.verdict, codes(result)) == ("yes", ["prefix_not_exact", "capture_partial"])


def test_findings_of_the_backend_weigh_by_their_code() -> None:
    finding = Reason(code="rotary_inv_freq_cast", detail="d", fix="f")
    result = judge(meta(), TRAINER, at_one=simulated()["T_scaled"], findings=[finding])
    assert (result.verdict, result.reasons) == ("no", [finding])
    with pytest.raises(ValueError, match="made_up"):
        judge(meta(), TRAINER, at_one=None, findings=[Reason(code="made_up", detail="", fix="")])


def routes(rows: int, seed: int) -> npt.NDArray[Any]:
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((rows, 4, 16)), axis=-1)[..., :4].astype(np.uint8)


def test_routes_shifted_by_one_row_raise_the_alarm_and_name_the_shift() -> None:
    train = routes(60, 0)
    rollout = np.roll(train, 1, axis=0)
    good = simulated()["T_scaled"]
    bucket = RouterBucket.of(rollout[20:], train[20:])
    result = judge(meta(), TRAINER, at_one=good, router=bucket, shift=route_shift(rollout, train))
    assert (result.verdict, codes(result)) == ("no", ["routes_misaligned"])
    assert "off by +1" in result.reasons[0].detail
    unexplained = judge(meta(), TRAINER, at_one=good, router=bucket)
    assert codes(unexplained) == ["routes_misaligned"]
    aligned = RouterBucket.of(train, train)
    assert codes(judge(meta(), TRAINER, at_one=good, router=aligned)) == []


def test_every_code_has_a_meaning_and_a_weight() -> None:
    assert set(CODES) == set(SEVERITY)
    assert all(meaning.endswith(".") for meaning in CODES.values())

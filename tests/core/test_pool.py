"""Agent steps are too short to be tested one by one; the cell that they make is not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from driftgate.codes import MASKABLE
from driftgate.comparable import judge_numbers
from driftgate.mismatch import Bucket, Worst
from driftgate.pool import MAX_POOLS, OTHERS, Judged, Pools, refusals, refutes
from driftgate.router import RouterBucket
from driftgate.trace import Comparable, Engine, Reason, Sampling, ScoreMeta, Trainer

F64 = npt.NDArray[np.float64]
TRAINER = Trainer(backend="reference", model="m", dtype="float32")
ENGINE = Engine(name="vllm", version="0.29.0", model="m", logprobs_mode="processed_logprobs")
ONE = Sampling(temperature=1.0)
TOKENS, ANSWERS = 150, 30


def score(bucket: Bucket | None, **fields: Any) -> ScoreMeta:
    given: dict[str, Any] = {
        "trace_id": "c.0",
        "trajectory": "t",
        "step": 0,
        "choice": 0,
        "model": "m",
        "engine": ENGINE,
        "trainer": TRAINER,
        "sampling": ONE,
        "bucket": bucket,
        "comparable": Comparable(verdict="yes"),
        "scored_ns": 1,
    }
    return ScoreMeta(**(given | fields))


def judged(*metas: ScoreMeta, engine: Engine = ENGINE) -> Judged:
    pools = Pools()
    for meta in metas:
        pools.add(meta)
    return pools.judge(engine)


def found(result: Judged) -> list[str]:
    return [reason.code for reasons in result.findings.values() for reason in reasons]


def log_softmax(z: F64) -> F64:
    return np.asarray(z - np.log(np.exp(z).sum(axis=1, keepdims=True)))


def answers(*, temperature: float = 1.0, mass: float = 1.0) -> Iterator[Bucket]:
    """A trainer at T = 1 and an engine that gives and samples what is left of its density."""
    rng = np.random.default_rng(0)
    for _ in range(ANSWERS):
        z = rng.normal(0, 3, (TOKENS, 100))
        train = log_softmax(z + rng.normal(0, 0.02, z.shape))
        p = np.exp(log_softmax(z / temperature))
        order = np.argsort(-p, axis=1)
        ranked = np.take_along_axis(p, order, 1)
        keep = np.empty(p.shape, dtype=np.bool_)
        np.put_along_axis(keep, order, np.cumsum(ranked, 1) - ranked < mass, 1)
        rollout = np.log(np.where(keep, p, 1e-300) / np.where(keep, p, 0).sum(1, keepdims=True))
        at = np.arange(TOKENS), (rollout + rng.gumbel(size=z.shape)).argmax(axis=1)
        yield Bucket.of(train[at], rollout[at])


@pytest.mark.parametrize(
    ("buckets", "sampling", "code"),
    [
        (answers(mass=0.8), ONE, "not_sampling_density"),
        (answers(temperature=0.6), Sampling(), "logodds_slope_off"),
    ],
    ids=["default top_p .8", "default temperature .6"],
)
def test_what_no_single_answer_shows_is_named_by_the_cell(
    buckets: Iterator[Bucket], sampling: Sampling, code: str
) -> None:
    given = list(buckets)
    for bucket in given:
        alone = judge_numbers(ENGINE, sampling, at_one=bucket)
        assert not refutes(alone)
        assert "low_power" in [r.code for r in alone]
    result = judged(*(score(bucket, sampling=sampling) for bucket in given))
    assert result.verdict == "no"
    assert (result.bucket, result.worst) == (None, None)
    assert code in found(result)


def test_a_valid_cell_stands_and_is_the_sum_of_its_scores() -> None:
    buckets = list(answers())
    result = judged(*map(score, buckets))
    assert (result.verdict, found(result)) == ("yes", [])
    assert result.bucket == reduce(Bucket.merge, buckets)


def test_only_the_settings_that_fail_are_left_out() -> None:
    good, bad = list(answers()), list(answers(mass=0.95))
    cut = Sampling(temperature=1.0, max_tokens=99, seed=5, presence_penalty=0.0)
    metas = [score(bucket, sampling=cut) for bucket in bad]
    metas += [score(bucket, comparable=Comparable(verdict="converted")) for bucket in good]
    result = judged(*metas)
    assert result.verdict == "converted"
    assert result.bucket == reduce(Bucket.merge, good)
    assert {key: [r.code for r in reasons] for key, reasons in result.findings.items()} == {
        "temperature=1.0, presence_penalty=0.0 @ T = 1": ["not_sampling_density"],
        "temperature=1.0 @ T = 1": [],
    }


def test_settings_that_were_not_kept_are_tested_for_what_holds_for_any() -> None:
    truncated = judged(*(score(bucket, sampling=None) for bucket in answers(mass=0.95)))
    assert truncated.verdict == "yes"
    heated = judged(*(score(bucket, sampling=None) for bucket in answers(temperature=0.6)))
    assert (heated.verdict, found(heated)) == ("no", ["logodds_slope_off"])


def test_few_tokens_stay_untested_and_say_so() -> None:
    result = judged(score(next(answers())))
    assert (result.verdict, found(result)) == ("yes", ["low_power"])


def test_scores_at_the_requested_temperature_are_tested_there() -> None:
    """The headline of a processed engine at T; its numbers at 1 are not in the score."""
    hot = {"sampling": Sampling(temperature=0.7), "temperature": 0.7}
    metas = [score(b, at_requested_temperature=b, **hot) for b in answers()]
    assert judged(*metas).verdict == "yes"
    inferred = msgspec.structs.replace(ENGINE, logprobs_mode="unknown")
    assert judged(*metas, engine=inferred).verdict == "yes"
    off = [score(b, at_requested_temperature=b, **hot) for b in answers(mass=0.95)]
    assert "not_sampling_density" in found(judged(*off))


def test_a_part_of_a_refuted_cell_is_refuted_with_it() -> None:
    whole, part = Pools(), Pools()
    for bucket in answers(mass=0.95):
        whole.add(score(bucket))
    part.add(score(next(answers(mass=0.95))))
    assert part.judge(ENGINE).verdict == "yes"
    result = part.judge(ENGINE, whole.judge(ENGINE).findings)
    assert result.verdict == "no"
    (reason,) = [r for r in result.findings["temperature=1.0 @ T = 1"] if r.code != "low_power"]
    assert reason.code == "not_sampling_density"
    assert reason.detail.startswith("in the whole cell, mean e^D - 1")


def test_pools_are_bounded() -> None:
    rollout = np.log(np.full(4, 0.5))
    metas = [
        score(Bucket.of(rollout, rollout), sampling=Sampling(temperature=1.0, top_p=0.5 + n / 1e3))
        for n in range(MAX_POOLS + 9)
    ]
    result = judged(*metas, engine=msgspec.structs.replace(ENGINE, logprobs_mode="raw_logprobs"))
    assert len(result.findings) == MAX_POOLS + 1
    assert OTHERS in result.findings
    assert result.bucket is not None
    assert result.bucket.n_tokens == 4 * len(metas)


def routes(shift: int = 0) -> RouterBucket:
    rng = np.random.default_rng(0)
    rows = np.argsort(rng.random((60, 4, 16)), axis=-1)[..., :4]
    return RouterBucket.of(np.roll(rows, shift, axis=0), rows)


@pytest.mark.parametrize(
    ("code", "kept"),
    [
        ("grammar_masked", True),
        ("processed_truncation", True),
        ("routes_misaligned", False),
        ("checkpoint_mismatch", False),
        ("rotary_inv_freq_cast", False),
    ],
)
def test_routes_count_unless_a_reason_is_about_them(code: str, kept: bool) -> None:
    no = Comparable(verdict="no", reasons=[Reason(code=code, detail="d", fix="f")])
    result = judged(score(None, router=routes(), comparable=no))
    assert (result.router is not None) == kept


def test_routes_that_only_together_look_unrelated_are_left_out() -> None:
    result = judged(score(next(answers()), router=routes(1)))
    assert (result.verdict, result.router) == ("no", None)
    assert "routes_misaligned" in found(result)


def test_the_worst_token_is_of_what_stands() -> None:
    def at(log_ratio: float) -> Worst:
        return Worst(0, 1, log_ratio, -1.0, -1.0, "c.0")

    good, bad = next(answers()), next(answers(mass=0.95))
    no = Comparable(verdict="no", reasons=[Reason(code="beam_search", detail="d", fix="f")])
    result = judged(score(good, worst=at(0.1)), score(bad, worst=at(-9.0), comparable=no))
    assert result.worst == at(0.1)


def test_a_no_without_a_known_reason_may_doubt_anything() -> None:
    (told,) = refusals(score(None, comparable=Comparable(verdict="no")), {})
    assert told.code == "reason_unknown"
    assert told.code not in MASKABLE


def test_a_cells_parts_by_lag_add_up_to_the_cell() -> None:
    buckets = [Bucket.of(np.full(5, -1.0), np.full(5, -1.0) + n / 100) for n in range(4)]
    routes = np.arange(4, dtype=np.uint8)[None, None].repeat(5, axis=0)
    router = RouterBucket.of(routes, routes + 1)
    versions = ["7", "5", "7", "unknown"]
    metas = [
        score(bucket, weight_version=version, trainer_weight_version="7", router=router)
        for bucket, version in zip(buckets, versions, strict=True)
    ]
    refused = score(
        buckets[3],
        weight_version="3",
        trainer_weight_version="7",
        comparable=Comparable(verdict="no"),
    )
    result = judged(*metas, refused)
    assert [part.label for part in result.by_lag] == ["0", "2", "unknown"]
    fresh, stale, unknown = result.by_lag
    assert fresh.bucket == buckets[0].merge(buckets[2])
    assert (stale.bucket, unknown.bucket) == (buckets[1], buckets[3])
    assert result.bucket is not None
    assert result.bucket.n_tokens == 20
    assert result.bucket.sum_abs == pytest.approx(sum(b.sum_abs for b in buckets))
    assert [part.router.n_cells for part in result.by_lag if part.router] == [10, 5, 5]

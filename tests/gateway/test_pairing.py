"""Two engine builds on the same prompts, against sums made by hand from the shared answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from driftgate.gateway.pairing import CellName, Pairing
from driftgate.storage import Reader, Record
from driftgate.testing.stores import write_store
from driftgate.testing.traces import ENGINE, TRAINER, make_intent, make_score, make_trajectory
from driftgate.trace import Comparable, Reason, Score, Trace

BUILD = msgspec.structs.replace(ENGINE, system_fingerprint="another-build")
A, B = (CellName(e.digest, TRAINER.digest, "tiny-moe") for e in (ENGINE, BUILD))
NO = Comparable(verdict="no", reasons=[Reason(code="grammar_masked", detail="d", fix="f")])


def answer(name: str, asked: int, build: bool, verdict: str = "yes") -> tuple[Trace, Score]:
    """One answer to prompt ``asked``; ``build``: by the other engine, from its third token on."""
    engine = BUILD if build else ENGINE
    (trace,) = make_trajectory(name, steps=1, routed=False, response=20, engine=engine)
    assert trace.response_ids is not None
    ids = np.arange(20, dtype=np.int32)
    ids[3:] += build
    prompt = np.full(9, asked, np.int32)
    trace = dataclasses.replace(trace, prompt_ids=prompt, response_ids=ids)
    comparable = NO if verdict == "no" else Comparable(verdict="yes")
    return trace, make_score(trace, noise=0.3 if build else 0.1, seed=asked, comparable=comparable)


ANSWERS = {
    "a1": answer("a1", 1, False),
    "a2": answer("a2", 2, False),
    "a3": answer("a3", 3, False, "no"),
    "b1": answer("b1", 1, True),
    "b3": answer("b3", 3, True),
    "b4": answer("b4", 4, True),
}


@pytest.fixture(scope="module")
def pairing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairing]:
    def records() -> Iterator[Record]:
        for trace, score in ANSWERS.values():
            yield from (make_intent(trace), trace, score)

    reader = Reader(write_store(tmp_path_factory.mktemp("store"), records()))
    yield Pairing(reader)
    reader.close()


def log_ratios(*names: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    found = []
    for trace, score in (ANSWERS[name] for name in names):
        assert score.logprobs is not None
        assert trace.logprobs is not None
        good = score.logprobs <= 1e-6  # others are no log-probabilities
        found.append((score.logprobs.astype(float) - trace.logprobs.astype(float))[good])
    return np.concatenate(found)


def test_only_shared_prompts_count(pairing: Pairing) -> None:
    found = pairing.pair(A, B)
    assert (found.prompts, found.a.looked, found.b.looked) == (2, 3, 3)
    assert (found.a.answers, found.b.answers) == (2, 2)
    for side, names in ((found.a, ["a1"]), (found.b, ["b1", "b3"])):
        assert side.measures is not None
        d = log_ratios(*names)
        metrics = side.measures.metrics
        assert metrics["abs_log_ratio_mean"] == pytest.approx(np.abs(d).mean(), rel=1e-9)
        assert metrics["kl_k3_rollout_train"] == pytest.approx((np.expm1(d) - d).mean(), rel=1e-9)


def test_answers_are_paired_and_say_how_far_they_are_alike(pairing: Pairing) -> None:
    first, second = pairing.pair(A, B).items
    assert (first.trajectories, second.trajectories) == (["a1", "b1"], ["a3", "b3"])
    assert first.alike == 3
    assert first.tokens == [20, 20]
    assert second.kl_k3_rollout_train[0] is None
    d = log_ratios("b3")
    assert second.kl_k3_rollout_train[1] == pytest.approx((np.expm1(d) - d).mean(), rel=1e-9)


def test_nothing_shared_is_no_number(pairing: Pairing) -> None:
    found = pairing.pair(A, CellName("0" * 12, TRAINER.digest, "tiny-moe"))
    assert (found.prompts, found.b.looked, found.a.measures, found.items) == (0, 0, None, [])

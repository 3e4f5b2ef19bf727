"""Faults planted in real traces and real trainers are found and named, and nothing else is."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from driftgate import Client
from driftgate.adapters.hf_digest import checkpoint_digest
from driftgate.gateway.probe import probe
from driftgate.router import random_zero_overlap
from driftgate.teacher.reference import ReferenceBackend
from driftgate.testing.checkpoints import make_checkpoint
from driftgate.testing.engine import EngineProcess
from driftgate.trace import Engine, Score, Trace
from tests.e2e import oracle
from tests.e2e.rollouts import HOT, HOT_RUNS, TOKENS, heat
from tests.e2e.support import (
    Scored,
    codes,
    proxy,
    reference,
    stored_scores,
    stored_traces,
    teach,
    write,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

CLOSE = 1e-4
"""Nats. Engine and trainer in float32 differ by 1e-5."""


def mean_drift(scores: list[Score]) -> float:
    """Mean |D| over all tokens, nats."""
    buckets = [score.meta.bucket for score in scores if score.meta.bucket]
    return sum(bucket.sum_abs for bucket in buckets) / sum(bucket.n_tokens for bucket in buckets)


def largest_drift(score: Score) -> float:
    assert score.meta.worst is not None
    return abs(score.meta.worst.log_ratio)


# A trainer that was cast.


def test_rotary_frequencies_that_were_cast_are_named(
    captured: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    store = Path(shutil.copytree(captured["dense"], tmp_path / "store"))
    right = reference(checkpoints["dense"], "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(checkpoints["dense"], dtype=torch.float32)
    cast = ReferenceBackend(model.to(torch.bfloat16).eval(), name="dense")
    for backend in (right, cast):
        teach(store, backend, checkpoints["dense"])
    honest = stored_scores(store, right.trainer.digest)
    trapped = stored_scores(store, cast.trainer.digest)
    assert len(trapped) == len(honest) == 19
    for score in trapped:
        assert score.meta.comparable.verdict == "no"
        (found,) = [r for r in score.meta.comparable.reasons if r.code == "rotary_inv_freq_cast"]
        assert found.detail.endswith("inv_freq is bfloat16, not float32")
        assert "never cast a model" in found.fix
    assert not any("rotary_inv_freq_cast" in codes(score) for score in honest)
    # Both are bfloat16, so what differs between them is the rotary embedding alone.
    moves = {score.meta.trace_id: score.logprobs for score in trapped}
    damage = max(float(np.abs(s.logprobs - moves[s.meta.trace_id]).max()) for s in honest)
    print(f"the cast moves logprobs by up to {damage:.3f} nats")
    assert damage > 0.05


# Logprobs taken after the temperature.


async def test_the_probe_tells_the_logprobs_mode(
    engines: dict[str, EngineProcess], processed_engine: EngineProcess
) -> None:
    assert (await probe(processed_engine.url)).logprobs_mode == "processed_logprobs"
    for engine in engines.values():
        assert (await probe(engine.url)).logprobs_mode == "raw_logprobs"


async def test_a_temperature_convention_that_was_declared_wrong_is_named(
    processed_engine: EngineProcess, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    store = await heat(processed_engine, tmp_path / "store", logprobs_mode="raw_logprobs")
    teach(store, reference(checkpoints["dense"]), checkpoints["dense"])
    for score in stored_scores(store):
        assert score.meta.comparable.verdict == "no"
        (found,) = [
            reason
            for reason in score.meta.comparable.reasons
            if reason.code == "logprob_convention_mismatch"
        ]
        assert found.detail.startswith("declared raw_logprobs, so T = 1: mean|D| 0.")
        assert f"but T = {HOT:g} fits" in found.detail
        assert score.meta.temperature == 1.0
        assert mean_drift([score]) > 0.1
    async with proxy(processed_engine, store) as proxied, Client(proxied.url) as client:
        (cell,) = [cell for cell in (await client.cells()).items if cell.kind == "drift"]
    assert cell.comparable == {"no": HOT_RUNS}
    assert {"logprob_convention_mismatch": HOT_RUNS}.items() <= {
        reason.code: reason.scores for reason in cell.reasons
    }.items()
    assert cell.measures is None, "nothing of it counts as drift"
    assert cell.all_measures is not None
    assert cell.all_measures.metrics["n_tokens"] == HOT_RUNS * TOKENS


async def test_processed_logprobs_are_compared_at_the_agents_temperature(
    processed_engine: EngineProcess, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    store = await heat(processed_engine, tmp_path / "store")
    teach(store, reference(checkpoints["dense"]), checkpoints["dense"])
    scores = stored_scores(store)
    assert len(scores) == HOT_RUNS
    for score in scores:
        assert isinstance(score.meta.engine, Engine)
        assert score.meta.engine.logprobs_mode == "processed_logprobs"
        assert score.meta.temperature == HOT
        assert score.meta.comparable.verdict == "converted"
        assert codes(score) == {"scored_at_temperature", "low_power"}
        assert largest_drift(score) < CLOSE
    print(f"processed at T = {HOT}: max |D| {max(map(largest_drift, scores)):.1e} nats")


# Routes of other rows.


@pytest.fixture(scope="module")
def misaligned(
    captured: dict[str, Path],
    checkpoints: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[tuple[Trace, Score]]]:
    """The MoE's traces of 48 tokens and more with their routes in other places, and their
    scores."""
    root = tmp_path_factory.mktemp("misaligned")
    backend = reference(checkpoints["moe"])
    found = {}
    for name, (axis, by) in PLACES.items():
        traces = [moved(trace, axis, by) for trace in stored_traces(captured["moe"])]
        store = write(root / name, traces)
        teach(store, backend, checkpoints["moe"])
        scores = {score.meta.trace_id: score for score in stored_scores(store)}
        pairs = [(trace, scores[trace.meta.trace_id]) for trace in traces]
        found[name] = [(t, s) for t, s in pairs if len(s.logprobs) >= TOKENS]
        assert len(found[name]) >= 12
    return found


PLACES = {"a row late": (0, 1), "a row early": (0, -1), "a layer off": (1, 1)}
"""Axis of the routes [P + R - 1, L, K] and how far they are moved along it."""


def moved(trace: Trace, axis: int, by: int) -> Trace:
    """The trace as if its engine had put its routes elsewhere."""
    assert trace.routes is not None
    routes = np.roll(trace.routes, by, axis=axis).astype(np.uint8)
    return dataclasses.replace(trace, routes=routes)


@pytest.mark.parametrize(("name", "shift"), [("a row late", 1), ("a row early", -1)])
def test_routes_shifted_by_one_row_are_named(
    misaligned: dict[str, list[tuple[Trace, Score]]], name: str, shift: int
) -> None:
    rates = []
    for trace, score in misaligned[name]:
        assert score.meta.comparable.verdict == "no"
        detail = misalignment(score)
        assert detail.startswith(f"rows are off by {shift:+d}: ")
        named = re.search(r"zero overlap ([\d.]+)% \(unrelated rows: ([\d.]+)%\)", detail)
        assert named is not None
        rates.append(zero_overlap(trace, score))
        assert float(named[1]) == pytest.approx(100 * rates[-1], abs=0.051)
        assert float(named[2]) == pytest.approx(100 * random_zero_overlap(16, 4), abs=0.051)
    print(f"routes {name}: zero overlap {min(rates):.1%} to {max(rates):.1%}")


def test_routes_of_other_layers_raise_the_zero_overlap_alarm(
    misaligned: dict[str, list[tuple[Trace, Score]]],
) -> None:
    rates = []
    for trace, score in misaligned["a layer off"]:
        rates.append(zero_overlap(trace, score))
        assert misalignment(score).startswith(f"zero overlap {rates[-1]:.1%} of ")
        assert score.meta.comparable.verdict == "no"
    print(f"routes a layer off: zero overlap {min(rates):.1%} to {max(rates):.1%}")


def test_routes_in_their_place_raise_no_alarm(scored: dict[str, Scored]) -> None:
    one = scored["moe"]
    for score in stored_scores(one.store, one.native.digest):
        assert "routes_misaligned" not in codes(score)


def misalignment(score: Score) -> str:
    """What the alarm says; AssertionError where it is silent."""
    (found,) = [r for r in score.meta.comparable.reasons if r.code == "routes_misaligned"]
    return found.detail


def zero_overlap(trace: Trace, score: Score) -> float:
    """By hand, over the rows that predict the response."""
    assert trace.routes is not None
    assert score.routes is not None
    rows = trace.routes[-len(score.routes) :].tolist(), score.routes.tolist()
    cells = [cell for a, b in zip(*rows, strict=True) for cell in zip(a, b, strict=True)]
    assert score.meta.router is not None
    rate = oracle.share(cells, oracle.ROUTER_BY_HAND["router_zero_overlap_rate"])
    assert score.meta.router.metrics()["router_zero_overlap_rate"] == pytest.approx(rate)
    return rate


# Other weights.


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wrong") / "dense"
    return make_checkpoint(path, "dense", seed=1, dtype="float32")


def test_a_wrong_checkpoint_is_named_by_its_digest(
    captured: dict[str, Path], checkpoints: dict[str, Path], wrong: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(captured["dense"], tmp_path / "store"))
    teach(store, reference(wrong), wrong)
    digests = checkpoint_digest(checkpoints["dense"]), checkpoint_digest(wrong)
    for score in stored_scores(store):
        assert score.meta.comparable.verdict == "no"
        (found,) = [r for r in score.meta.comparable.reasons if r.code == "checkpoint_mismatch"]
        assert found.detail == "engine {}, trainer {}".format(*digests)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_wrong_checkpoint_of_unknown_digest_is_named_by_its_numbers(
    captured: dict[str, Path], wrong: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "moe":
        wrong = make_checkpoint(tmp_path / "wrong", "moe", seed=1)
    traces = [without_digest(trace) for trace in stored_traces(captured[kind])]
    store = write(tmp_path / "store", traces)
    teach(store, reference(wrong), wrong)
    scores = [score for score in stored_scores(store) if len(score.logprobs) >= TOKENS]
    assert len(scores) >= 12
    for score in scores:
        assert score.meta.comparable.verdict == "no"
        assert "checkpoint_mismatch_suspected" in codes(score), score.meta.comparable
        assert "checkpoint_mismatch" not in codes(score)
    print(f"{kind}: mean |D| {mean_drift(scores):.2f} nats with other weights")


def without_digest(trace: Trace) -> Trace:
    """The trace as of an engine whose weights are not readable from the gateway."""
    engine = msgspec.structs.replace(trace.meta.engine, checkpoint=None)
    return dataclasses.replace(trace, meta=msgspec.structs.replace(trace.meta, engine=engine))

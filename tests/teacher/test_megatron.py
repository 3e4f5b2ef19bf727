"""Real Megatron-Core ranks on gloo against Hugging Face, in every layout that two and four
processes allow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from driftgate.adapters.hf_texts import text_digests
from driftgate.storage import Reader
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.launch import launch
from driftgate.testing.traces import make_trajectory
from tests.teacher.families import CONFIGS, make_family
from tests.teacher.support import store

RANKS = "tests.teacher.megatron_ranks"

EXACT = 1e-5
"""Nats, float32, on tokens that the model samples; swapped norms are 1e4 times as far off."""
BF16 = {"dense": 0.1, "moe": 0.5}
"""Nats, the largest of 500 tokens. The two sides round at other places, and some tokens of the MoE
go to other experts."""

TP, PP, EP = "tensor_parallel", "pipeline_parallel", "expert_parallel"
SP = {"sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {TP: 2},
    "tp2 sp": {TP: 2, **SP},
    "pp2": {PP: 2},
}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {EP: 2},
    "ep2 allgather": {EP: 2, "also": {"moe_token_dispatcher_type": "allgather"}},
    "tp2 ep2": {TP: 2, EP: 2},
    "tp2 sp ep2": {TP: 2, EP: 2, **SP},
}
ALL_FOUR = {TP: 2, PP: 2, EP: 2, **SP}

OTHERS = [name for name in CONFIGS if name not in ("dense", "moe")]


def torchrun(
    out: Path, processes: int, work: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    given = {name: {"nproc": processes, "dtype": "float32", **one} for name, one in work.items()}
    command += ["-m", RANKS, str(out), json.dumps(given)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    said = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
    assert done.returncode == 0, "\n".join(said)
    loaded: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return loaded


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: make_family(root, name) for name in CONFIGS}


@pytest.fixture(scope="module")
def found(
    families: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """One launch of two processes for all that two can do; rank 0 writes what it found."""
    dense, moe = ({"model": str(families[kind])} for kind in ("dense", "moe"))
    work = {f"dense {name}": {**dense, **layout} for name, layout in LAYOUTS.items()}
    work |= {f"moe {name}": {**moe, **one} for name, one in (LAYOUTS | EXPERT_LAYOUTS).items()}
    work |= {f"{name} tp2": {"model": str(families[name]), TP: 2} for name in OTHERS}
    work["tied pp2"] = {"model": str(families["tied"]), PP: 2}
    work["dense bfloat16"] = {**dense, TP: 2, "dtype": "bfloat16"}
    work["moe bfloat16"] = {**moe, EP: 2, "dtype": "bfloat16"}
    work["norms swapped"] = {**dense, TP: 2, "fault": True}
    work["replay tp2 sp"] = {**moe, TP: 2, **SP, "what": "replay"}
    work["replay pp2"] = {**moe, PP: 2, "what": "replay"}
    noisy = {"hidden_dropout": 0.1, "moe_enable_routing_replay": True}
    work["leave"] = {**moe, TP: 2, **SP, "also": noisy, "what": "leave"}
    return torchrun(tmp_path_factory.mktemp("megatron") / "found.json", 2, work)


@pytest.fixture(scope="module")
def found_by_four(
    families: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    moe = {"model": str(families["moe"]), **ALL_FOUR}
    work = {"moe all": moe, "replay all": {**moe, "what": "replay"}}
    return torchrun(tmp_path_factory.mktemp("four") / "found.json", 4, work)


def check(seen: dict[str, Any], *, is_moe: bool) -> None:
    assert seen["slices"] == 10
    assert seen["ordered"] is is_moe
    assert seen["logprobs"] < EXACT
    assert seen["entropy"] < EXACT
    assert seen["at_temperature"] < EXACT
    assert seen["routes"] == 0
    assert seen["margins"] < EXACT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dense_model_equals_hugging_face(found: dict[str, Any], layout: str) -> None:
    check(found[f"dense {layout}"], is_moe=False)


@pytest.mark.parametrize("layout", [*LAYOUTS, *EXPERT_LAYOUTS])
def test_a_mixture_of_experts_equals_hugging_face(found: dict[str, Any], layout: str) -> None:
    check(found[f"moe {layout}"], is_moe=True)


def test_all_kinds_of_parallelism_at_once(found_by_four: dict[str, Any]) -> None:
    seen = found_by_four["moe all"]
    check(seen, is_moe=True)
    assert (seen["tp"], seen["pp"], seen["ep"], seen["sequence_parallel"]) == (
        "2",
        "2",
        "2",
        "true",
    )


@pytest.mark.parametrize("name", [*(f"{name} tp2" for name in OTHERS), "tied pp2"])
def test_other_families_are_mapped_right(found: dict[str, Any], name: str) -> None:
    check(found[name], is_moe=name in ("mixtral tp2", "unnormed tp2"))


def test_a_wrong_mapping_would_be_seen(found: dict[str, Any]) -> None:
    assert found["norms swapped"]["logprobs"] > 1e3 * EXACT


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_bfloat16_is_as_far_off_as_it_must_be(found: dict[str, Any], kind: str) -> None:
    assert 0 < found[f"{kind} bfloat16"]["logprobs"] < BF16[kind]


@pytest.mark.parametrize("layout", ["tp2 sp", "pp2", "all"])
def test_given_routes_are_used_and_give_hugging_faces_numbers(
    found: dict[str, Any], found_by_four: dict[str, Any], layout: str
) -> None:
    seen = (found | found_by_four)[f"replay {layout}"]
    assert seen["used"]
    assert seen["moved"] > 0.05, "the given routes make a difference"
    assert seen["logprobs"] < EXACT


def test_a_training_job_is_left_as_it_was(found: dict[str, Any]) -> None:
    assert found["leave"]["slices"] == 10
    assert found["leave"]["facts"] > 100
    assert found["leave"]["changed"] == []


@pytest.mark.timeout(180)
def test_a_store_scored_by_megatron_has_the_references_buckets(
    families: dict[str, Path], tmp_path: Path
) -> None:
    """The worker's whole way: torchrun, a store, leases, scores."""
    found: dict[str, dict[str, Any]] = {}
    for name, layout in (("reference", {}), ("megatron", {"nproc": 2, TP: 2, EP: 2, **SP})):
        settings = {"backend": name, "model": str(families["moe"]), "dtype": "float32", **layout}
        config = msgspec.convert({"store": str(tmp_path / name), **settings}, TeacherConfig)
        store(config, *make_trajectory(steps=3, k=4, layers=4, experts=16))
        assert launch(config, rank_module="driftgate.testing.megatron_rank") == 0
        reader = Reader(Path(config.store))
        rows = reader.scores(kind="drift")
        found[name] = {row.meta.trace_id: reader.score(row.meta.trace_id) for row in rows}
        reader.close()
    assert set(found["megatron"]) == set(found["reference"]) == {f"t1-{n}.0" for n in range(3)}
    for trace_id, wanted in found["reference"].items():
        ours = found["megatron"][trace_id]
        assert ours.meta.trainer.backend == "megatron"
        assert (
            ours.meta.trainer.settings["chat_template"]
            == text_digests(families["moe"])["chat_template"]
        )
        assert np.abs(ours.logprobs - wanted.logprobs).max() < EXACT
        assert np.array_equal(ours.routes, wanted.routes)
        same = pytest.approx(numbers(wanted.meta.bucket), rel=EXACT, abs=EXACT)
        assert numbers(ours.meta.bucket) == same
        assert ours.meta.bucket.n_tokens == wanted.meta.bucket.n_tokens == 5


def numbers(bucket: Any) -> dict[str, float]:
    return {key: value for key, value in bucket.metrics().items() if isinstance(value, float)}

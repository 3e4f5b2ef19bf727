"""A visit to a model that somebody else is training: right numbers, and nothing is different
afterwards. Megatron-Core's part is in test_megatron."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from driftgate.adapters.fsdp import attach
from driftgate.adapters.hf_replay import watched
from driftgate.errors import TeacherError
from driftgate.storage import Reader, Writer
from driftgate.teacher.attached import AttachedBackend
from driftgate.testing.checkpoints import CheckpointKind
from tests.teacher.support import MakeTrace

EXACT = 1e-5
"""Nats, float32. The head runs on other rows than in the reference, which is 0 or a bit away."""


@pytest.fixture(scope="module")
def found(
    checkpoints: dict[CheckpointKind, Path],
    make_trace: MakeTrace,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("attach")
    given = []
    for kind in ("dense", "moe"):
        writer = Writer(root / kind)
        for n in range(3):
            writer.submit(make_trace(str(n), [400, 401, 402], [403, 404 + n], trajectory=str(n)))
        writer.close()
        given.append(f"{checkpoints[kind]}:{root / kind}")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command += ["-m", "tests.teacher.attach_ranks", str(root / "found.json"), *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    said = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
    assert done.returncode == 0, "\n".join(said)
    loaded: dict[str, Any] = json.loads((root / "found.json").read_text())
    for kind in ("dense", "moe"):
        reader = Reader(root / kind)
        loaded[kind]["stored"] = [row.meta for row in reader.scores(kind="drift")]
        reader.close()
    return loaded


@pytest.fixture(params=["dense", "moe"])
def seen(found: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    visited: dict[str, Any] = found[request.param]
    return visited


def test_the_numbers_are_hugging_faces(seen: dict[str, Any]) -> None:
    assert seen["logprobs"] < EXACT
    assert seen["entropy"] < EXACT
    assert seen["at_temperature"] < EXACT
    assert seen["routes"] == 0
    assert seen["margins"] < EXACT


def test_given_routes_are_used(found: dict[str, Any]) -> None:
    """The sequences above came under routes of their own, every second one of them."""
    assert found["moe"]["no_replay"] is None
    assert found["dense"]["no_replay"] == "the trainer's model has no routers"


def test_a_router_that_chooses_otherwise_is_known_before_it_is_given_routes() -> None:
    class Sorting(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            chosen = logits.argsort(-1, descending=True)[..., :2]
            return logits, logits.gather(-1, chosen), chosen

    class Choosing(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            weights, chosen = logits.topk(2)
            return logits, weights, chosen

    x, routers = torch.randn(5, 4), [Choosing(4, 8), Sorting(4, 8)]
    with watched(list(routers)) as faults:
        for router in routers:
            router(x)
    (fault,) = faults
    assert fault.startswith("Sorting does not choose its experts by one topk over 8")


def test_the_job_is_left_as_it_was_and_goes_on(seen: dict[str, Any]) -> None:
    assert seen["facts"] > 100
    for rank in seen["ranks"]:
        assert rank["changed"] == []
        assert rank["trained_on"]


def test_a_store_is_scored_with_the_weights_of_now(seen: dict[str, Any]) -> None:
    assert seen["scored"] == 3
    assert {meta.trainer.backend for meta in seen["stored"]} == {"fsdp"}
    assert {meta.trainer.world_size for meta in seen["stored"]} == {2}
    assert {meta.trainer.model for meta in seen["stored"]} == {"policy"}


def test_every_rank_hears_why_a_store_cannot_be_scored(seen: dict[str, Any]) -> None:
    assert all("/nowhere" in rank["told"] for rank in seen["ranks"])


def test_the_fingerprint_says_what_computed(found: dict[str, Any]) -> None:
    trainer = found["moe"]["trainer"]
    assert trainer["dtype"] == "float32"
    assert trainer["ordered"] == "True"
    assert trainer["device"] == "cpu"


def test_another_module_is_refused_in_words() -> None:
    with pytest.raises(TeacherError, match="Linear is not a causal language model"):
        attach(nn.Linear(2, 2))


DOCUMENT = Path(__file__).parents[2] / "docs" / "trainer.md"


def test_the_documented_calls_are_the_real_ones() -> None:
    text = DOCUMENT.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 2
    calls = [node for block in blocks for node in ast.walk(ast.parse(block))]
    given = {
        node.func.attr: [keyword.arg for keyword in node.keywords]
        for node in calls
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert set(given) == {"attach", "score_store", "close"}
    known = inspect.signature(AttachedBackend.score_store).parameters
    assert {*given["score_store"]} <= {*known}
    assert "score_batch" in dir(AttachedBackend)

"""Two real FSDP ranks against the reference: equal to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from driftgate.testing.checkpoints import CheckpointKind

RANKS = Path(__file__).with_name("fsdp_ranks.py")


@pytest.fixture(scope="module")
def differences(
    checkpoints: dict[CheckpointKind, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, float]]:
    """One launch for every model and precision; rank 0 writes what it found."""
    out = tmp_path_factory.mktemp("fsdp") / "differences.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command += [str(RANKS), str(out), str(checkpoints["dense"]), str(checkpoints["moe"])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded: dict[str, dict[str, float]] = json.loads(out.read_text())
    return loaded


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_two_ranks_equal_the_reference_exactly(
    differences: dict[str, dict[str, float]], kind: str, dtype: str
) -> None:
    seen = differences[f"{kind} {dtype}"]
    assert seen["slices"] == 10
    assert seen["replays"] == (kind == "moe")
    assert seen["logprobs"] == 0.0
    assert seen["entropy"] == 0.0
    assert seen["at_temperature"] == 0.0
    assert seen["routes"] == 0.0
    assert seen["margins"] == 0.0

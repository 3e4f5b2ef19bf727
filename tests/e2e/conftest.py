"""Two real engines on CPU, started once a session: a dense model in fp32, a MoE in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from driftgate.testing.checkpoints import make_checkpoint
from driftgate.testing.engine import (
    START_TIMEOUT_S,
    EngineProcess,
    launch_vllm,
    stop,
    wait_for_http,
)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "dense": make_checkpoint(root / "dense", "dense", dtype="float32"),
        "moe": make_checkpoint(root / "moe", "moe", dtype="bfloat16"),
    }


@pytest.fixture(scope="session")
def engines(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, EngineProcess]]:
    """Both engines start side by side: most of their 30 s is spent in imports."""
    logs = tmp_path_factory.mktemp("engines")
    running = {
        kind: launch_vllm(path, name=kind, log=logs / f"{kind}.log", routes=kind == "moe")
        for kind, path in checkpoints.items()
    }
    try:
        for engine in running.values():
            wait_for_http(
                f"{engine.url}/health", engine.process, engine.log, timeout_s=START_TIMEOUT_S
            )
        yield running
    finally:
        for engine in running.values():
            stop(engine.process)

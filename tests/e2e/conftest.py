"""Real engines on CPU, started once a session, and what agents did on them: captured, then scored.

The engines start side by side, because most of their 30 s is spent in imports. Stores are shared
between tests: a test that changes one copies it first.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import pytest

from driftgate.testing.checkpoints import make_checkpoint
from driftgate.testing.engine import (
    START_TIMEOUT_S,
    EngineProcess,
    launch_vllm,
    stop,
    wait_for_http,
)
from driftgate.trace import Trainer
from tests.e2e.collector import Collector, collecting
from tests.e2e.rollouts import roll_out
from tests.e2e.support import Dtype, Scored, reference, teach

DTYPES: dict[str, Dtype] = {"dense": "float32", "moe": "bfloat16"}
"""What each checkpoint is stored in and each engine computes in."""

FLAGS: dict[str, tuple[str, ...]] = {
    # vLLM's own choice for a float32 checkpoint is bfloat16.
    "dense": ("--dtype", "float32"),
    "moe": (),
    "processed": ("--dtype", "float32", "--logprobs-mode", "processed_logprobs"),
    "thinking": ("--reasoning-parser", "qwen3"),
    "scanning": ("--dtype", "float32", "--reasoning-parser", "deepseek_r1"),
}
EXTRA = ("processed", "thinking", "scanning")
"""Engines that few tests need."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write", action="store_true", help="put the tables of clients into the docs")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The machine is shared, and one thread makes runs equal to the last bit."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "dense": make_checkpoint(root / "dense", "dense", dtype="float32"),
        "moe": make_checkpoint(root / "moe", "moe", dtype="bfloat16"),
    }


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Gets the spans of the thinking engine."""
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="session")
def launched(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Path],
    collector: Collector,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, EngineProcess]]:
    """Every engine that some test of this session asks for, perhaps not ready yet."""
    logs = tmp_path_factory.mktemp("engines")
    asked = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    running: dict[str, EngineProcess] = {}
    traced = {"thinking": ("--otlp-traces-endpoint", f"{collector.url}/v1/traces")}
    try:
        for name in (*DTYPES, *(name for name in EXTRA if f"{name}_engine" in asked)):
            model = "moe" if name in ("moe", "thinking") else "dense"
            running[name] = launch_vllm(
                checkpoints[model],
                name=model,
                log=logs / f"{name}.log",
                routes=model == "moe",
                extra=FLAGS[name] + traced.get(name, ()),
            )
        yield running
    finally:
        for engine in running.values():
            stop(engine.process)


def ready(engine: EngineProcess) -> EngineProcess:
    """The engine, once it answers."""
    url = f"{engine.url}/health"
    wait_for_http(url, engine.process, engine.log, timeout_s=START_TIMEOUT_S)
    return engine


@pytest.fixture(scope="session")
def engines(launched: dict[str, EngineProcess]) -> dict[str, EngineProcess]:
    """A dense model in float32 and a MoE in bfloat16."""
    return {kind: ready(launched[kind]) for kind in DTYPES}


@pytest.fixture(scope="session")
def processed_engine(launched: dict[str, EngineProcess]) -> EngineProcess:
    """The dense model again, by an engine whose logprobs are taken after the temperature."""
    return ready(launched["processed"])


@pytest.fixture(scope="session")
def thinking_engine(launched: dict[str, EngineProcess]) -> EngineProcess:
    """The MoE by an engine that gives reasoning in a field of its own."""
    return ready(launched["thinking"])


@pytest.fixture(scope="session")
def scanning_engine(launched: dict[str, EngineProcess]) -> EngineProcess:
    """The dense model by an engine whose reasoning parser looks for an end mark in all of a
    prompt."""
    return ready(launched["scanning"])


@pytest.fixture(scope="session")
def captured(
    engines: dict[str, EngineProcess], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A store of an agent's runs from each engine, not scored."""
    root = tmp_path_factory.mktemp("captured")

    async def both() -> None:
        runs = (
            roll_out(engine, root / kind, engine_settings={"dtype": DTYPES[kind]})
            for kind, engine in engines.items()
        )
        await asyncio.gather(*runs)

    asyncio.run(both())
    return {kind: root / kind for kind in engines}


@pytest.fixture(scope="session")
def scored(
    captured: dict[str, Path],
    checkpoints: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Scored]:
    """Copies of the captured stores, scored by the reference in float32 and in the engine's
    precision."""
    root = tmp_path_factory.mktemp("scored")
    found: dict[str, Scored] = {}
    for kind, path in captured.items():
        store = Path(shutil.copytree(path, root / kind))
        trainers: dict[Dtype, Trainer] = {}
        wanted: set[Dtype] = {"float32", DTYPES[kind]}
        for dtype in wanted:
            backend = reference(checkpoints[kind], dtype)
            teach(store, backend, checkpoints[kind])
            trainers[dtype] = backend.trainer
        found[kind] = Scored(store, checkpoints[kind], trainers["float32"], trainers[DTYPES[kind]])
    return found

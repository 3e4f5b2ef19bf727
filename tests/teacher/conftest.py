"""Tiny checkpoints, and traces as an engine would have left them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import numpy as np
import pytest
from transformers import AutoTokenizer

from driftgate.storage import Reader
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.reference import ReferenceBackend
from driftgate.teacher.sequences import Sequence as Forward
from driftgate.teacher.sequences import Slice
from driftgate.testing.checkpoints import CheckpointKind, make_checkpoint
from driftgate.trace import Engine, Sampling, Trace, TraceMeta
from tests.teacher.support import MakeTrace, Say


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The machine is shared, and one thread makes runs equal to the last bit."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[CheckpointKind, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "dense": make_checkpoint(root / "dense", "dense"),
        "moe": make_checkpoint(root / "moe", "moe"),
    }


@pytest.fixture(scope="session")
def make_trace() -> MakeTrace:
    def make(
        name: str,
        prompt: Sequence[int],
        response: Sequence[int],
        *,
        logprobs: Any = None,
        trajectory: str = "t",
        step: int = 0,
        texts: list[bytes] | None = None,
        routes: Any = None,
        engine: Engine | None = None,
        **sampling: Any,
    ) -> Trace:
        spelt = texts if texts is not None else [b""] * len(response)
        meta = TraceMeta(
            trace_id=f"{name}.0",
            call_id=name,
            trajectory=trajectory,
            step=step,
            choice=0,
            api="chat",
            model="tiny",
            attribution="new",
            engine=engine
            or Engine(name="vllm", version="0.29.0", model="tiny", logprobs_mode="raw_logprobs"),
            weight_version="1",
            sampling=Sampling(**sampling),
            streamed=False,
            started_ns=1 + step,
            ended_ns=2 + step,
        )
        given = np.full(len(response), -1.0) if logprobs is None else logprobs
        return Trace(
            meta=meta,
            prompt_ids=np.asarray(prompt, np.int32),
            response_ids=np.asarray(response, np.int32),
            logprobs=np.asarray(given, np.float32),
            routes=routes,
            token_bytes=b"".join(spelt),
            token_offsets=np.cumsum([0, *map(len, spelt)], dtype=np.int32),
            request=b"{}",
            response=b"{}",
        )

    return make


@pytest.fixture(scope="session")
def backend(checkpoints: dict[CheckpointKind, Path]) -> ReferenceBackend:
    return ReferenceBackend.load(TeacherConfig(store="unused", model=str(checkpoints["moe"])))


@pytest.fixture
def config(checkpoints: dict[CheckpointKind, Path], tmp_path: Path) -> TeacherConfig:
    return TeacherConfig(store=str(tmp_path / "store"), model=str(checkpoints["moe"]))


@pytest.fixture
def reader(config: TeacherConfig) -> Iterator[Reader]:
    reader = Reader(Path(config.store))
    yield reader
    reader.close()


@pytest.fixture(scope="session")
def say(
    checkpoints: dict[CheckpointKind, Path], backend: ReferenceBackend, make_trace: MakeTrace
) -> Say:
    """Traces of an engine that is the trainer itself: its drift is exactly 0.

    ``hot``: a temperature that it scales its logprobs by.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["moe"])

    def trace(
        name: str,
        prompt: Sequence[int],
        response: Sequence[int],
        *,
        hot: float | None = None,
        **more: Any,
    ) -> Trace:
        ids = np.asarray([*prompt, *response], np.int32)
        whole = Slice(trace_id="", prompt_len=1, response_ids=ids[1:], temperature=hot)
        (result,) = backend.score([Forward(ids=ids[:-1], slices=(whole,))])
        logprobs = result.logprobs if hot is None else result.at_temperature
        assert logprobs is not None
        given = {
            "logprobs": logprobs[len(prompt) - 1 :],
            "routes": result.routes,
            "texts": [tokenizer.decode([token]).encode() for token in response],
        }
        return make_trace(name, prompt, response, **{**given, **more})

    return trace

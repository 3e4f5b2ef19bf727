"""The loop over a real store: nothing scored twice, nothing lost, nothing tried forever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from driftgate.errors import TeacherError
from driftgate.storage import Leases, Reader, Writer
from driftgate.teacher.base import SliceResult
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.reference import ReferenceBackend
from driftgate.teacher.sequences import Sequence as Forward
from driftgate.teacher.sequences import Slice
from driftgate.teacher.worker import Report, Worker
from driftgate.testing.checkpoints import CheckpointKind
from driftgate.trace import Trace

MakeTrace = Callable[..., Trace]
Say = Callable[..., Trace]


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def say(
    checkpoints: dict[CheckpointKind, Path], backend: ReferenceBackend, make_trace: MakeTrace
) -> Say:
    """Traces of an engine that is the trainer itself: its drift is exactly 0."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["moe"])

    def trace(name: str, prompt: Sequence[int], response: Sequence[int], **more: Any) -> Trace:
        ids = np.asarray([*prompt, *response], np.int32)
        part = Slice(trace_id="", prompt_len=len(prompt), response_ids=ids[len(prompt) :])
        (result,) = backend.score([Forward(ids=ids[:-1], slices=(part,))])
        given = {
            "logprobs": result.logprobs,
            "texts": [tokenizer.decode([token]).encode() for token in response],
        }
        return make_trace(name, prompt, response, **{**given, **more})

    return trace


def store(config: TeacherConfig, *traces: Trace) -> None:
    writer = Writer(Path(config.store))
    for future in [writer.submit(trace) for trace in traces]:
        future.result(timeout=30)
    writer.close()


def teach(config: TeacherConfig, backend: Any) -> Report:
    worker = Worker(config, backend)
    try:
        return worker.run(threading.Event())
    finally:
        worker.close()


def tokens(seed: int, count: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(300, 1990, count).tolist()
    return found


def test_a_trajectory_is_scored_in_one_pass_and_once(
    config: TeacherConfig, backend: ReferenceBackend, say: Say
) -> None:
    ids = tokens(0, 60)
    store(config, say("a", ids[:20], ids[20:30]), say("b", ids[:40], ids[40:60], step=1))
    report = teach(config, backend)
    assert (report.trajectories, report.scored, report.refused) == (1, 2, 0)
    reader = Reader(Path(config.store))
    rows = reader.scores("t", kind="drift")
    assert [(row.meta.trace_id, row.meta.one_pass) for row in rows] == [
        ("a.0", True),
        ("b.0", False),
    ]
    last = reader.score("b.0")
    assert last.meta.bucket is not None
    assert last.meta.bucket.metrics()["abs_log_ratio_max"] == 0.0
    assert last.meta.comparable.verdict == "yes"
    assert last.logprobs.shape == last.entropy.shape == (20,)
    assert last.routes is not None
    assert last.routes.shape == (20, 4, 4)
    assert teach(config, backend).trajectories == 0
    reader.close()


def test_the_trainers_noise_floor_is_zero_and_taken_once(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    store(config, *(say(str(n), tokens(n, 9), tokens(-~n, 5), trajectory=str(n)) for n in range(4)))
    assert teach(config, backend).noise_floor == 2
    assert teach(config, backend).noise_floor == 0
    for row in reader.scores(kind="noise_floor"):
        assert row.meta.engine == row.meta.trainer == backend.trainer
        assert row.meta.bucket is not None
        assert row.meta.bucket.metrics()["abs_log_ratio_max"] == 0.0
        assert row.meta.router is not None
        assert row.meta.router.metrics()["router_set_disagree_rate"] == 0.0

"""Real processes: started, followed, stopped with SIGTERM; nothing of them is left behind."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from driftgate.storage import Leases, Reader, Writer
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.launch import launch
from driftgate.testing.checkpoints import CheckpointKind
from driftgate.trace import Trace

MakeTrace = Callable[..., Trace]

RUN = """
import logging, sys, msgspec
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.launch import launch
logging.basicConfig(level=logging.INFO)
sys.exit(launch(msgspec.json.decode(sys.argv[1], type=TeacherConfig)))
"""


@pytest.mark.parametrize(("backend", "nproc"), [("reference", 1), ("fsdp", 2)])
def test_a_follower_scores_what_is_there_and_stops_when_told(
    checkpoints: dict[CheckpointKind, Path],
    make_trace: MakeTrace,
    tmp_path: Path,
    backend: Literal["reference", "fsdp"],
    nproc: int,
) -> None:
    config = TeacherConfig(
        store=str(tmp_path),
        model=str(checkpoints["dense"]),
        backend=backend,
        nproc=nproc,
        follow=True,
    )
    writer = Writer(tmp_path)
    for n in range(3):
        writer.submit(make_trace(str(n), [400, 401, 402], [403, 404 + n], trajectory=str(n)))
    writer.close()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, msgspec.json.encode(config).decode()],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    reader = Reader(tmp_path)
    try:
        scores = wait_until(process, lambda: reader.scores(kind="drift"), 3)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert {row.meta.trainer.backend for row in scores} == {backend}
    assert {getattr(row.meta.trainer, "world_size", None) for row in scores} == {nproc}
    leases = Leases(tmp_path)
    assert leases.acquire(scores[0].meta.trainer.digest, worker="next", ttl_s=9.0) is None
    leases.close()
    reader.close()


FAIL = """
import os
if os.environ.get("RANK") == os.environ["FAILING_RANK"]:
    from driftgate.teacher.scorer import Scorer

    def fail(*_):
        raise RuntimeError("planted in a forward\\nwith a second line")

    run = Scorer.run
    def failing(self, sequences, device, how):
        self.model.base_model.layers[1].register_forward_pre_hook(fail)
        return run(self, sequences, device, how)
    Scorer.run = failing
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_fails_inside_a_forward_ends_all(
    checkpoints: dict[CheckpointKind, Path],
    make_trace: MakeTrace,
    tmp_path: Path,
    rank: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The other rank waits for the failed one's part of a layer, and must not do so for long."""
    (tmp_path / "sitecustomize.py").write_text(FAIL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAILING_RANK", rank)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    store = tmp_path / "store"
    writer = Writer(store)
    for n in range(2):
        writer.submit(make_trace(str(n), [400, 401], [403, 404 + n], trajectory=str(n)))
    writer.close()
    config = TeacherConfig(
        store=str(store), model=str(checkpoints["dense"]), backend="fsdp", nproc=2
    )
    with caplog.at_level(logging.ERROR, logger="driftgate.teacher"):
        assert launch(config) == 1
    assert caplog.messages == ["the teacher stopped: RuntimeError: planted in a forward"]


def test_a_store_that_fails_is_one_line_and_no_traceback(
    checkpoints: dict[CheckpointKind, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Writer(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as index:
        index.execute("PRAGMA user_version = 1")
    config = TeacherConfig(
        store=str(tmp_path), model=str(checkpoints["dense"]), backend="fsdp", nproc=2
    )
    assert launch(config) == 1
    said = capfd.readouterr().err
    assert "run `driftgate index rebuild`" in said
    assert "Traceback" not in said


def test_a_stop_before_rank_0_has_begun_is_no_failure(
    checkpoints: dict[CheckpointKind, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def start(*given: Any, **more: Any) -> subprocess.Popen[bytes]:
        started.append(real(*given, **more))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    config = TeacherConfig(
        store=str(tmp_path / "store"), model=str(checkpoints["dense"]), backend="fsdp", nproc=2
    )
    assert launch(config) == 0
    assert started[0].poll() is not None, "nothing is left behind"


def wait_until(
    process: subprocess.Popen[str], read: Callable[[], list[Any]], count: int
) -> list[Any]:
    """What ``read`` gives once it is ``count`` long; fails if the process ends before."""
    tick = threading.Event()
    for _ in range(900):
        if len(rows := read()) >= count:
            return rows
        assert process.poll() is None, process.communicate()[1]
        tick.wait(0.1)
    raise AssertionError(f"fewer than {count} came in 90 s")


def test_a_checkpoint_without_weights_is_one_clear_line(
    checkpoints: dict[CheckpointKind, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_bytes((checkpoints["dense"] / "config.json").read_bytes())
    config = TeacherConfig(store=str(tmp_path / "store"), model=str(tmp_path))
    with caplog.at_level(logging.ERROR, logger="driftgate.teacher"):
        assert launch(config) == 1
    assert "cannot load the checkpoint" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "/nowhere"}, "no checkpoint directory"),
        ({"nproc": 2}, "reference is one process"),
        ({"lease_s": 0.1}, "lease_s must be at least 1"),
        ({"lease_s": 7200}, "at most 3600"),
        ({"max_tokens": 1}, "leaves no room"),
        ({"tensor_parallel": 2}, "are not for reference"),
        ({"backend": "megatron", "nproc": 3, "tensor_parallel": 2}, "must be a multiple of tp"),
        ({"backend": "megatron", "nproc": 2, "expert_parallel": 4}, "of ep \\* pp = 4"),
        ({"backend": "megatron", "pipeline_parallel": 0}, "at least 1"),
        ({"backend": "megatron", "sequence_parallel": True}, "tp must be above 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    checkpoints: dict[CheckpointKind, Path], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        TeacherConfig(**{"store": "unused", "model": str(checkpoints["dense"]), **changes})

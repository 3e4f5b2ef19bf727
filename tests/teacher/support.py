"""What the tests of the worker share: a store, a run over it, tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from driftgate.storage import Writer
from driftgate.teacher.base import SliceResult
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.reference import ReferenceBackend
from driftgate.teacher.sequences import Sequence
from driftgate.teacher.worker import Report, Worker
from driftgate.trace import Trace

MakeTrace = Callable[..., Trace]
Say = Callable[..., Trace]


def store(config: TeacherConfig, *traces: Trace) -> None:
    writer = Writer(Path(config.store))
    for future in [writer.submit(trace) for trace in traces]:
        future.result(timeout=30)
    writer.close()


def teach(config: TeacherConfig, backend: Any, stop: threading.Event | None = None) -> Report:
    worker = Worker(config, backend)
    try:
        return worker.run(stop or threading.Event())
    finally:
        worker.close()


def tokens(seed: int, count: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(300, 1990, count).tolist()
    return found


class Stub:
    """The real backend, but for ``instead`` of its ``score`` and how many it works on at once."""

    def __init__(
        self,
        real: ReferenceBackend,
        instead: Callable[[list[Sequence]], list[SliceResult]],
        *,
        parallel: int = 1,
    ) -> None:
        self._real, self.score, self.parallel = real, instead, parallel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

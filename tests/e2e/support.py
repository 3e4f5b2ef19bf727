"""What the end-to-end tests share: a gateway before a real engine, calls, stores, a teacher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp

from driftgate.gateway.app import serve
from driftgate.gateway.config import GatewayConfig
from driftgate.storage import Reader, Writer
from driftgate.teacher.base import Backend
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.reference import ReferenceBackend
from driftgate.teacher.worker import Report, Worker
from driftgate.testing.engine import EngineProcess
from driftgate.trace import Score, Trace, Trainer

WEIGHT_VERSION = "step-7"
"""Of every engine and trainer here, unless a test says otherwise."""

Dtype = Literal["auto", "bfloat16", "float32"]

CHAT, COMPLETIONS = "chat/completions", "completions"


@dataclass(frozen=True, slots=True)
class Proxied:
    """A gateway in front of one engine, on a store of its own."""

    url: str
    engine: EngineProcess
    store: Path
    http: aiohttp.ClientSession

    def traces(self, trajectory: str) -> list[Trace]:
        """All traces of a trajectory; in strict mode they are durable before the answer ends."""
        return stored_traces(self.store, trajectory)

    async def call(self, trajectory: str, payload: dict[str, Any], *, api: str = CHAT) -> Any:
        """An agent's call in ``trajectory``; the answer as ``ask`` gives it."""
        return await ask(self.http, f"{self.url}/t/{trajectory}/v1", payload, api=api)


@dataclass(frozen=True, slots=True)
class Scored:
    """A captured store after the reference has scored it."""

    store: Path
    checkpoint: Path
    exact: Trainer
    """In float32."""
    native: Trainer
    """In the engine's precision."""


@asynccontextmanager
async def proxy(engine: EngineProcess, store: Path, **settings: Any) -> AsyncIterator[Proxied]:
    """A gateway that has probed ``engine`` and records in ``store``, strictly unless told else."""
    chosen: dict[str, Any] = {"durability": "strict", "weight_version": WEIGHT_VERSION, **settings}
    config = GatewayConfig(upstream=engine.url, port=0, store=store, **chosen)
    async with serve(config) as url, aiohttp.ClientSession() as http:
        while (await http.get(f"{url}/readyz")).status != 200:
            pass  # the probe's own calls would share a batch with the test's
        yield Proxied(url, engine, store, http)


async def ask(
    http: aiohttp.ClientSession, url: str, payload: dict[str, Any], *, api: str = CHAT
) -> Any:
    """A JSON answer decoded, or the list of a stream's decoded chunks. ``url`` ends in ``/v1``."""
    async with http.post(f"{url}/{api}", json=payload) as answer:
        text = await answer.text()
        assert answer.status == 200, text
    if not payload.get("stream"):
        return json.loads(text)
    events = [event.removeprefix("data: ") for event in text.strip().split("\n\n")]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def without_identity(value: Any) -> Any:
    """Drop what differs between any two answers of an engine: ids of answers and calls, times."""
    if isinstance(value, dict):
        return {k: without_identity(v) for k, v in value.items() if k not in ("id", "created")}
    return [without_identity(v) for v in value] if isinstance(value, list) else value


def stored_traces(store: Path, *trajectories: str) -> list[Trace]:
    """Traces in order of step and choice; without names those of every trajectory."""
    with closing(Reader(store)) as reader:
        names = trajectories or [row.trajectory for row in reversed(reader.trajectories())]
        rows = [row for name in names for row in reader.traces(name)]
        return [reader.trace(row.meta.trace_id) for row in rows]


def stored_scores(store: Path, trainer: str | None = None, *, kind: str = "drift") -> list[Score]:
    """Scores in order of their cursor; ``trainer``: only of this digest."""
    with closing(Reader(store)) as reader:
        metas = [row.meta for row in reader.scores(kind=kind, limit=10_000)]
        return [
            reader.score(meta.trace_id, meta.trainer.digest, kind=kind)
            for meta in metas
            if trainer in (None, meta.trainer.digest)
        ]


def codes(score: Score) -> set[str]:
    """Codes of the reasons of a score's verdict."""
    return {reason.code for reason in score.meta.comparable.reasons}


def write(store: Path, traces: Iterable[Trace]) -> Path:
    """A store of these traces."""
    with closing(Writer(store)) as writer:
        for pending in [writer.submit(trace) for trace in traces]:
            pending.result(timeout=30)
    return store


def reference(checkpoint: Path, dtype: Dtype = "auto") -> ReferenceBackend:
    """The reference trainer on a checkpoint."""
    config = TeacherConfig(store="unused", model=str(checkpoint), dtype=dtype)
    return ReferenceBackend.load(config)


def teach(store: Path, backend: Backend, checkpoint: Path) -> Report:
    """Score all of a store; ``checkpoint`` gives the tokenizer that the traces are checked with."""
    config = TeacherConfig(store=str(store), model=str(checkpoint), weight_version=WEIGHT_VERSION)
    with closing(Worker(config, backend)) as worker:
        return worker.run(threading.Event())


def driftgate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    command = [sys.executable, "-m", "driftgate.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

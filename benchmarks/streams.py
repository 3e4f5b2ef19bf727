"""What complete capture costs a streaming MoE agent: time to the first token, by each way to have
the routed experts, on a real vLLM.

The stand-in of the other benchmarks samples nothing, so it cannot say when a first token comes.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import aiohttp

from benchmarks.report import Goal, Section, Table
from benchmarks.stage import Stage
from driftgate.storage import Reader
from driftgate.testing.checkpoints import make_checkpoint
from driftgate.testing.engine import EngineProcess, free_port, start_vllm

__all__ = ["run"]

WAYS: tuple[Literal["plugin", "synthesise"], ...] = ("plugin", "synthesise")
ANSWERS = 16
"""Of each way and length, the ways in turns."""
TOKENS = (32, 128)
PROMPT_WORDS = 300
ADDED_GOAL_MS = 10.0
"""Of the first token, by the plugin: a fraction of what any real model takes for its prompt."""

HOW = """\
A tiny random MoE on a real vLLM on CPU (one thread), one stream at a time, the ways in turns, every
prompt new. *First token*: from sending the request to the first event with text; *last*: to the end
of the stream. A first token that comes with the last is what a written stream costs, and grows with
the answer. *Whole traces* have ids, logprobs and the routes of every token."""


@dataclass(slots=True)
class Way:
    """One way from agent to engine, and what was measured."""

    name: str
    url: str
    store: Path | None = None
    first_ms: dict[int, list[float]] = field(default_factory=dict)
    last_ms: dict[int, list[float]] = field(default_factory=dict)

    def cells(self, tokens: int) -> list[str]:
        """Its row of the table, without the traces."""
        first, last = self.first_ms[tokens], self.last_ms[tokens]
        values = (median(first), quantiles(first, n=10)[-1], median(last))
        return [f"{value:,.1f}" for value in values]


def run(progress: Callable[[str], None]) -> Section:
    """Start an engine and a gateway for each way, ask, count."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        checkpoint = make_checkpoint(root / "moe", "moe")
        progress("starting vLLM")
        with start_vllm(checkpoint, name="moe", log=root / "vllm.log", routes=True) as engine:
            with Stage(root / "logs") as stage:
                ways = [Way("engine directly", engine.url), *_gateways(stage, engine, root)]
                asyncio.run(_measure(ways, engine.model, progress))
            return _section(ways)


def _gateways(stage: Stage, engine: EngineProcess, root: Path) -> list[Way]:
    names = {"plugin": "gateway, plugin", "synthesise": "gateway, written stream"}
    found = []
    for mode in WAYS:
        port, store = free_port(), root / mode
        command = [sys.executable, "-m", "driftgate.cli", "serve", "--upstream", engine.url]
        command += ["--port", str(port), "--store", str(store), "--streaming-routes", mode]
        url = f"http://127.0.0.1:{port}"
        stage.start(mode, command, cores=os.sched_getaffinity(0), ready=f"{url}/readyz")
        found.append(Way(names[mode], url, store))
    return found


async def _measure(ways: list[Way], model: str, progress: Callable[[str], None]) -> None:
    async with aiohttp.ClientSession() as http:
        for way in ways:
            await _ask(http, way.url, model, "warm", TOKENS[0])
        for tokens in TOKENS:
            progress(f"answers of {tokens} tokens")
            for number in range(ANSWERS):
                for way in ways:
                    # The way's name stands first, or the prompt would be in the prefix cache.
                    first, last = await _ask(http, way.url, model, f"{way.name} {number}", tokens)
                    way.first_ms.setdefault(tokens, []).append(first * 1e3)
                    way.last_ms.setdefault(tokens, []).append(last * 1e3)


async def _ask(
    http: aiohttp.ClientSession, url: str, model: str, name: str, tokens: int
) -> tuple[float, float]:
    """Seconds to the first text and to the end of a stream of ``tokens`` tokens."""
    words = " ".join(["list", "the", "files"] * (PROMPT_WORDS // 3))
    asked: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": f"{name} {tokens}: {words}"}],
        "stream": True,
        "max_tokens": tokens,
        "ignore_eos": True,
        "seed": 1,
    }
    first = None
    started = time.perf_counter()
    async with http.post(f"{url}/v1/chat/completions", json=asked) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if first is None and b'"content":"' in line and b'"content":""' not in line:
                first = time.perf_counter() - started
    assert first is not None, "the stream had no text"
    return first, time.perf_counter() - started


def _whole(store: Path) -> tuple[int, int]:
    """Traces that miss nothing, and all."""
    with closing(Reader(store)) as reader:
        names = [row.trajectory for row in reader.trajectories(limit=500)]
        metas = [row.meta for name in names for row in reader.traces(name)]
    whole = sum(not meta.missing and meta.routes_via != "none" for meta in metas)
    return whole, len(metas)


def _section(ways: list[Way]) -> Section:
    columns = ["way", "first token, p50 ms", "p90 ms", "last token, p50 ms", "whole traces"]
    traces = {way.name: _whole(way.store) for way in ways if way.store is not None}
    section = Section("streams", "Streams of a MoE with their routes", HOW)
    for tokens in TOKENS:
        rows = []
        for way in ways:
            whole, every = traces.get(way.name, (0, 0))
            shown = f"{whole} of {every}" if every else "none"
            rows.append([way.name, *way.cells(tokens), shown])
        section.tables.append(Table(f"Answers of {tokens} tokens", columns, rows))
    direct, plugin, _ = (median(way.first_ms[TOKENS[-1]]) for way in ways)
    added = plugin - direct
    section.goals.append(
        Goal(
            "added to the first token by gateway and plugin",
            f"at most {ADDED_GOAL_MS:.0f} ms",
            f"{added:.1f} ms",
            added <= ADDED_GOAL_MS,
        )
    )
    asked = len(TOKENS) * ANSWERS + 1
    lacking = sum(asked - whole for whole, _ in traces.values())
    section.goals.append(
        Goal("streams without a whole trace, over both ways", "0", str(lacking), lacking == 0)
    )
    return section

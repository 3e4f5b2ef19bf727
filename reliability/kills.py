"""``kill -9`` of the gateway at random moments under concurrent calls; what the next start says.

In ``group`` an answer waits for the sync that is under way before its record is handed to the
operating system: on a disk whose syncs take longer than 25 ms more than the last 50 ms can be lost,
and the row counts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from driftgate.storage import Reader
from reliability.agent import ask, path_of
from reliability.answers import Said, request, say
from reliability.engine import SSE_HEAD, End, Engine, chunked, serve_engine, well
from reliability.gateway import Gateway, start
from reliability.verdict import Call, Row, read_call

__all__ = ["SCRIPTS", "Load", "run"]

Durability = Literal["strict", "group"]

AGENTS = 64
FIRST_KILL_S, LAST_KILL_S = 0.02, 1.0
"""After the load has begun; an answer takes up to a fifth of a second."""

GROUP_S = 0.05
"""What ``group`` may lose."""

STEP_S = 0.02


def slowly(said: Said, stream: bool) -> Iterator[bytes | float | End]:
    """An answer that takes its time, so that kills meet calls in every state."""
    pause_s = STEP_S * (1 + hash(said.name) % 3)
    if not stream:
        yield pause_s
        yield from well(said, stream)
        return
    events = said.events()
    yield SSE_HEAD
    for at in range(0, len(events), 4):
        yield chunked(*events[at : at + 4], end=False)
        yield pause_s
    yield chunked()


SCRIPTS = {"slowly": slowly}


@dataclass(slots=True)
class Load:
    """Agents that call one after the other until they are told to stop or cannot any more."""

    gateway: Gateway
    engine: Engine
    label: str
    calls: list[Call] = field(default_factory=list)
    """Every call that an agent made, also those that were cut."""
    stopping: bool = False

    async def agent(self, number: int) -> None:
        """One trajectory."""
        trajectory = f"{self.label}-{number}"
        for step in range(1 << 30):
            name = f"{trajectory}-{step}"
            body = request("slowly", name, stream=bool((number + step) % 2))
            seen = await ask(self.gateway.url, body, path=path_of(trajectory))
            said = say(name, asked=True, spell=self.engine.spell)
            self.calls.append(Call(said, trajectory, body, seen))
            if self.stopping or not seen.answered:
                return

    @contextlib.asynccontextmanager
    async def running(self, agents: int = AGENTS) -> AsyncIterator[None]:
        """Under way for the length of the block; ended by whoever ends the gateway, or politely."""
        tasks = [asyncio.create_task(self.agent(number)) for number in range(agents)]
        try:
            yield
        finally:
            self.stopping = True
            await asyncio.gather(*tasks)


async def one_kill(
    engine: Engine, store: Path, durability: Durability, label: str, source: random.Random
) -> tuple[Load, float]:
    """Start, load, kill; the load and when it was killed."""
    gateway = await start(engine.url, store, "--durability", durability)
    load = Load(gateway, engine, label)
    async with load.running():
        await asyncio.sleep(source.uniform(FIRST_KILL_S, LAST_KILL_S))
        killed_at = time.monotonic()
        gateway.kill()
    return load, killed_at


def judge(row: Row, store: Path, load: Load, killed_at: float, durability: Durability) -> float:
    """After the next start. The age in seconds, at the kill, of the oldest answer that is not
    stored."""
    reader, oldest_s = Reader(store), 0.0
    came = set(load.engine.came)
    for call in load.calls:
        stored, name = read_call(reader, call), call.said.name
        if wrong := stored.wrong(call):
            row.wrong += wrong
            row.notes.append(f"{name}: {wrong} traces differ from what was sent")
        if call.seen.answered and not stored.has(call):
            age_s = killed_at - call.seen.ended_at
            oldest_s = max(oldest_s, age_s)
            if durability == "strict" or age_s > GROUP_S:
                row.lose(f"{name}: its end was there {age_s * 1000:.0f} ms before the kill")
        elif durability == "strict" and name in came and not stored.known:
            row.lose(f"{name}: the engine was asked, and no record names it")
        if stored.still_open:
            row.check(False, f"{name}: still open after the next start")
    reader.close()
    return oldest_s


async def of(folder: Path, durability: Durability, tries: int, seed: int = 0) -> Row:
    """``tries`` kills on one store."""
    row = Row(f"kill -9 of the gateway, {durability}")
    source, store = random.Random(seed), folder / f"kills-{durability}"
    ends, cut, oldest_s = 0, 0, 0.0
    async with serve_engine(SCRIPTS) as engine:
        for number in range(tries):
            label = f"{durability}{number}"
            load, killed_at = await one_kill(engine, store, durability, label, source)
            await asyncio.to_thread(_recover, store)
            oldest_s = max(oldest_s, judge(row, store, load, killed_at, durability))
            ends += sum(call.seen.answered for call in load.calls)
            cut += sum(not call.seen.answered for call in load.calls)
            row.tries += 1
            engine.came.clear()
    row.saw = f"{ends:,} answers, {cut:,} cut"
    if durability == "group":
        row.saw += f"; oldest answer not stored: {oldest_s * 1000:.0f} ms"
    return row


def _recover(store: Path) -> None:
    """What every start of a gateway does first."""
    from driftgate.storage import Writer

    Writer(store).close()


async def run(folder: Path, *, full: bool) -> list[Row]:
    """Both durabilities."""
    tries = 100 if full else 4
    return [await of(folder, "strict", tries), await of(folder, "group", tries)]

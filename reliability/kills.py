"""``kill -9`` of the gateway at random moments under concurrent calls; what the next start says.

The next start is a real gateway: it recovers by itself, and its API must name every call that was
under way. No answer whose end an agent has may be missing, in ``group`` either: what differs
between the two is what the machine's end may cost, and no machine is stopped here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from driftgate.storage import Reader
from driftgate.testing.engine import stop
from reliability.agent import ask, get, path_of
from reliability.answers import Said, request, say
from reliability.engine import SSE_HEAD, End, Engine, chunked, serve_engine, well
from reliability.gateway import Gateway, start, until
from reliability.slowdisk import SlowDisk, compiler
from reliability.verdict import Call, Row, digest_of, read_call

__all__ = ["SCRIPTS", "Load", "run"]

Durability = Literal["strict", "group"]

AGENTS = 64
FIRST_KILL_S, LAST_KILL_S = 0.02, 1.0
"""After the first answer; one takes up to a fifth of a second."""

STEP_S = 0.02

SLOW_SYNC_MS = 300

KILLED = "the gateway ended before the call did"


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
    pause_s: float = 0.0
    """Of each agent, between two calls."""

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
            await asyncio.sleep(self.pause_s)

    @contextlib.asynccontextmanager
    async def running(self, agents: int = AGENTS) -> AsyncIterator[None]:
        """Under way for the length of the block; ended by whoever ends the gateway, or politely."""
        tasks = [asyncio.create_task(self.agent(number)) for number in range(agents)]
        try:
            yield
        finally:
            self.stopping = True
            await asyncio.gather(*tasks)


async def one_kill(gateway: Gateway, load: Load, source: random.Random) -> float:
    """Load, then kill; when it was."""
    async with load.running():
        await until(lambda: bool(load.calls))  # the first ones wait until the engine is known
        await asyncio.sleep(source.uniform(FIRST_KILL_S, LAST_KILL_S))
        killed_at = time.monotonic()
        gateway.kill()
    return killed_at


def judge(row: Row, store: Path, load: Load, killed_at: float, durability: Durability) -> None:
    """After the next start."""
    reader = Reader(store)
    came = set(load.engine.came)
    for call in load.calls:
        stored, name = read_call(reader, call), call.said.name
        if wrong := stored.wrong(call):
            row.wrong += wrong
            row.notes.append(f"{name}: {wrong} traces differ from what was sent")
        if call.seen.answered and not stored.has(call):
            age_ms = (killed_at - call.seen.ended_at) * 1000
            row.lose(f"{name}: its end was there {age_ms:.0f} ms before the kill")
        elif durability == "strict" and name in came and not stored.known:
            row.lose(f"{name}: the engine was asked, and no record names it")
        if stored.still_open:
            row.check(False, f"{name}: still open after the next start")
    reader.close()


async def named(row: Row, gateway: Gateway, load: Load, durability: Durability) -> int:
    """How many of the calls that were under way the API of the next gateway names as lost."""
    came, count = set(load.engine.came), 0
    for call in load.calls:
        if call.seen.answered or call.said.name not in came:
            continue
        ours = await calls_of(gateway, call)
        states = {one["state"] for one in ours}
        row.check(states <= {"done", "failed"}, f"{call.said.name}: /api says {states}")
        if durability == "strict" and not ours:
            row.lose(f"{call.said.name}: /api does not name it")
        failed = [one["outcome"]["reason"] for one in ours if one["state"] == "failed"]
        row.check(all(KILLED in why for why in failed), f"{call.said.name}: /api says {failed}")
        count += bool(failed)
    return count


async def calls_of(gateway: Gateway, call: Call) -> list[dict[str, Any]]:
    """What ``/api/trajectories/{trajectory}`` says of one call."""
    seen = await get(gateway.url, f"/api/trajectories/{quote(call.trajectory, safe='')}")
    steps = json.loads(seen.body)["steps"] if seen.status == 200 else []
    digest = digest_of(call.body)
    calls = [one for step in steps for one in step["calls"]]
    return [one for one in calls if one["intent"] and one["intent"]["body_sha256"] == digest]


async def of(folder: Path, durability: Durability, tries: int, *, sync_ms: int = 0) -> Row:
    """``tries`` kills on one store; each next gateway is the one that is killed then."""
    row = Row(f"kill -9 of the gateway, {durability}")
    row.fault += f", each sync takes {sync_ms} ms" if sync_ms else ""
    source, store = random.Random(0), folder / f"kills-{durability}-{sync_ms}"
    ends, lost_calls = 0, 0
    disk = SlowDisk(store) if sync_ms else None
    wrap = disk.wrap if disk else ()
    options = ("--durability", durability)
    async with serve_engine(SCRIPTS) as engine:
        gateway = await start(engine.url, store, *options, wrap=wrap)
        for number in range(tries):
            load = Load(gateway, engine, f"{durability}{number}")
            if disk is not None:
                disk.be(sync_ms=sync_ms)
            killed_at = await one_kill(gateway, load, source)
            if disk is not None:
                disk.be()
            gateway = await start(engine.url, store, *options, wrap=wrap)
            judge(row, store, load, killed_at, durability)
            lost_calls += await named(row, gateway, load, durability)
            ends += sum(call.seen.answered for call in load.calls)
            row.tries += 1
            engine.came.clear()
        await asyncio.to_thread(stop, gateway.process)
    row.saw = f"{ends:,} answers; {lost_calls:,} calls under way, all named by /api"
    return row


async def run(folder: Path, *, full: bool) -> list[Row]:
    """Both durabilities; ``group`` also on a disk whose syncs take long."""
    tries = 100 if full else 3
    rows = [await of(folder, "strict", tries), await of(folder, "group", tries)]
    if compiler() is not None:
        rows.append(await of(folder, "group", tries // 2, sync_ms=SLOW_SYNC_MS))
    return rows

"""SIGTERM under load, a rolling restart behind one address, and two gateways on one store."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import openai

from driftgate.storage import Reader
from driftgate.testing.engine import stop
from reliability.agent import Seen, ask, path_of
from reliability.answers import MODEL, Said, request, say
from reliability.engine import Engine, serve_engine, well
from reliability.gateway import Gateway, running, start, until
from reliability.kills import SCRIPTS, Load
from reliability.upstream import Parts
from reliability.verdict import Call, Row

__all__ = ["run"]

STOP_S = 8.0 + 2.0
"""A gateway's deadline for calls under way, and a moment for the store."""

ROLLS = 2
"""Restarts of each gateway in one try."""


class Held:
    """Answers that come when they are let go."""

    def __init__(self) -> None:
        self.released = False

    def __call__(self, said: Said, stream: bool) -> Parts:
        while not self.released:
            yield 0.02
        yield from well(said, stream)


async def terminated(engine: Engine, folder: Path, tries: int) -> Row:
    """Stops accepting, lets the calls under way end, loses nothing."""
    row, slowest_s, answers, turned_away = Row("SIGTERM under 64 calls"), 0.0, 0, 0
    for number in range(tries):
        store = folder / f"terminated-{number}"
        gateway = await start(engine.url, store)
        load = Load(gateway, engine, f"terminated{number}")
        async with load.running():
            await asyncio.sleep(0.3)
            load.stopping = True  # each agent ends its call and makes no other
            signalled_at = time.monotonic()
            status = await gateway.end()
            took_s = time.monotonic() - signalled_at
        refused = await ask(gateway.url, request("well", "late", stream=False))
        slowest_s, row.tries = max(slowest_s, took_s), row.tries + 1
        answers += sum(call.seen.answered for call in load.calls)
        row.judge(store, load.calls)
        unanswered = [call for call in load.calls if not call.seen.answered]
        cut = [call for call in unanswered if call.said.name in engine.came]
        turned_away += len(unanswered) - len(cut)
        row.check(not cut, f"{len(cut)} calls under way were cut")
        row.check(status == 0, f"exit status {status}")
        row.check(took_s < STOP_S, f"stopped after {took_s:.1f} s")
        row.check(refused.ended == "refused", f"a call after the end saw {refused.words}")
        reader = Reader(store)
        left_open = len(reader.open_calls())
        reader.close()
        row.check(not left_open, f"{left_open} calls are open in the store")
    row.worst = slowest_s * 1000
    row.saw = f"{answers} answers, {turned_away} not accepted"
    return row


class Switch:
    """One address before several gateways: new connections go to the one that is named."""

    def __init__(self) -> None:
        self.url = ""
        self.target = ""

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """For the length of the block."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield
        finally:
            server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = urlsplit(self.target)
        try:
            there, back = await asyncio.open_connection(address.hostname, address.port)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(_pipe(reader, back), _pipe(there, writer))


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


async def rolling(engine: Engine, folder: Path, tries: int) -> Row:
    """Two gateways on one store are replaced one after the other under openai's client."""
    row, calls_made, failed = Row("rolling restart of two gateways"), 0, 0
    for number in range(tries):
        store, switch = folder / f"rolling-{number}", Switch()
        current = await start(engine.url, store)
        switch.target = current.url
        async with switch.listening():
            over = asyncio.Event()
            agents = [
                asyncio.create_task(_agent(switch.url, f"rolling{number}-{agent}", over))
                for agent in range(16)
            ]
            for _ in range(ROLLS):
                following = await start(engine.url, store)
                switch.target = following.url
                await current.end()
                current = following
            over.set()
            made = [await agent for agent in agents]
        await current.end()
        calls_made += sum(len(names) for names, _ in made)
        failed += sum(errors for _, errors in made)
        _judge_agents(row, store, [names for names, _ in made])
        row.tries += 1
    row.check(not failed, f"{failed} agents' calls failed")
    row.saw = f"{calls_made} answers, {failed} failed calls"
    return row


async def _agent(url: str, trajectory: str, over: asyncio.Event) -> tuple[list[str], int]:
    """Names of its answered calls, and how many failed in the SDK's hands."""
    names: list[str] = []
    errors = 0
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        while not over.is_set():
            name = f"{trajectory}.{len(names) + errors}"
            try:
                answer = await client.chat.completions.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": f"slowly {name}"}],
                    extra_headers={"x-driftgate-trajectory": trajectory},
                )
            except openai.OpenAIError:
                errors += 1
                continue
            assert answer.choices[0].message.content == say(name, asked=True).content
            names.append(name)
    return names, errors


def _judge_agents(row: Row, store: Path, agents: list[list[str]]) -> None:
    reader = Reader(store)
    for names in agents:
        trajectory = names[0].rpartition(".")[0]
        traces = [reader.trace(found.meta.trace_id) for found in reader.traces(trajectory)]
        said = {name: say(name, asked=True) for name in names}
        stored = {tuple(t.response_ids.tolist()) for t in traces if t.response_ids is not None}
        for name in names:
            if tuple(said[name].ids) not in stored:
                row.lose(f"{name}: answered and not stored")
        steps = [call.step for call in reader.calls(trajectory) if call.state == "done"]
        row.check(len(set(steps)) == len(steps), f"{trajectory}: steps {steps}")
    open_calls = len(reader.open_calls())
    reader.close()
    row.check(not open_calls, f"{open_calls} calls are open in the store")


async def neighbours(engine: Engine, held: Held, folder: Path, tries: int) -> Row:
    """One of two gateways on a store is killed and starts again: the other's calls stay its own."""
    row, store = Row("kill -9 of one of two gateways on a store"), folder / "neighbours"
    async with running(engine.url, store, "--durability", "strict") as steady:
        for number in range(tries):
            held.released = False
            other = await start(engine.url, store, "--durability", "strict")
            ours, theirs = f"steady.{number}", f"killed.{number}"
            calling = [
                asyncio.create_task(_held(gateway, name))
                for gateway, name in ((steady, ours), (other, theirs))
            ]
            pair = {ours, theirs}
            await until(lambda pair=pair: pair <= set(engine.came))  # type: ignore[misc]
            other.kill()
            again = await start(engine.url, store)
            states = _states(store, ours), _states(store, theirs)
            row.check(states == ("open", "failed"), f"stored as {states}")
            held.released = True
            seen, gone = await asyncio.gather(*calling)
            await steady.drained()
            pairs = ((ours, seen), (theirs, gone))
            row.judge(store, [Call(say(n, asked=True), n, _body(n), s) for n, s in pairs])
            row.check(seen.answered, f"{ours}: {seen.words}")
            row.tries, row.saw = row.tries + 1, f"{seen.words}; of the killed one: {gone.words}"
            await asyncio.to_thread(stop, again.process)
    return row


async def alternating(engine: Engine, folder: Path, tries: int) -> Row:
    """An agent's calls come to either of two gateways: each is a step of its own, in order."""
    row, store, steps = Row("two gateways serve one trajectory by turns"), folder / "by-turns", 10
    async with running(engine.url, store) as one, running(engine.url, store) as two:
        for number in range(tries):
            trajectory = f"by-turns.{number}"
            calls: list[Call] = []
            for step in range(steps):
                name = f"{trajectory}-{step}"
                body = request("well", name, stream=bool(step % 3))
                seen = await ask((one, two)[step % 2].url, body, path=path_of(trajectory))
                calls.append(Call(say(name, asked=True), trajectory, body, seen))
            await one.drained()
            await two.drained()
            row.judge(store, calls)
            row.check(all(call.seen.answered for call in calls), "a call was not answered")
            reader = Reader(store)
            found = [call.step for call in reader.calls(trajectory)]
            whole = reader.trajectory(trajectory).complete
            reader.close()
            row.check(found == list(range(steps)), f"{trajectory}: steps {found}")
            row.check(whole, f"{trajectory}: has gaps")
            row.tries += steps
    row.saw = "200"
    return row


def _body(name: str) -> bytes:
    return request("held", name, stream=False)


async def _held(gateway: Gateway, name: str) -> Seen:
    return await ask(gateway.url, _body(name), path=path_of(name))


def _states(store: Path, trajectory: str) -> str:
    reader = Reader(store)
    states = [call.state for call in reader.calls(trajectory)]
    reader.close()
    return "+".join(states)


async def run(folder: Path, *, full: bool) -> list[Row]:
    """All of it."""
    tries = 10 if full else 1
    held = Held()
    async with serve_engine(SCRIPTS | {"held": held}) as engine:
        return [
            await terminated(engine, folder, tries),
            await rolling(engine, folder, tries),
            await neighbours(engine, held, folder, tries),
            await alternating(engine, folder, tries),
        ]

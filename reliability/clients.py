"""The agents misbehave: they leave, repeat themselves, call at once, or have strange names."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import httpx
import openai

from driftgate.adapters.export_select import Selection
from driftgate.storage import Reader
from reliability.agent import ask, get, path_of
from reliability.answers import MODEL, Said, request, say
from reliability.engine import SSE_HEAD, End, Engine, Script, chunked, serve_engine, well
from reliability.gateway import Gateway, held_up_s, running, until
from reliability.upstream import Parts
from reliability.verdict import Call, Row, read_call

__all__ = ["CLOCK", "run"]

LEAVING_S = 1.0
"""The engine's work must be cancelled by then."""

CLOCK = """
import random, time
real, source = time.time_ns, random.Random(0)
time.time_ns = lambda: real() + source.choice((-1, 0, 1)) * 3600 * 10**9
time.time = lambda: time.time_ns() / 1e9
from driftgate.cli import main
main()
"""
"""The command line with a wall clock that jumps by hours, also backwards."""

NAMES = {
    "a slash": "runs/2026/one",
    "dots": "../../etc/passwd",
    "unicode": "лиса-🦊-é",
    "a percent sign": "100%25",
    "a quote": 'it\'s "quoted"; DROP TABLE calls',
}


def for_ever(said: Said, stream: bool) -> Parts:
    """A stream that goes on until the client leaves; JSON that never comes."""
    if not stream:
        yield End.HANG
    events = said.events()
    yield SSE_HEAD + chunked(events[0], end=False)
    for event in events[1:-2]:
        yield chunked(event, end=False)
        yield 0.02
    yield End.HANG


class Flaky:
    """The engine fails a call's first tries with 500."""

    def __init__(self, fails: int) -> None:
        self._fails = fails
        self._seen: dict[str, int] = {}

    def __call__(self, said: Said, stream: bool) -> Parts:
        self._seen[said.name] = tries = self._seen.get(said.name, 0) + 1
        if tries <= self._fails:
            yield b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 2\r\n\r\n{}"
        else:
            yield from well(said, stream)


async def leaves(engine: Engine, gateway: Gateway, tries: int) -> Row:
    """In the middle of a stream, and before a JSON answer."""
    row, slowest_s = Row("client leaves in the middle of an answer"), 0.0
    for number in range(tries):
        stream, name = bool(number % 2), f"leaves.{number}"
        body = request("for-ever", name, stream=stream)
        after = 400 if stream else None
        held_s = held_up_s(gateway.pid, os.getpid())
        seen = await ask(gateway.url, body, path=path_of(name), leave_after=after, patience_s=2.0)
        waited_s = await _left(engine, name, seen.ended_at)
        waited_s = max(0.0, waited_s - held_up_s(gateway.pid, os.getpid()) + held_s)
        slowest_s = max(slowest_s, waited_s)
        row.tries += 1
        row.check(waited_s <= LEAVING_S, f"{name}: the engine was let go after {waited_s:.2f} s")
        await gateway.drained()
        call = Call(say(name, asked=True), name, body, seen)
        row.judge(gateway.store, [call])
        reader = Reader(gateway.store)
        stored = read_call(reader, call)
        row.says(stored.reasons, "the client left")
        if stream:
            states = [(trace.meta.status, trace.meta.delivery) for trace in stored.traces]
            row.check(states == [("partial", "uncertain")], f"{name}: stored as {states}")
            ids = [len(t.response_ids) for t in stored.traces if t.response_ids is not None]
            row.check(ids > [0], f"{name}: nothing of the part was kept")
        row.check(not list(Selection(reader).samples(name)), f"{name}: exported for training")
        reader.close()
    row.worst, row.saw = slowest_s * 1000, "engine let go"
    return row


async def leaves_early(folder: Path, tries: int) -> Row:
    """While the gateway still waits for an engine that accepts and says nothing."""
    row = Row("client leaves while the gateway looks for the engine")
    server = await asyncio.start_server(_silence, "127.0.0.1", 0)
    url = "http://{}:{}".format(*server.sockets[0].getsockname())
    async with server, running(url, folder / "early", ready="/healthz") as gateway:
        for number in range(tries):
            name = f"early.{number}"
            body = request("well", name, stream=bool(number % 2))
            seen = await ask(gateway.url, body, path=path_of(name), patience_s=1.0)
            call = Call(say(name, asked=True), name, body, seen)
            row.tries, row.saw = row.tries + 1, seen.words
            if await until(lambda call=call: bool(_reasons(gateway, call)), timeout_s=5):  # type: ignore[misc]
                row.says(_reasons(gateway, call), "the client left")
            else:
                row.lose(f"{name}: no record says why it has no answer")
    return row


def _reasons(gateway: Gateway, call: Call) -> list[str]:
    """What the store says now of a call that has no answer and is not open any more."""
    reader = Reader(gateway.store)
    stored = read_call(reader, call)
    reader.close()
    return [] if stored.still_open else stored.reasons


async def _silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until the other side has gone."""
    with contextlib.suppress(ConnectionError):
        while await reader.read(1 << 16):
            pass
    writer.close()


async def _left(engine: Engine, name: str, since: float) -> float:
    """Seconds until the engine saw the client of ``name`` go."""
    await until(lambda: name in engine.left, timeout_s=10 * LEAVING_S)
    return engine.left.get(name, float("inf")) - since


async def sdk_retries(gateway: Gateway, tries: int) -> Row:
    """openai's own retries are one step, and only the last try is an answer."""
    row = Row("SDK retries after 500", saw="200 after two retries")
    async with openai.AsyncOpenAI(
        base_url=f"{gateway.url}/v1", api_key="none", max_retries=2
    ) as client:
        for number in range(tries):
            name = f"retry.{number}"
            answer = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"flaky {name}"}],
                extra_headers={"x-driftgate-trajectory": name},
            )
            said = say(name, asked=True)
            row.tries += 1
            row.check(answer.choices[0].message.content == said.content, f"{name}: other content")
            await gateway.drained()
            reader = Reader(gateway.store)
            calls = reader.calls(name)
            places = [(call.step, call.retry) for call in calls]
            row.check(places == [(0, 0), (0, 1), (0, 2)], f"{name}: stored as {places}")
            row.check(reader.trajectory(name).complete, f"{name}: {reader.trajectory(name).gaps}")
            traces = [reader.trace(found.meta.trace_id) for found in reader.traces(name)]
            if len(traces) != 1 or traces[0].response_ids is None:
                row.lose(f"{name}: {len(traces)} traces")
            else:
                row.check(traces[0].response_ids.tolist() == said.ids, f"{name}: other ids")
            reader.close()
    return row


async def at_once(gateway: Gateway, tries: int, *, same: bool) -> Row:
    """Calls of one trajectory at the same time, the same body or not: every answer is stored."""
    row = Row(f"{'duplicate requests' if same else 'two clients'} on one trajectory at once")
    for number in range(tries):
        trajectory = f"at-once-{same}-{number}"
        names = [f"{trajectory}.{0 if same else client}" for client in range(2)]
        bodies = [request("well", name, stream=bool(client)) for client, name in enumerate(names)]
        bodies = [bodies[0]] * 2 if same else bodies
        seen = await asyncio.gather(
            *(ask(gateway.url, body, path=path_of(trajectory)) for body in bodies)
        )
        await gateway.drained()
        calls = [
            Call(say(name, asked=True), trajectory, body, one)
            for name, body, one in zip(names, bodies, seen, strict=True)
        ]
        row.judge(gateway.store, calls)
        reader = Reader(gateway.store)
        places = sorted((call.step, call.retry) for call in reader.calls(trajectory))
        found = len(reader.traces(trajectory))
        reader.close()
        row.tries, row.saw = row.tries + 1, " and ".join(one.words for one in seen)
        row.check(len(set(places)) == 2, f"{trajectory}: two calls share a place: {places}")
        if found != 2:
            row.lose(f"{trajectory}: {found} traces of 2 answers")
    return row


async def finished_early(engine: Engine, gateway: Gateway, tries: int) -> Row:
    """A reward is given while a call is still open: both are kept."""
    row = Row("trajectory finished with a call open")
    for number in range(tries):
        name = f"finished.{number}"
        body = request("slow", name, stream=True)
        already = len(engine.came)
        calling = asyncio.create_task(ask(gateway.url, body, path=path_of(name)))
        await until(lambda already=already: len(engine.came) > already)  # type: ignore[misc]
        async with httpx.AsyncClient() as client:
            given = await client.post(
                f"{gateway.url}/api/trajectories/{name}/reward", json={"value": 0.5}
            )
        seen = await calling
        await gateway.drained()
        row.judge(gateway.store, [Call(say(name, asked=True), name, body, seen)])
        reader = Reader(gateway.store)
        reward = reader.reward(name)
        reader.close()
        row.check(reward is not None and reward.value == 0.5, f"{name}: {reward}, {given.text}")
        row.tries, row.saw = row.tries + 1, f"{seen.words}, reward {given.status_code}"
    return row


async def names(gateway: Gateway) -> Row:
    """Ids are names and never paths; what cannot be one is refused with a reason."""
    row = Row("trajectory ids: slashes, dots, unicode, 4 kB", saw="200; 400 for 4 kB and a dot")
    before = {path.name for path in gateway.store.parent.iterdir()}
    for what, trajectory in NAMES.items():
        body = request("well", what, stream=False)
        seen = await ask(gateway.url, body, path=path_of(trajectory))
        await gateway.drained()
        row.tries += 1
        row.check(seen.answered, f"{what}: {seen.words}: {seen.body[:200]!r}")
        row.judge(gateway.store, [Call(say(what, asked=True), trajectory, body, seen)])
    for what, trajectory, why in (("4 kB", "x" * 4096, b"characters"), ("a dot", ".", b"folder")):
        seen = await ask(gateway.url, request("well", what, stream=False), path=path_of(trajectory))
        row.tries += 1
        row.check(seen.status == 400 and why in seen.body, f"{what}: {seen.words}")
    after = {path.name for path in gateway.store.parent.iterdir()}
    row.check(before == after, f"files outside the store: {after - before}")
    return row


async def clock(engine: Engine, gateway: Gateway, tries: int) -> Row:
    """The wall clock of the gateway jumps by an hour at every look, in both directions."""
    row = Row("wall clock jumps by hours, also backwards")
    calls = []
    for number in range(tries):
        trajectory = f"clock-{number % 4}"
        name = f"{trajectory}.{number}"
        body = request("well", name, stream=bool(number % 2))
        seen = await ask(gateway.url, body, path=path_of(trajectory))
        calls.append(Call(say(name, asked=True), trajectory, body, seen))
        row.saw = seen.words
    await gateway.drained()
    row.tries = tries
    row.judge(gateway.store, calls)
    reader = Reader(gateway.store)
    for trajectory in {call.trajectory for call in calls}:
        steps = [call.step for call in reader.calls(trajectory)]
        row.check(steps == list(range(len(steps))), f"{trajectory}: steps {steps}")
        shown = await get(gateway.url, f"/api/trajectories/{trajectory}")
        row.check(shown.status == 200, f"{trajectory}: the API says {shown.words}")
    reader.close()
    return row


def slow(said: Said, stream: bool) -> Parts:
    """Long enough for something else to happen."""
    yield 0.3
    yield from well(said, stream)


async def run(folder: Path, *, full: bool) -> list[Row]:
    """All of it on one gateway, the clock on one of its own."""
    tries = 20 if full else 2
    scripts: dict[str, Script] = {"for-ever": for_ever, "flaky": Flaky(2), "slow": slow}
    async with serve_engine(scripts) as engine:
        async with running(engine.url, folder / "clients") as gateway:
            rows = [
                await leaves(engine, gateway, tries),
                await sdk_retries(gateway, tries),
                await at_once(gateway, tries, same=True),
                await at_once(gateway, tries, same=False),
                await finished_early(engine, gateway, tries),
                await names(gateway),
            ]
        rows.insert(1, await leaves_early(folder, tries))
        command = ("-c", CLOCK)
        async with running(engine.url, folder / "clock", command=command) as gateway:
            rows.append(await clock(engine, gateway, 10 * tries))
    return rows

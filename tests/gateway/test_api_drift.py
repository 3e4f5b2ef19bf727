"""Live drift: in order, each score once, whatever breaks in between."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from driftgate.client import CURSOR_HEADER
from driftgate.gateway import feed as feed_module
from driftgate.gateway.api import ApiContext, add_api_routes
from driftgate.gateway.feed import Event, Feed, Source
from driftgate.storage import Reader, Writer
from driftgate.testing.stores import make_scores
from driftgate.testing.traces import ENGINE, make_score, make_trajectory
from driftgate.trace import Trace
from driftgate.views import DriftEvent, Kind

POLL_S = 0.005
Api = TestClient[web.Request, web.Application]


class Store:
    """A store that is written while it is read."""

    def __init__(self, root: Path, *, heartbeat_s: float = 5.0) -> None:
        self.writer, self.reader = Writer(root), Reader(root)
        self.app = web.Application()
        self.context = ApiContext(
            reader=self.reader,
            submit=self.writer.submit,
            mint=lambda name: ("", ""),
            heartbeat_s=heartbeat_s,
            poll_interval_s=POLL_S,
        )
        add_api_routes(self.app, self.context)

    async def write(self, traces: Sequence[Trace]) -> None:
        futures = [self.writer.submit(trace) for trace in traces]
        futures += [self.writer.submit(score) for score in make_scores(traces)]
        await asyncio.gather(*map(asyncio.wrap_future, futures))

    def close(self) -> None:
        self.writer.close()
        self.reader.close()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(tmp_path, heartbeat_s=0.05)
    yield store
    store.close()


@pytest.fixture
async def api(store: Store) -> AsyncIterator[Api]:
    async with TestClient(TestServer(store.app)) as client:
        yield client


async def read_lines(api: Api, query: str, count: int) -> list[DriftEvent]:
    """The first ``count`` events; then the connection is dropped."""
    events: list[DriftEvent] = []
    async with api.get(f"/api/drift?{query}") as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.strip():
                events.append(msgspec.json.decode(line, type=DriftEvent))
            if len(events) == count:
                break
    return events


@pytest.mark.parametrize("seed", range(3))
async def test_reconnects_neither_lose_nor_repeat(
    store: Store, api: Api, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "PAGE", 4)
    rng = random.Random(seed)
    batches = [
        list(make_trajectory(f"t{n}", steps=rng.randint(1, 5), routed=False)) for n in range(6)
    ]
    total = sum(map(len, batches))

    async def write() -> None:
        for batch in batches:
            await store.write(batch)

    async def follow() -> list[int]:
        seen: list[int] = []
        while len(seen) < total:
            after = seen[-1] if seen else 0
            count = min(rng.randint(1, 6), total - len(seen))
            seen += [e.cursor for e in await read_lines(api, f"after={after}&follow=1", count)]
        return seen

    *followed, _ = await asyncio.gather(follow(), follow(), write())
    expected = [row.seq for row in store.reader.scores(limit=10_000)]
    assert len(expected) == total
    assert followed == [expected, expected]


async def test_without_follow_the_stream_ends(store: Store, api: Api) -> None:
    await store.write(list(make_trajectory(steps=3, routed=False)))
    async with api.get("/api/drift") as response:
        lines = (await response.text()).splitlines()
    assert [msgspec.json.decode(line)["cursor"] for line in lines] == [1, 2, 3]


async def test_now_begins_with_what_comes(store: Store, api: Api) -> None:
    await store.write(list(make_trajectory("old", steps=2, routed=False)))
    async with api.get("/api/drift?after=now&follow=1") as response:
        assert response.headers[CURSOR_HEADER] == "2"
        await store.write(list(make_trajectory("new", steps=1, routed=False)))
        async for line in response.content:
            if line.strip():
                break
    assert msgspec.json.decode(line, type=DriftEvent).score.trajectory == "new"


async def test_filters_by_trajectory_and_kind(store: Store, api: Api) -> None:
    traces = [t for name in "ab" for t in make_trajectory(name, steps=2, routed=False)]
    await store.write(traces)
    floor = make_score(traces[0], noise=0.0, kind="noise_floor", trainer=ENGINE)
    await asyncio.wrap_future(store.writer.submit(floor))
    events = await read_lines(api, "trajectory=b&follow=1", 2)
    assert [(e.score.trajectory, e.score.step) for e in events] == [("b", 0), ("b", 1)]
    (event,) = await read_lines(api, "kind=noise_floor&follow=1", 1)
    assert event.cursor == 5


async def test_events_carry_the_worst_token_in_its_text(store: Store, api: Api) -> None:
    (trace,) = make_trajectory(steps=1, routed=False)
    await store.write([trace])
    ((event),) = await read_lines(api, "", 1)
    worst = event.score.worst
    assert worst is not None
    assert worst.text is not None
    assert (worst.before + worst.text + worst.after).encode() == trace.token_bytes


async def sse(api: Api, headers: dict[str, str], upto: bytes) -> list[bytes]:
    """Blocks of an SSE answer up to the first that contains ``upto``."""
    blocks: list[bytes] = []
    accept = {"accept": "text/event-stream"} | headers
    async with api.get("/api/drift?follow=1", headers=accept) as response:
        assert response.content_type == "text/event-stream"
        while not blocks or upto not in blocks[-1]:
            blocks.append(await response.content.readuntil(b"\n\n"))
    return blocks


async def test_sse_goes_on_behind_the_last_event_id(store: Store, api: Api) -> None:
    await store.write(list(make_trajectory(steps=3, routed=False)))
    blocks = await sse(api, {"Last-Event-ID": "1"}, b"id: 3\n")
    assert blocks[0] == b"id: 1\n\n"
    fields = [dict(line.split(b": ", 1) for line in b.strip().split(b"\n")) for b in blocks[1:]]
    assert [(f[b"id"], f[b"event"]) for f in fields] == [(b"2", b"score"), (b"3", b"score")]
    assert [msgspec.json.decode(f[b"data"], type=DriftEvent).cursor for f in fields] == [2, 3]


async def test_sse_sends_comments_while_idle(api: Api) -> None:
    blocks = await sse(api, {}, b": idle")
    assert blocks[-1] == b": idle\nid: 0\n\n"


async def test_json_lines_send_empty_lines_while_idle(api: Api) -> None:
    async with api.get("/api/drift?follow=1") as response:
        assert await response.content.readline() == b"\n"


async def test_a_foreign_last_event_id_is_refused(api: Api) -> None:
    headers = {"accept": "text/event-stream", "Last-Event-ID": "x" * 5000}
    async with api.get("/api/drift", headers=headers) as response:
        assert response.status == 400


async def test_shutdown_ends_followers_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path, heartbeat_s=60.0)
    async with TestClient(TestServer(store.app)) as api:
        response = await api.get("/api/drift?follow=1")
        await asyncio.wait_for(api.server.close(), timeout=5)
        response.close()
    store.close()


class Memory:
    """A source without a disk, that counts how often it is read."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.reads = 0
        self.read_often = threading.Event()
        """Set when every one of 50 followers and the poller must have read."""

    def add(self, count: int = 1, kind: Kind = "drift") -> None:
        for _ in range(count):
            cursor = len(self.events) + 1
            self.events.append(Event(cursor, f"t{cursor % 3}", kind, b"{}"))

    def last_seq(self) -> int:
        return len(self.events)

    def read(
        self, after: int, limit: int, trajectory: str | None, kind: Kind | None
    ) -> list[Event]:
        self.reads += 1
        if self.reads > 60:
            self.read_often.set()
        found = (e for e in self.events[after:] if trajectory in (None, e.trajectory))
        return [event for event in found if kind in (None, event.kind)][:limit]


async def drain(feed: Feed, cursor: int, upto: int, trajectory: str | None = None) -> list[int]:
    seen: list[int] = []
    with feed:
        while cursor < upto:
            events, cursor = await feed.next(cursor, trajectory, None, timeout_s=10)
            seen += [event.cursor for event in events]
    return seen


@pytest.mark.parametrize("ring", [1, 3, 1000])
async def test_followers_of_any_pace_see_everything(
    ring: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "PAGE", 5)
    source = Memory()
    with ThreadPoolExecutor(2) as threads:
        feed = Feed(
            Source(source.last_seq, source.read),
            executor=threads,
            poll_interval_s=POLL_S,
            ring=ring,
        )
        feed.start()
        source.add(7)
        followers = [asyncio.create_task(drain(feed, start, 40)) for start in (0, 3, 7)]
        filtered = asyncio.create_task(drain(feed, 0, 40, "t1"))
        for _ in range(11):
            source.add(3)
            await asyncio.sleep(POLL_S)
        everything = await asyncio.gather(*followers)
        assert everything == [list(range(start + 1, 41)) for start in (0, 3, 7)]
        assert await filtered == list(range(1, 41, 3))
        await feed.close()


async def test_many_idle_followers_cost_one_poller() -> None:
    source = Memory()
    source.add(5)
    with ThreadPoolExecutor(2) as threads:
        feed = Feed(Source(source.last_seq, source.read), executor=threads, poll_interval_s=POLL_S)
        feed.start()
        followers = [asyncio.create_task(drain(feed, 5, 6)) for _ in range(50)]
        await asyncio.to_thread(source.read_often.wait, 10)
        polls_alone = source.reads
        source.add()
        assert await asyncio.gather(*followers) == [[6]] * 50
        assert source.reads - polls_alone < len(followers)
        await feed.close()


async def test_nobody_following_means_nobody_polling() -> None:
    source = Memory()
    with ThreadPoolExecutor(2) as threads:
        feed = Feed(Source(source.last_seq, source.read), executor=threads, poll_interval_s=POLL_S)
        feed.start()
        source.add()
        assert await drain(feed, 0, 1) == [1]
        await asyncio.sleep(4 * POLL_S)
        reads = source.reads
        await asyncio.sleep(4 * POLL_S)
        assert source.reads == reads
        source.add()
        assert await drain(feed, 1, 2) == [2]
        await feed.close()

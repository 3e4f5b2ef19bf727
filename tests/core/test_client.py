"""The client against the real app: typed answers and errors, a drift that survives a restart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import httpx
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from msgspec.structs import replace

from driftgate import Client
from driftgate.client import CURSOR_HEADER
from driftgate.errors import DriftgateError, NotFoundError, RequestError, StorageError
from driftgate.gateway.answers import Answers
from driftgate.gateway.api import ApiContext, add_api_routes
from driftgate.storage import Reader, Record, Writer
from driftgate.testing.stores import SLASHED, example_records, make_scores, write_store
from driftgate.testing.traces import TRAINER, make_trajectory


class Gateway:
    """The API over a store, on a port that stays the same across restarts."""

    def __init__(self, root: Path) -> None:
        self.writer, self.reader = Writer(root), Reader(root)
        self.port: int | None = None

    async def start(self) -> TestServer:
        app = web.Application()
        context = ApiContext(
            reader=self.reader,
            submit=self.writer.submit,
            mint=lambda name: (name or "new", "key"),
            poll_interval_s=0.005,
        )
        add_api_routes(app, context)
        server = TestServer(app, port=self.port)
        await server.start_server()
        self.port = server.port
        return server

    async def write(self, name: str, steps: int) -> None:
        traces = list(make_trajectory(name, steps=steps, routed=False))
        records: list[Record] = [*traces, *make_scores(traces)]
        await asyncio.gather(*(asyncio.wrap_future(self.writer.submit(r)) for r in records))

    def close(self) -> None:
        self.writer.close()
        self.reader.close()


class Answered(httpx.AsyncHTTPTransport):
    """Tells when the first answer's headers are there."""

    def __init__(self) -> None:
        super().__init__()
        self.answered = asyncio.Event()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        self.answered.set()
        return response


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    gateway = Gateway(write_store(tmp_path, example_records()))
    yield gateway
    gateway.close()


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[Client]:
    server = await gateway.start()
    async with Client(str(server.make_url("/"))) as client:
        yield client
    await server.close()


async def test_every_question_gives_what_the_store_says(gateway: Gateway, client: Client) -> None:
    answers = Answers(gateway.reader)
    assert await client.trajectories() == answers.trajectories(limit=50)
    assert await client.trajectory(SLASHED) == answers.trajectory(SLASHED)
    assert await client.mismatch(SLASHED, tokens=True, trainer=TRAINER.digest) == answers.mismatch(
        SLASHED, tokens=True, trainer=TRAINER.digest
    )
    assert await client.cells() == answers.cells()
    step = await client.step(SLASHED, 1, routes=True)
    expected = msgspec.json.encode(answers.step(SLASHED, 1, routes=True))
    assert msgspec.json.encode(step) == expected


async def test_pages_to_the_end(client: Client) -> None:
    names, before = [], None
    while True:
        page = await client.trajectories(limit=1, before=before)
        names += [item.trajectory for item in page.items]
        if (before := page.next) is None:
            break
    assert sorted(names) == sorted([SLASHED, "two"])


async def test_mint_and_reward(gateway: Gateway, client: Client) -> None:
    minted = await client.mint("a/b")
    assert (minted.trajectory, minted.key) == ("a/b", "key")
    assert minted.base_url.endswith("/t/a%2Fb/v1")
    given = await client.reward("two", 0.25, source="judge")
    assert gateway.reader.reward("two") == given


async def test_errors_are_the_same_classes_as_in_the_gateway(client: Client) -> None:
    with pytest.raises(NotFoundError, match="none"):
        await client.trajectory("none")
    with pytest.raises(RequestError, match="limit"):
        await client.trajectories(limit=0)


async def test_a_full_queue_is_a_storage_error(gateway: Gateway, client: Client) -> None:
    gateway.writer.close()
    with pytest.raises(StorageError):
        await client.reward("two", 1.0)


async def test_nobody_there_is_one_clear_error(unused_tcp_port: int) -> None:
    async with Client(f"http://127.0.0.1:{unused_tcp_port}") as client:
        with pytest.raises(DriftgateError, match="no driftgate at"):
            await client.cells()
        with pytest.raises(DriftgateError, match="driftgate serve"):
            await anext(client.drift())


async def test_drift_without_follow_ends(client: Client) -> None:
    assert [event.cursor async for event in client.drift(after=2, follow=False)] == [3, 4, 5]


async def test_drift_goes_on_after_a_restart(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    await gateway.write("before", 2)
    server = await gateway.start()
    seen: list[tuple[int, str, int]] = []
    reached: list[bool] = []
    async with (
        Client(str(server.make_url("/"))) as client,
        aclosing(client.drift(after=0, reached=reached.append)) as events,
    ):
        async for event in events:
            seen.append((event.cursor, event.score.trajectory, event.score.step))
            if len(seen) == 2:
                await server.close()
                await gateway.write("meanwhile", 2)
                server = await gateway.start()
                await gateway.write("after", 1)
            if len(seen) == 5:
                break
    await server.close()
    gateway.close()
    named = [("before", 0), ("before", 1), ("meanwhile", 0), ("meanwhile", 1), ("after", 0)]
    assert seen == [(n, *what) for n, what in enumerate(named, 1)]
    assert (reached[0], reached[-1]) == (True, True)


async def test_drift_from_now_loses_nothing_before_its_first_event(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    await gateway.write("old", 1)
    server = await gateway.start()
    transport = Answered()
    async with (
        Client(str(server.make_url("/")), transport=transport) as client,
        aclosing(client.drift(after="now")) as events,
    ):
        first = asyncio.create_task(anext(events))
        await transport.answered.wait()
        await server.close()
        await gateway.write("while-away", 1)
        server = await gateway.start()
        assert (await first).score.trajectory == "while-away"
    await server.close()
    gateway.close()


async def test_a_gateway_that_stays_away_is_given_up(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    await gateway.write("old", 1)
    server = await gateway.start()
    async with Client(str(server.make_url("/"))) as client:
        events = client.drift(after=0, give_up_s=0.0)
        await anext(events)
        await server.close()
        with pytest.raises(DriftgateError, match="no driftgate at"):
            await anext(events)
    gateway.close()


class Scripted(httpx.AsyncBaseTransport):
    """Gives prepared answers one after the other; an error is raised."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Pieces(httpx.AsyncByteStream):
    """A body in pieces, the last of which may be an error."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self.pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece


def stream(*pieces: bytes | Exception) -> httpx.Response:
    return httpx.Response(200, headers={CURSOR_HEADER: "0"}, stream=Pieces(*pieces))


@pytest.fixture
def events(tmp_path: Path) -> list[bytes]:
    """Scores of trajectories whose names hold every line separator that JSON leaves as it is."""
    reader = Reader(write_store(tmp_path, example_records()))
    found = Answers(reader).drift(0, 2, None, None)
    reader.close()
    named = [replace(e, score=replace(e.score, trajectory="a\u2028b\u2029c\x85d")) for e in found]
    return [msgspec.json.encode(event) for event in named]


async def test_only_a_newline_ends_an_event(events: list[bytes]) -> None:
    first, second = events
    body = first + b"\n\n" + second + b"\n"
    pieces = [body[i : i + 7] for i in range(0, len(body), 7)]
    async with Client(transport=Scripted(stream(*pieces))) as client:
        seen = [event async for event in client.drift(after=0, follow=False)]
    assert [msgspec.json.encode(event) for event in seen] == events


async def test_a_503_in_place_of_a_lost_stream_is_tried_again(events: list[bytes]) -> None:
    lost = stream(events[0] + b"\n", httpx.ReadError("cut"))
    answers = (lost, httpx.Response(503), httpx.Response(502), stream(events[1] + b"\n"))
    async with (
        Client(transport=Scripted(*answers)) as client,
        aclosing(client.drift(after=0)) as drift,
    ):
        assert [(await anext(drift)).cursor, (await anext(drift)).cursor] == [1, 2]


async def test_a_503_that_stays_is_given_up(events: list[bytes]) -> None:
    lost = stream(events[0] + b"\n", httpx.ReadError("cut"))
    async with Client(transport=Scripted(lost, httpx.Response(503))) as client:
        drift = client.drift(after=0, give_up_s=0.0)
        await anext(drift)
        with pytest.raises(DriftgateError):
            await anext(drift)


async def test_a_503_at_the_start_is_raised() -> None:
    async with Client(transport=Scripted(httpx.Response(503))) as client:
        with pytest.raises(StorageError, match="503"):
            await anext(client.drift())


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>hi</html>"),
        httpx.Response(200, text="<html>hi</html>", headers={CURSOR_HEADER: "0"}),
        httpx.Response(200, text="", headers={CURSOR_HEADER: "soon"}),
    ],
)
async def test_another_server_is_one_clear_error(answer: httpx.Response) -> None:
    async with Client(transport=Scripted(answer)) as client:
        with pytest.raises(DriftgateError, match=r"what answers at .* is not"):
            await anext(client.drift())


async def test_another_servers_view_is_one_clear_error() -> None:
    async with Client(transport=Scripted(httpx.Response(200, text="<html>"))) as client:
        with pytest.raises(DriftgateError, match=r"what answers at .* is not"):
            await client.cells()


def test_an_address_that_is_none_is_one_clear_error() -> None:
    with pytest.raises(RequestError, match="is not an address"):
        Client("http://h:port")

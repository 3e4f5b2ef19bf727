"""A call's way to its engine: which connection it takes, and what it leaves behind."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDict

from driftgate.gateway import post
from driftgate.gateway.post import Poster

OK = b"HTTP/1.1 200 OK\r\ncontent-type: Text/Event-Stream; charset=utf-8\r\ncontent-length: 2\r\n"
Reply = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Engine:
    """Raw bytes over real sockets."""

    def __init__(self) -> None:
        self.connections = 0
        self.asked: list[bytes] = []
        self.reply = OK + b"\r\n{}"
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                self.asked.append(head + await reader.readexactly(length))
                writer.write(self.reply)


@asynccontextmanager
async def posting(serve: Reply) -> AsyncIterator[tuple[Poster, str]]:
    serving = set[asyncio.Task[Any]]()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        with suppress(asyncio.CancelledError):
            await serve(reader, writer)
        writer.close()

    server = await asyncio.start_server(one, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with aiohttp.TCPConnector(limit=0) as connector, server:
        poster = Poster(connector, aiohttp.ClientTimeout(sock_connect=5))
        yield poster, url
        poster.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving)


async def ask(poster: Poster, url: str, body: bytes = b"{}") -> bytes:
    headers = CIMultiDict({"X-Own": "1"})
    async with await poster.post(url, "/v1/x?a=%20b", headers, body) as answer:
        assert answer.content_type == "text/event-stream"
        return await answer.content.read()


async def test_a_request_is_sent_as_it_is_spelled() -> None:
    engine = Engine()
    async with posting(engine.serve) as (poster, url):
        assert await ask(poster, f"{url}/behind") == b"{}"
    host = url.removeprefix("http://").encode()
    assert engine.asked == [
        b"POST /behind/v1/x?a=%%20b HTTP/1.1\r\nHost: %b\r\nX-Own: 1\r\nContent-Length: 2\r\n\r\n{}"
        % host
    ]


async def test_calls_one_after_another_share_a_connection() -> None:
    engine = Engine()
    async with posting(engine.serve) as (poster, url):
        for _ in range(3):
            await ask(poster, url)
        assert engine.connections == 1
        await asyncio.gather(*(ask(poster, url) for _ in range(3)))
        assert engine.connections == 3


async def test_an_idle_connection_is_left_before_the_engine_leaves_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine()
    async with posting(engine.serve) as (poster, url):
        await ask(poster, url)
        monkeypatch.setattr(post, "KEEP_ALIVE_S", -1.0)
        await ask(poster, url)
        assert engine.connections == 2


async def test_a_connection_whose_answer_was_left_is_closed() -> None:
    engine = Engine()
    engine.reply = OK + b"\r\n{"  # a byte is missing
    async with posting(engine.serve) as (poster, url):
        for _ in range(2):
            async with await poster.post(url, "/", CIMultiDict(), b"{}") as answer:
                assert answer.closed is not None
            assert answer.closed is None
        assert engine.connections == 2


async def test_an_engine_that_resets_idle_connections_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    may_reset = asyncio.Event()

    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        writer.write(OK + b"\r\n{}")
        await may_reset.wait()
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    async with posting(reset) as (poster, url):
        async with await poster.post(url, "/", CIMultiDict(), b"{}") as answer:
            await answer.content.read()
            closed = answer.closed
        assert closed is not None
        may_reset.set()
        await asyncio.wait({closed})
        poster.close()
        del answer, closed, poster
    gc.collect()
    assert caplog.text == ""


@pytest.mark.parametrize("head", [b"HTTP/1.1 103 Early Hints\r\n\r\n", b""])
async def test_the_answer_is_the_last_head(head: bytes) -> None:
    engine = Engine()
    engine.reply = head + OK + b"connection: close\r\n\r\n{}"
    async with posting(engine.serve) as (poster, url):
        assert await ask(poster, url) == b"{}"
        assert await ask(poster, url) == b"{}"
        assert engine.connections == 2


async def test_a_long_body_arrives_whole() -> None:
    engine, body = Engine(), bytes(range(256)) * 20_000
    async with posting(engine.serve) as (poster, url):
        for _ in range(2):
            await ask(poster, url, body)
    assert [asked[-len(body) :] == body for asked in engine.asked] == [True, True]
    assert engine.connections == 1


async def test_a_long_body_may_be_refused_before_its_end() -> None:
    connections = 0

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"\r\n{}")  # and reads no more of it
        await writer.drain()
        await asyncio.Event().wait()

    async with posting(refuse) as (poster, url):
        for _ in range(2):
            assert await ask(poster, url, bytes(64 << 20)) == b"{}"
        assert connections == 2  # half a request was left in the first


async def test_no_header_begins_a_line_of_its_own() -> None:
    engine = Engine()
    async with posting(engine.serve) as (poster, url):
        for value in ("1\r\nX-Evil: 2", "1\nX-Evil: 2", "1\0"):
            with pytest.raises(ValueError, match="control character"):
                await poster.post(url, "/", CIMultiDict({"X-Own": value}), b"{}")
    assert engine.asked == []

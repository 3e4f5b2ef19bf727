"""Requests that no client of good faith sends, byte by byte over real sockets.

The engine stand-in answers everything and remembers it: what it was asked is what got through.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from driftgate.gateway import limits
from driftgate.gateway.app import serve
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.limits import MAX_HEADER_BYTES, MAX_HEADERS, MAX_JSON_DEPTH, MAX_LINE_BYTES
from tests.gateway.conftest import start

CHAT = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
TO = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SMUGGLED = b"GET /v1/models/smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Engine:
    """Answers every route, an engine's administration among them."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.headers: list[Any] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        probes = ("/version", "/metrics", "/health", "/weight_info")
        if b"Say something." not in await request.read() and request.path not in probes:
            self.asked.append(f"{request.method} {request.raw_path}")
            self.headers.append(request.headers)
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": "m"}]})
        return web.json_response({"choices": []})


@pytest.fixture
async def engine() -> AsyncIterator[tuple[Engine, str]]:
    engine, app = Engine(), web.Application()
    app.router.add_route("*", "/{path:.*}", engine.handle)
    runner, url = await start(app)
    yield engine, url
    await runner.cleanup()


@pytest.fixture
async def gateway(engine: tuple[Engine, str], tmp_path: Path) -> AsyncIterator[str]:
    config = GatewayConfig(
        upstream=engine[1],
        port=0,
        store=tmp_path,
        streaming_routes="off",
        max_request_bytes=1 << 20,
    )
    async with serve(config) as url:
        raw = await exchange(
            url, TO + b"Content-Length: %d\r\n\r\n%b" % (len(CHAT), CHAT), answers=1
        )
        assert status(raw) == 200  # the engine has been probed
        engine[0].asked.clear()
        yield url


async def exchange(url: str, raw: bytes, *, answers: int = 0) -> bytes:
    """What comes back until the gateway closes, or until so many answers have begun."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    got = b""
    try:
        async with asyncio.timeout(10):  # nothing here has a reason to wait
            writer.write(raw)
            while chunk := await reader.read(1 << 16):
                got += chunk
                if answers and got.count(b"HTTP/1.1 ") >= answers:
                    break
    except ConnectionError:
        pass
    finally:
        writer.close()
    return got


def status(raw: bytes) -> int:
    """Of the first answer; 0 where the connection was closed without one."""
    found = re.match(rb"HTTP/1\.[01] (\d{3}) ", raw)
    return int(found[1]) if found else 0


SHAPES: dict[str, bytes] = {
    "length and chunks": TO + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": TO + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": TO + b"Content-Length: 2\r\nContent-Length: 40\r\n\r\n{}",
    "two equal lengths": TO + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "a list of lengths": TO + b"Content-Length: 2, 2\r\n\r\n{}",
    "a signed length": TO + b"Content-Length: +2\r\n\r\n{}",
    "a negative length": TO + b"Content-Length: -2\r\n\r\n{}",
    "a length in hex": TO + b"Content-Length: 0x2\r\n\r\n{}",
    "a length beyond 64 bits": TO + b"Content-Length: 18446744073709551618\r\n\r\n{}",
    "a space before the colon": TO + b"Content-Length : 2\r\n\r\n{}",
    "a folded header": TO + b"X-A: b\r\n Content-Length: 2\r\n\r\n",
    "a folded encoding": TO + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "an unknown encoding": TO + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked not last": TO + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunked twice": TO + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
    "line feeds alone": TO.replace(b"\r\n", b"\n") + b"Content-Length: 2\n\n{}",
    "a bare carriage return": TO + b"X-A: b\rContent-Length: 2\r\n\r\n{}",
    "a null byte": TO + b"X-A: b\0c\r\n\r\n",
    "a name with a space": TO + b"X A: b\r\n\r\n",
    "a chunk size that is none": TO + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a signed chunk size": TO + b"Transfer-Encoding: chunked\r\n\r\n+2\r\n{}\r\n0\r\n\r\n",
    "a chunk size in 0x": TO + b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n",
    "a chunk size too large": TO
    + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}\r\n0\r\n\r\n",
    "a chunk too long": TO + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{}\r\n0\r\n\r\n",
    "chunks ended by line feeds": TO + b"Transfer-Encoding: chunked\r\n\r\n2\n{}\n0\n\n",
    "two hosts": TO + b"Host: other\r\nContent-Length: 2\r\n\r\n{}",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "HTTP 0.9": b"GET /v1/models\r\n",
    "HTTP 2 without asking": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a version that is none": b"GET /v1/models HTTP/1.1x\r\nHost: localhost\r\n\r\n",
    "TLS to a plain port": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64,
    "an unknown method": b"get /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a space in the target": b"GET /v1/mod els HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a long line": b"GET /v1/models?%b HTTP/1.1\r\nHost: localhost\r\n\r\n"
    % (b"a" * MAX_LINE_BYTES),
    "a long header": TO + b"X-A: %b\r\n\r\n" % (b"a" * (MAX_HEADER_BYTES + 1)),
    "many headers": TO + b"".join(b"X-%d: a\r\n" % i for i in range(MAX_HEADERS)) + b"\r\n",
}


@pytest.mark.parametrize("name", SHAPES)
async def test_a_request_of_two_meanings_is_refused(
    gateway: str, engine: tuple[Engine, str], name: str
) -> None:
    raw = await exchange(gateway, SHAPES[name] + SMUGGLED)
    assert status(raw) == 400
    assert len(re.findall(rb"HTTP/1\.[01] \d{3} ", raw)) == 1
    assert engine[0].asked == []


async def test_a_bad_chunk_behind_a_good_one_ends_the_request(
    gateway: str, engine: tuple[Engine, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODY_TIMEOUT_S", 0.2)
    host, _, port = gateway.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(TO + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")  # it reads the body
    writer.write(b"zz\r\n" + SMUGGLED)
    async with asyncio.timeout(10):
        raw = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    assert status(raw) == 408
    assert engine[0].asked == []


TARGETS = [
    "/update_weights",
    "/v1/../update_weights",
    "/v1/%2e%2e/update_weights",
    "/v1/chat/completions/../../../update_weights",
    "/v1/models/../../update_weights",
    "/v1/models/%2e%2e/%2e%2e/update_weights",
    "/v1/models/..%2f..%2fupdate_weights",
    "/v1/models/%2e%2e%2f%2e%2e%2fupdate_weights",
    "/v1/models/%252e%252e/update_weights",
    "/v1/models//../update_weights",
    "/t/a/v1/../../../update_weights",
    "/t/..%2f..%2fupdate_weights%3f/v1/models",
    "//v1/models",
    "//update_weights",
    "/v1//models",
    "/V1/models",
    "/v1/models/",
    "/v1/models;a=b",
    "/v1/models%00",
    "/v1/models%0d%0aX-A: b",
    "/v1/models/..;/update_weights",
    "/v1/models/a\\..\\update_weights",
    "/v1/models#/../../update_weights",
    "http://engine/update_weights",
    "http://localhost/v1/../update_weights",
    "\xff\xfe",
    "/v1/\xff",
    "*",
]
ROUTES = re.compile(r"GET /v1/models(/[^/?#]+)*/?(\?.*)?")


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
async def test_nothing_but_model_routes_reaches_the_engine(
    gateway: str, engine: tuple[Engine, str], method: str
) -> None:
    for target in TARGETS:
        head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        raw = await exchange(gateway, head.encode("latin-1"))
        assert status(raw) in (200, 400, 404, 405), target
    for asked in engine[0].asked:
        assert ROUTES.fullmatch(asked), asked
        assert ".." not in asked
        assert "%2" not in asked
    assert (method == "GET") == bool(engine[0].asked)  # among the targets are some of good faith


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD", "GET"])
async def test_a_call_is_a_post(gateway: str, engine: tuple[Engine, str], method: str) -> None:
    raw = await exchange(
        gateway, TO.replace(b"POST", method.encode()) + b"Connection: close\r\n\r\n"
    )
    assert status(raw) == 405
    assert b"\r\nAllow: POST\r\n" in raw
    assert b"Access-Control" not in raw  # pages of other sites are not let in
    assert engine[0].asked == []


async def test_no_tunnel_is_opened(gateway: str, engine: tuple[Engine, str]) -> None:
    head = b"CONNECT %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % engine[1][7:].encode()
    assert status(await exchange(gateway, head, answers=1)) in (400, 404)
    upgrade = TO + b"Connection: Upgrade, close\r\nUpgrade: websocket\r\nContent-Length: 57\r\n\r\n"
    raw = await exchange(gateway, upgrade + CHAT)
    assert status(raw) == 200
    assert not {"Upgrade", "Connection"} & {*engine[0].headers[-1]} - {"Connection"}
    assert [a.split()[0] for a in engine[0].asked] == ["POST"]


async def test_headers_of_one_connection_stay_on_it(
    gateway: str, engine: tuple[Engine, str]
) -> None:
    extra = (
        b"Connection: x-one\r\nConnection: close, X-Two\r\nX-One: 1\r\nx-two: 2\r\nX-Three: 3\r\n"
        b"Keep-Alive: timeout=5\r\nTE: trailers\r\nTrailer: X-T\r\nProxy-Authorization: Basic x\r\n"
        b"Proxy-Connection: keep-alive\r\nCookie: a=b\r\n"
    )
    raw = await exchange(gateway, TO + extra + b"Content-Length: %d\r\n\r\n%b" % (len(CHAT), CHAT))
    assert status(raw) == 200
    got = {name.lower() for name in engine[0].headers[-1]}
    assert "x-three" in got
    refused = {"x-one", "x-two", "keep-alive", "te", "trailer", "proxy-authorization", "cookie"}
    assert not got & (refused | {"proxy-connection", "connection"})


async def test_a_whole_pipeline_is_answered_in_order(
    gateway: str, engine: tuple[Engine, str]
) -> None:
    one = TO + b"Content-Length: %d\r\n\r\n%b" % (len(CHAT), CHAT)
    last = SMUGGLED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    await exchange(gateway, one + one + last)
    assert [a.split()[0] for a in engine[0].asked] == ["POST", "POST", "GET"]


# Bodies.


def post(body: bytes, *headers: bytes) -> bytes:
    lines = [b"Connection: close", b"Content-Length: %d" % len(body), *headers]
    return TO + b"\r\n".join(lines) + b"\r\n\r\n" + body


GZIP = b"Content-Encoding: gzip"


async def test_a_compressed_body_is_read_like_any_other(
    gateway: str, engine: tuple[Engine, str]
) -> None:
    assert status(await exchange(gateway, post(gzip.compress(CHAT), GZIP))) == 200
    assert "Content-Encoding" not in engine[0].headers[-1]


def bomb() -> bytes:
    """200 MB in 200 kB."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = bytes(1 << 20)
    return b"".join(squeeze.compress(zeros) for _ in range(200)) + squeeze.flush()


async def test_a_bomb_is_not_unpacked(gateway: str, engine: tuple[Engine, str]) -> None:
    tracemalloc.start()
    try:
        raw = await exchange(gateway, post(bomb(), GZIP))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert status(raw) == 413
    assert peak < 32 << 20  # the limit is 1 MB here; the rest is the bomb itself and its making
    assert engine[0].asked == []


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (b"not gzip", GZIP),
        (CHAT, b"Content-Encoding: br"),
        (CHAT, b"Content-Encoding: zstd"),
        (CHAT, b"Content-Encoding: deflate"),
    ],
)
async def test_a_body_that_is_not_what_it_says(
    gateway: str, engine: tuple[Engine, str], body: bytes, header: bytes
) -> None:
    assert status(await exchange(gateway, post(body, header))) == 400
    assert engine[0].asked == []


async def test_a_long_body_is_refused_before_it_comes(
    gateway: str, engine: tuple[Engine, str]
) -> None:
    raw = await exchange(gateway, TO + b"Content-Length: 1048577\r\n\r\n", answers=1)
    assert status(raw) == 413
    assert b"max_request_bytes (1048576)" in raw
    chunks = TO + b"Transfer-Encoding: chunked\r\n\r\n" + b"10000\r\n%b\r\n" % bytes(1 << 16) * 17
    assert status(await exchange(gateway, chunks, answers=1)) == 413
    assert engine[0].asked == []


def nested(depth: int) -> bytes:
    """A call, and all of it ``depth`` deep."""
    return CHAT[:-1] + b',"x":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-be"])
async def test_a_deep_body_is_refused(
    gateway: str, engine: tuple[Engine, str], encoding: str
) -> None:
    for depth in (MAX_JSON_DEPTH + 1, 100_000):
        raw = await exchange(gateway, post(nested(depth).decode().encode(encoding)))
        assert status(raw) == 400
        assert f"nested {depth} deep".encode() in raw
    assert engine[0].asked == []
    raw = await exchange(gateway, post(nested(MAX_JSON_DEPTH).decode().encode(encoding)))
    assert status(raw) == 200


async def test_a_deep_body_is_refused_by_the_api(gateway: str) -> None:
    raw = await exchange(
        gateway, post(nested(10_000)).replace(b"/v1/chat/completions", b"/api/trajectories")
    )
    assert status(raw) == 400
    assert json.loads(raw.partition(b"\r\n\r\n")[2])["error"]["code"] == "bad_request"

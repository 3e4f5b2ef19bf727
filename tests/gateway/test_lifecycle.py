"""How a gateway ends, and what it answers at its edges."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from driftgate.errors import StorageError
from driftgate.gateway import app as app_module
from driftgate.gateway.app import create_app, serve
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.recorder import STOPPED, Recorder
from driftgate.gateway.tasks import Calls
from driftgate.storage import Reader, Record

if TYPE_CHECKING:
    from tests.gateway.conftest import StandIn

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


# The end.


async def start(calls: Calls, may_end: asyncio.Event) -> asyncio.Task[None]:
    started = asyncio.Event()

    async def serve_one() -> None:
        with calls.running():
            started.set()
            await may_end.wait()

    task = asyncio.create_task(serve_one())
    await started.wait()
    return task


async def test_a_stop_waits_for_the_calls_under_way() -> None:
    calls, may_end = Calls(), asyncio.Event()
    tasks = [await start(calls, may_end) for _ in range(2)]
    stopping = asyncio.create_task(calls.stop(10, lambda: pytest.fail("none is cut")))
    await asyncio.sleep(0)
    assert not stopping.done()
    may_end.set()
    assert await stopping == 0
    assert [task.cancelled() for task in tasks] == [False, False]


@pytest.mark.parametrize("hurried", [False, True])
async def test_a_stop_cuts_what_takes_too_long(hurried: bool) -> None:
    calls = Calls()
    task = await start(calls, asyncio.Event())
    before: list[bool] = []
    if hurried:
        calls.hurry.set()
    assert await calls.stop(10 if hurried else 0.01, lambda: before.append(task.done())) == 1
    assert before == [False]
    assert task.cancelled()


@pytest.fixture
def config(engine: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GatewayConfig:
    """Of a gateway that is cut at once, before an engine that does not answer."""
    monkeypatch.setattr(app_module, "STOP_WAIT_S", 0.01)
    engine.hold = asyncio.Event()
    return GatewayConfig(upstream=engine.url, store=tmp_path, port=0)


async def test_a_call_that_the_stop_cuts_blames_the_stop(
    config: GatewayConfig, engine: StandIn
) -> None:
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession() as http:
        async with serve(config) as url:
            call = asyncio.ensure_future(http.post(url + "/v1/chat/completions", json=CHAT))
            await engine.came.wait()
            stopped = loop.time()
        assert loop.time() - stopped < 20  # aiohttp by itself takes a minute
        with pytest.raises(aiohttp.ClientError):
            await call
    ((outcome, missing),) = recorded(config)
    assert outcome == ("cancelled", STOPPED)
    assert missing == []


async def test_a_stream_that_the_stop_cuts_blames_the_stop(
    config: GatewayConfig, engine: StandIn
) -> None:
    async with aiohttp.ClientSession() as http:
        async with serve(config) as url:
            path = url + "/v1/chat/completions"
            answer = await http.post(path, json=CHAT | {"stream": True})
        with pytest.raises(aiohttp.ClientError):
            await answer.read()
    ((outcome, missing),) = recorded(config)
    assert outcome == ("cancelled", f"1 of 1 choices came: {STOPPED}")
    assert missing == [f"end: {STOPPED}"]


def recorded(config: GatewayConfig) -> list[tuple[tuple[str, str], list[str]]]:
    """Status and reason of each call's outcome, and what its traces miss first."""
    reader = Reader(config.store)
    out: list[tuple[tuple[str, str], list[str]]] = []
    for trajectory in reader.trajectories():
        traces = reader.traces(trajectory.trajectory)
        for call in reader.calls(trajectory.trajectory):
            assert call.outcome is not None
            said = (call.outcome.status, call.outcome.reason)
            out.append((said, [trace.meta.missing[0] for trace in traces]))
    reader.close()
    return out


async def test_what_the_last_writes_lose_is_recorded(
    config: GatewayConfig, engine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer's fold fails while the gateway is closing its store."""
    engine.hold = None
    async with serve(config) as url, aiohttp.ClientSession() as http:
        monkeypatch.setattr(Recorder, "_make", unfoldable)
        async with http.post(url + "/v1/chat/completions", json=CHAT) as answer:
            assert answer.status == 200
    ((outcome, _),) = recorded(config)
    assert outcome == ("capture_failed", "ValueError: no shape")


def unfoldable(*_: object) -> list[Record]:
    raise ValueError("no shape")


def test_a_second_signal_does_not_wait_for_calls(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        port = silent.getsockname()[1]
        command = [sys.executable, "-m", "driftgate.cli", "serve", "--port", "0"]
        options = ["--upstream", f"http://127.0.0.1:{port}", "--store", str(tmp_path)]
        with subprocess.Popen(command + options, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            url = process.stdout.readline().split()[2].rstrip(",")
            host, gateway_port = url.removeprefix("http://").split(":")
            body = json.dumps(CHAT).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}"
            with socket.create_connection((host, int(gateway_port))) as agent:
                # The first answer shows that the second request is there as well.
                agent.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
                agent.sendall(head.encode() + b"\r\n\r\n" + body)
                assert agent.recv(1 << 16).startswith(b"HTTP/1.1 200")
                started = time.monotonic()
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGINT)
                assert process.wait(timeout=20) == 0
            assert time.monotonic() - started < 7.5  # the wait that is skipped takes 8 s


# The edges.


@asynccontextmanager
async def edges(tmp_path: Path, **settings: Any) -> AsyncIterator[TestServer]:
    """A gateway whose engine is not there, with two handlers that fail after their start."""
    app = create_app(GatewayConfig(upstream="http://127.0.0.1:9", store=tmp_path, **settings))
    for path, error in (("/ours", StorageError("gone")), ("/bug", ValueError("bug"))):
        app.router.add_get(path, partial(begin_and_raise, error))
    app.router.add_get("/other", begin_and_answer)
    server = TestServer(app)
    async with server:
        yield server


async def begin(request: web.Request) -> None:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"half of it")


async def begin_and_raise(error: Exception, request: web.Request) -> web.StreamResponse:
    await begin(request)
    raise error


async def begin_and_answer(request: web.Request) -> web.StreamResponse:
    await begin(request)
    return web.Response(status=500, text="a second answer")


@pytest.mark.parametrize("path", ["/ours", "/bug", "/other"])
async def test_an_answer_that_has_begun_is_cut_and_not_answered_again(
    tmp_path: Path, path: str
) -> None:
    async with edges(tmp_path) as server:
        raw = await exchange(server, f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n")
    assert raw.count(b"HTTP/1.1 ") == 1
    assert raw.startswith(b"HTTP/1.1 200")
    assert b"0\r\n\r\n" not in raw  # a clean end


async def test_a_host_that_is_none_is_a_bad_request(tmp_path: Path) -> None:
    head = "POST /api/trajectories HTTP/1.1\r\nHost: a b[\r\nContent-Length: 0\r\n"
    async with edges(tmp_path) as server:
        raw = await exchange(server, head + "Connection: close\r\n\r\n")
    assert raw.startswith(b"HTTP/1.1 400")


async def exchange(server: TestServer, request: str) -> bytes:
    assert server.port is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request.encode())
    raw = b""
    try:
        while piece := await reader.read(1 << 16):
            raw += piece
    except ConnectionResetError:
        pass
    writer.close()
    return raw


async def get(server: TestServer, path: str) -> bytes:
    async with aiohttp.ClientSession() as http, http.get(server.make_url(path)) as answer:
        return await answer.read()


async def test_a_request_that_is_too_long_names_the_limit_and_the_fix(tmp_path: Path) -> None:
    async with edges(tmp_path, max_request_bytes=100) as server, aiohttp.ClientSession() as http:
        url = server.make_url("/v1/chat/completions")
        async with http.post(url, json={"user": "x" * 200}) as answer:
            assert answer.status == 413
            message = (await answer.json())["error"]["message"]
    assert "max_request_bytes (100)" in message
    assert "raise it" in message


async def test_metrics_show_the_stores_and_the_feeds_errors(tmp_path: Path) -> None:
    async with edges(tmp_path) as server:
        lines = (await get(server, "/metrics")).decode().splitlines()
    for name in ("store_write_errors", "store_duplicate_records", "drift_poll_errors"):
        assert f"driftgate_{name}_total 0.0" in lines


async def test_the_document_says_how_to_mint_and_how_to_resume(tmp_path: Path) -> None:
    async with edges(tmp_path) as server:
        paths = json.loads(await get(server, "/api/openapi.json"))["paths"]
    assert paths["/api/trajectories"]["post"]["requestBody"]["required"] is False
    reward = paths["/api/trajectories/{trajectory}/reward"]["post"]
    assert reward["requestBody"]["required"] is True
    drift = paths["/api/drift"]["get"]
    headers = [p["name"] for p in drift["parameters"] if p["in"] == "header"]
    assert headers == ["Last-Event-ID"]
    assert list(drift["responses"]["200"]["headers"]) == ["x-driftgate-cursor"]

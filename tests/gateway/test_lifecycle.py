"""How a gateway ends, and what it answers at its edges."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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
from driftgate.gateway.recorder import STOPPED
from driftgate.gateway.tasks import Calls
from driftgate.storage import Reader

if TYPE_CHECKING:
    from tests.gateway.conftest import Agent, StandIn

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


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stopped_gateway_takes_the_blame(
    engine: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(app_module, "STOP_WAIT_S", 0.05)
    engine.hold = asyncio.Event()
    config = GatewayConfig(upstream=engine.url, store=tmp_path, port=0)
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession() as http:
        async with serve(config) as url:
            body = CHAT | {"stream": stream}
            call = asyncio.create_task(read(http, url + "/v1/chat/completions", body))
            await engine.came.wait()
            if stream:
                await until_prepared(call)
            started = loop.time()
        assert loop.time() - started < 2
        with pytest.raises(aiohttp.ClientError):
            await call
    reader = Reader(tmp_path)
    (trajectory,) = reader.trajectories()
    (row,) = reader.calls(trajectory.trajectory)
    traces = reader.traces(trajectory.trajectory)
    reader.close()
    assert row.outcome is not None
    assert row.outcome.status == "cancelled"
    assert STOPPED in row.outcome.reason
    assert [trace.meta.missing[0] for trace in traces] == [f"end: {STOPPED}"] * stream


async def read(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> bytes:
    async with http.post(url, json=body) as answer:
        PREPARED.set()
        return await answer.read()


PREPARED = asyncio.Event()


async def until_prepared(call: asyncio.Task[bytes]) -> None:
    await asyncio.wait({call, asyncio.create_task(PREPARED.wait())}, return_when="FIRST_COMPLETED")

"""What is forwarded arrives as it was sent, and goes nowhere else."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from driftgate.gateway import proxy
from driftgate.gateway.app import serve
from driftgate.gateway.config import GatewayConfig
from tests.gateway.conftest import start


class Echo:
    """An engine of odd habits, which remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.reason: str | None = None
        self.reply: tuple[int, bytes, dict[str, str]] = (200, b'{"choices":[]}', {})

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.raw_path}")
        if request.path.endswith("/v1/models"):
            return web.json_response({"data": []})
        status, body, headers = self.reply
        return web.Response(status=status, reason=self.reason, body=body, headers=headers)


@pytest.fixture
async def engine() -> AsyncIterator[tuple[Echo, str]]:
    echo = Echo()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", echo.handle)
    runner, url = await start(app)
    yield echo, url
    await runner.cleanup()


@pytest.fixture
async def gateway(engine: tuple[Echo, str], tmp_path: Path) -> AsyncIterator[str]:
    async with serve(GatewayConfig(upstream=engine[1], port=0, store=tmp_path)) as url:
        yield url


CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


async def post(url: str, **more: Any) -> tuple[int, bytes, Any]:
    async with (
        aiohttp.ClientSession() as http,
        http.post(URL(url, encoded=True), allow_redirects=False, **more) as answer,
    ):
        return answer.status, await answer.read(), answer.headers


async def test_the_query_string_keeps_its_spelling(gateway: str, engine: tuple[Echo, str]) -> None:
    await post(f"{gateway}/v1/chat/completions?a=x%23y&z=%20", json=CHAT)
    assert engine[0].asked[-1] == "POST /v1/chat/completions?a=x%23y&z=%20"


async def test_a_redirect_is_the_agents_to_follow(gateway: str, engine: tuple[Echo, str]) -> None:
    engine[0].reply = (307, b"", {"Location": "/update_weights"})
    status, _, headers = await post(f"{gateway}/v1/chat/completions", json=CHAT)
    assert (status, headers["Location"]) == (307, "/update_weights")
    assert not any("update_weights" in asked for asked in engine[0].asked)


@pytest.mark.parametrize(
    ("said", "passed"), [("Slow Down", "Slow Down"), ("Zu spät", "Too Many Requests")]
)
async def test_the_words_behind_a_status_pass(
    gateway: str, engine: tuple[Echo, str], said: str, passed: str
) -> None:
    engine[0].reply, engine[0].reason = (429, b"{}", {}), said
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{gateway}/v1/chat/completions", json=CHAT) as answer,
    ):
        assert (answer.status, answer.reason) == (429, passed)


async def test_a_large_body_is_read_beside_the_loop_and_served_alike(
    gateway: str, engine: tuple[Echo, str]
) -> None:
    image = "A" * (proxy.LARGE_BODY_BYTES + 1)
    body = CHAT | {"messages": [{"role": "user", "content": image}]}
    raw = io.BytesIO(json.dumps(body).encode())
    status, answer, _ = await post(f"{gateway}/v1/chat/completions", data=raw)
    assert (status, json.loads(answer)) == (200, {"choices": []})


@pytest.mark.parametrize(
    "own", [{"headers": {"x-session-id": "x" * 300}}, {"metadata": {"trajectory_id": " run 7 "}}]
)
async def test_an_agents_own_names_never_cost_it_its_call(
    gateway: str, own: dict[str, Any]
) -> None:
    body = CHAT | ({"metadata": own["metadata"]} if "metadata" in own else {})
    status, _, _ = await post(
        f"{gateway}/v1/chat/completions", json=body, headers=own.get("headers")
    )
    assert status == 200

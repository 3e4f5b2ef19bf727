"""Secrets are planted wherever one can stand, and then looked for wherever they must not be."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from driftgate.errors import UpstreamError
from driftgate.gateway.app import GATEWAY, create_app
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.keys import TrajectoryKeys, digest_of
from driftgate.gateway.listen import listening
from driftgate.gateway.probe import probe
from driftgate.storage.codec import unpack_frame
from driftgate.storage.segments import read_segment, segment_paths
from tests.gateway.conftest import Agent, StandIn, start

UPSTREAM = "sentinel-of-the-engine-0123456789"
CALL, ADMIN = "sentinel-of-callers-0123456789", "sentinel-of-admins-0123456789"
SIGNING = "sentinel-that-signs-0123456789abcdef"
MINTED = TrajectoryKeys(SIGNING).make("t")
PLANTED = {
    "Cookie": "session=sentinel-cookie",
    "Proxy-Authorization": "Basic sentinel-proxy",
    "x-api-key": "sentinel-x-api-key",
}
SECRETS = (b"sentinel", MINTED.encode())
TO = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


class Told:
    """Collects all that the gateway lets anybody see."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, bytes]] = []

    def add(self, where: str, what: object) -> None:
        self.heard.append((where, what if isinstance(what, bytes) else str(what).encode()))

    def check(self) -> None:
        assert self.heard
        for where, what in self.heard:
            for secret in SECRETS:
                assert secret not in what, (where, what[:2000])


async def send(agent: Agent, told: Told, key: str, body: Any, **more: Any) -> None:
    headers = PLANTED | {"Authorization": f"Bearer {key}"} | more.pop("headers", {})
    path = more.pop("path", "/v1/chat/completions")
    try:
        async with agent.http.post(agent.url + path, json=body, headers=headers, **more) as answer:
            told.add("answer", f"{answer.status} {answer.headers} {(await answer.read()).decode()}")
    except aiohttp.ClientError as error:
        told.add("cut answer", error)


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **more}


async def all_ways_to_end(agent: Agent, engine: StandIn, told: Told, key: str) -> None:
    """Calls that are answered, streamed, refused, cut and not understood."""
    await send(agent, told, key, chat(user="sentinel-user"))
    await send(agent, told, key, chat(stream=True, metadata={"email": "sentinel-mail"}))
    await send(
        agent, told, key, chat(), path="/v1/completions", params={"api_key": "sentinel-query"}
    )
    await send(agent, told, key, chat(), headers={"x-driftgate-trajectory": " "})
    await send(agent, told, "dgk_sentinel", chat())
    engine.cut_after = 2
    await send(agent, told, key, chat(stream=True))
    engine.cut_after, engine.error_after = None, 1
    await send(agent, told, key, chat(stream=True))
    engine.error_after, engine.status = None, 401
    await send(agent, told, key, chat())
    engine.status = None


async def malformed(agent: Agent, told: Told) -> None:
    """Requests that the parser refuses."""

    host, _, port = agent.url[7:].rpartition(":")
    for bad in (
        b"Authorization: Bearer sentinel\0\r\n\r\n",
        b"Authorization : Bearer sentinel\r\n\r\n",
        b"Authorization: Bearer sentinel\r\n Cookie: sentinel\r\n\r\n",
        b"Authorization: Bearer sentinel" + b"l" * 9000 + b"\r\n\r\n",
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(TO + bad)
        await reader.read()  # it may quote to the sender what the sender sent
        writer.close()
        await writer.wait_closed()


async def look_everywhere(agent: Agent, told: Told, key: str) -> None:
    """The API, metrics, health, the configuration, and every byte of the store."""
    headers = {"Authorization": f"Bearer {key}"}
    paths = ["/metrics", "/readyz", "/healthz", "/api/cells", "/api/openapi.json", "/api/drift"]
    await agent.flush()
    listing = agent.url + "/api/trajectories"
    async with agent.http.get(listing, headers=headers) as answer:
        page = await answer.json()
    names = [row["trajectory"] for row in page["items"]]
    assert names
    for name in names:
        one = f"/api/trajectories/{name}"
        paths += [one, f"{one}/steps/0?routes=1", f"{one}/mismatch?tokens=1", f"{one}/steps/77"]
    for path in paths:
        async with agent.http.get(agent.url + path, headers=headers) as answer:
            told.add(path, await answer.read())
    told.add("config", repr(agent.gateway.config))
    store = agent.gateway.config.store
    records = [entry for path in segment_paths(store) for entry in read_segment(path)]
    assert len(records) >= 4
    for entry in records:
        told.add("record", unpack_frame(entry.header, entry.frame))
    for file in store.rglob("*"):
        if file.is_file():
            told.add(file.name, file.read_bytes())


@pytest.mark.parametrize("keys", [True, False])
async def test_no_secret_is_told_to_anybody(
    connect: Any, engine: StandIn, caplog: pytest.LogCaptureFixture, keys: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.ERROR, "aiohttp.access")  # the stand-in's; the gateway has none
    own = {
        "call_keys": [digest_of(CALL)],
        "admin_keys": [digest_of(ADMIN)],
        "signing_key": SIGNING,
    }
    agent = await connect(
        upstream_key=UPSTREAM, redact=["user", "metadata.email"], **(own if keys else {})
    )
    told = Told()
    await all_ways_to_end(agent, engine, told, CALL)
    if keys:
        await all_ways_to_end(agent, engine, told, MINTED)
    await malformed(agent, told)
    assert {h["Authorization"] for h in engine.headers} == {f"Bearer {UPSTREAM}"}
    given = str([dict(h) for h in engine.headers]).replace(UPSTREAM, "")
    assert "sentinel" not in given
    assert MINTED not in given
    await look_everywhere(agent, told, ADMIN)
    told.add("logs", caplog.text)
    told.check()


async def test_the_check_would_find_a_secret() -> None:
    told = Told()
    told.add("here", b"... sentinel ...")
    with pytest.raises(AssertionError):
        told.check()


@pytest.fixture
async def parrot() -> AsyncIterator[str]:
    """An engine that repeats the key it was given."""

    async def handle(request: web.Request) -> web.StreamResponse:
        said = {"error": {"message": f"not this key: {request.headers['Authorization']}"}}
        if request.headers.get("x-stream"):
            event = b"data: " + json.dumps(said).encode() + b"\n\n"
            return web.Response(body=event, content_type="text/event-stream")
        if request.path == "/v1/models" and not request.headers.get("x-refuse"):
            return web.json_response({"data": [{"id": "tiny"}]})
        return web.json_response(said, status=401)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner, url = await start(app)
    yield url
    await runner.cleanup()


async def test_an_engine_that_repeats_its_key_is_not_quoted(
    parrot: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    told, config = (
        Told(),
        GatewayConfig(upstream=parrot, upstream_key=UPSTREAM, store=tmp_path, port=0),
    )
    app = create_app(config)
    listener = listening(app, config, shutdown_timeout_s=0.5, refused=lambda: None)
    async with listener as url, aiohttp.ClientSession() as http:
        agent = Agent(app[GATEWAY], http, url, StandIn())
        for body in (chat(), chat(stream=True)):
            await send(agent, told, "EMPTY", body)
            await send(agent, told, "EMPTY", body, headers={"x-stream": "yes"})
        for path in ("/v1/models", "/v1/models/tiny"):
            async with http.get(url + path, headers={"x-refuse": "yes"}) as answer:
                told.add(path, await answer.read())
        await look_everywhere(agent, told, "EMPTY")
    report = await probe(parrot, key=UPSTREAM)
    assert any("not this key: Bearer ***" in note for note in report.notes)
    told.add("report", report)
    told.add("logs", caplog.text)
    told.check()


async def test_a_probe_that_is_refused_does_not_quote_the_key(parrot: str) -> None:
    with pytest.raises(UpstreamError) as error:
        await probe(f"{parrot}/below", key=UPSTREAM)
    assert UPSTREAM not in str(error.value)
    assert "***" in str(error.value)


def test_a_store_is_for_its_owner(tmp_path: Path) -> None:
    config = GatewayConfig(upstream="http://127.0.0.1:9", store=tmp_path / "deep" / "store")
    gateway = create_app(config)[GATEWAY]
    assert config.store.stat().st_mode & 0o077 == 0
    gateway.sink.close()  # type: ignore[attr-defined]
    assert gateway.reader is not None
    gateway.reader.close()

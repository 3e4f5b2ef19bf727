"""Several engines behind one gateway, over real sockets: who gets a call, and what is never sent
twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from driftgate.client import Client
from driftgate.gateway import health
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.model_list import united
from tests.gateway.conftest import Agent, StandIn, standing_in
from tests.gateway.test_upstream import until

Connect = Callable[..., Any]

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
STREAM = CHAT | {"stream": True}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that was left is looked at again at once."""
    monkeypatch.setattr(health, "INTERVAL_S", 0.01)
    monkeypatch.setattr(health, "FIRST_BACKOFF_S", 0.01)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that was left stays left for the length of a test."""
    monkeypatch.setattr(health, "FIRST_BACKOFF_S", 1000.0)
    monkeypatch.setattr(health, "LAST_BACKOFF_S", 1000.0)


@pytest.fixture
async def engines() -> AsyncIterator[list[StandIn]]:
    async with AsyncExitStack() as stack:
        found = [await stack.enter_async_context(standing_in()) for _ in range(2)]
        found[1].fingerprint = "vllm-0.29.0-other"
        yield found


@pytest.fixture
async def agent(connect: Connect, engines: list[StandIn]) -> Agent:
    connected: Agent = await connect(upstream="", upstreams=[e.url for e in engines])
    for upstream in connected.gateway.upstreams.all:
        await upstream.ready()
    return connected


def calls(engines: list[StandIn]) -> list[int]:
    return [len(engine.bodies) for engine in engines]


async def run(agent: Agent, name: str, body: dict[str, Any] = CHAT) -> int:
    return (await agent.send(body, headers={"x-driftgate-trajectory": name}))[0]


def metric(agent: Agent, line: str) -> float:
    text = agent.gateway.metrics.render().decode().splitlines()
    return next((float(found.split()[-1]) for found in text if found.startswith(line)), 0.0)


async def test_a_trajectory_stays_with_its_engine(agent: Agent, engines: list[StandIn]) -> None:
    for _ in range(3):
        for name in ("a", "b", "c", "d"):
            assert await run(agent, name) == 200
    assert calls(engines) == [6, 6]
    served = {t.meta.trajectory: t.meta.engine.system_fingerprint for t in await agent.traces()}
    assert sorted(map(str, served.values())) == sorted(e.fingerprint for e in engines for _ in "12")
    for trace in await agent.traces():
        assert trace.meta.engine.system_fingerprint == served[trace.meta.trajectory]


async def test_new_trajectories_go_where_the_fewest_calls_are(
    agent: Agent, engines: list[StandIn]
) -> None:
    engines[0].hold = asyncio.Event()
    held = asyncio.create_task(run(agent, "held"))
    await engines[0].came.wait()
    for name in range(4):
        assert await run(agent, str(name)) == 200
    assert calls(engines) == [1, 4]
    assert metric(agent, f'driftgate_upstream_calls_in_flight{{upstream="{engines[0].url}"}}') == 1
    engines[0].hold.set()
    assert await held == 200
    assert metric(agent, f'driftgate_upstream_calls_in_flight{{upstream="{engines[0].url}"}}') == 0


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_an_engine_that_does_not_answer_is_left(
    agent: Agent, engines: list[StandIn], body: dict[str, Any]
) -> None:
    assert await run(agent, "a") == 200
    await engines[0].runner.cleanup()
    assert await run(agent, "a", body) == 200
    assert await run(agent, "a", body) == 200
    assert calls(engines) == [1, 2]
    first, second, third = await agent.traces()
    assert first.meta.failed_over == third.meta.failed_over == []
    (why,) = second.meta.failed_over
    assert why.startswith(f"{engines[0].url}: ")
    assert second.meta.engine.system_fingerprint == engines[1].fingerprint
    assert metric(agent, f'driftgate_upstream_up{{upstream="{engines[0].url}"}}') == 0
    failed = f'driftgate_upstream_calls_total{{first="failed",upstream="{engines[0].url}"}}'
    assert metric(agent, failed) == 1


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("status", [502, 503])
async def test_an_engine_that_does_not_serve_is_left(
    agent: Agent, engines: list[StandIn], status: int
) -> None:
    engines[0].status = status
    assert await run(agent, "a") == 200
    (trace,) = await agent.traces()
    assert trace.meta.failed_over == [f"{engines[0].url}: it answered {status}"]
    engines[1].status = status
    assert await run(agent, "a") == status  # where none is left, the answer is the engine's


@pytest.mark.parametrize("status", [400, 429, 500, 504])
async def test_other_errors_are_the_answer(
    agent: Agent, engines: list[StandIn], status: int
) -> None:
    engines[0].status = status
    assert await run(agent, "a") == status
    assert calls(engines) == [1, 0]


async def test_after_the_first_byte_nothing_is_sent_again(
    agent: Agent, engines: list[StandIn]
) -> None:
    engines[0].cut_after = 2
    headers = {"x-driftgate-trajectory": "a"}
    url = agent.url + "/v1/chat/completions"
    async with agent.http.post(url, json=STREAM, headers=headers) as answer:
        assert (await answer.content.readany()).startswith(b"data: ")
        with pytest.raises(aiohttp.ClientError):
            await answer.read()
    assert calls(engines) == [1, 0]
    (trace,) = await agent.traces()
    assert (trace.meta.status, trace.meta.failed_over) == ("partial", [])


@pytest.mark.usefixtures("quick")
async def test_an_engine_that_is_well_again_gets_calls_again(
    agent: Agent, engines: list[StandIn]
) -> None:
    first = agent.gateway.upstreams.all[0]
    engines[0].status = 503
    await until(lambda: not first.available)  # its health route says so too
    assert "503" in str(first.why_away)
    assert await run(agent, "a") == 200
    assert calls(engines) == [0, 1]
    engines[0].status = None
    await until(lambda: first.available)
    assert await run(agent, "b") == 200
    assert calls(engines) == [1, 1]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("gone", [False, True])
async def test_only_an_engine_that_was_away_is_taken_for_another(
    agent: Agent, engines: list[StandIn], monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    first = agent.gateway.upstreams.all[0]
    returned: list[bool] = []
    monkeypatch.setattr(first.health, "_returned", returned.append)
    if gone:
        engines[0].status = 503
        await until(lambda: not first.available)
        engines[0].status = None
    else:
        first.health.failed("the engine closed the connection without an answer")
    await until(lambda: bool(returned))
    assert returned == [gone]


@pytest.mark.usefixtures("quick")
async def test_a_look_does_not_undo_a_failure_that_came_while_it_was_taken(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = agent.gateway.upstreams.all[0]
    look, looks, returned_after = first.health._look, list[int](), list[int]()

    async def failing() -> str | None:
        looks.append(1)
        if len(looks) == 1:
            first.health.failed("the engine closed the connection without an answer")
        return await look()

    monkeypatch.setattr(first.health, "_returned", lambda _: returned_after.append(len(looks)))
    monkeypatch.setattr(first.health, "_look", failing)
    await until(lambda: bool(returned_after))
    assert returned_after[0] == 2


async def test_a_bug_in_a_look_is_not_the_last_one(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(health, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(health, "LAST_BACKOFF_S", 0.01)
    first = agent.gateway.upstreams.all[0]
    monkeypatch.setattr(first.health, "_wait_s", 0.01)
    with monkeypatch.context() as broken:
        broken.setattr(first.health, "_look", lambda: 1 / 0)
        first.health.failed("it was unplugged")
        await until(lambda: "it is tried again" in caplog.text)
    await until(lambda: first.available)


async def test_a_call_waits_once_for_engines_that_hang(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlines: list[float | None] = []

    async def ready(deadline: float | None = None) -> None:
        deadlines.append(deadline)

    for upstream in agent.gateway.upstreams.all:
        upstream.error = "not probed yet"
        monkeypatch.setattr(upstream, "ready", ready)
    assert await run(agent, "a") == 200
    assert len(deadlines) == 3
    assert len(set(deadlines)) == 1


@pytest.mark.usefixtures("slow")
async def test_readiness_tells_of_each(agent: Agent, engines: list[StandIn]) -> None:
    await engines[0].runner.cleanup()
    agent.gateway.upstreams.all[0].health.failed("it was unplugged")
    async with agent.http.get(agent.url + "/readyz") as answer:
        body = await answer.json()
    assert (answer.status, body["ready"], body["error"]) == (200, True, None)
    assert [e["error"] for e in body["engines"]] == ["it was unplugged", None]
    agent.gateway.upstreams.all[1].health.failed("this too")
    async with agent.http.get(agent.url + "/readyz") as answer:
        assert (answer.status, (await answer.json())["ready"]) == (503, False)
    async with Client(agent.url) as client:
        now = (await client.overview()).alarms
    assert [(a.severity, a.code) for a in now] == [("red", "engine_away")] * 2
    assert now[0].text == f"Engine away: {engines[0].url}: it was unplugged"


async def test_the_models_of_all_engines_are_listed(agent: Agent) -> None:
    async with agent.http.get(agent.url + "/v1/models") as answer:
        assert [model["id"] for model in (await answer.json())["data"]] == ["tiny"]
    one = json.dumps({"data": [{"id": "a", "x": 1.5}, {"id": "b"}]}).encode()
    two = json.dumps({"data": [{"id": "b"}, {"id": "c"}]}).encode()
    found = json.loads(united([one, b"no list", two]))
    assert found == {"object": "list", "data": [{"id": "a", "x": 1.5}, {"id": "b"}, {"id": "c"}]}


async def test_where_no_engine_lists_its_models_its_answer_is_passed(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(*_: Any) -> web.Response:
        return web.json_response({"error": "who are you?"}, status=401)

    monkeypatch.setattr(agent.gateway.proxy, "_get", refused)
    async with agent.http.get(agent.url + "/v1/models") as answer:
        assert (answer.status, await answer.json()) == (401, {"error": "who are you?"})


async def test_a_call_goes_to_an_engine_that_has_its_model(
    agent: Agent, engines: list[StandIn]
) -> None:
    report = agent.gateway.upstreams.all[0].report
    assert report is not None
    report.models[0] = type(report.models[0])(id="other")
    for name in range(3):
        assert await run(agent, str(name)) == 200
    assert calls(engines) == [0, 3]


def test_upstreams_are_checked() -> None:
    assert GatewayConfig(upstream="http://a:1/", upstreams=["http://b:1"]).urls == [
        "http://a:1",
        "http://b:1",
    ]
    with pytest.raises(ValueError, match="base URL"):
        GatewayConfig()
    with pytest.raises(ValueError, match="twice"):
        GatewayConfig(upstream="http://a:1", upstreams=["http://a:1/"])
    with pytest.raises(ValueError, match="without /v1"):
        GatewayConfig(upstreams=["http://a:1/v1"])


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://a:99999", "Port out of range 0-65535"),
        ("http://a:abc", "Port could not be cast to integer value as 'abc'"),
        ("http://a:-1", "Port"),
        ("http://a:0", "no port behind its colon"),
        ("http://a:", "no port behind its colon"),
        ("http://[::1", "Invalid IPv6 URL"),
        ("http://a..b:80", "label empty or too long"),
        (f"http://{'a' * 64}:80", "label"),
        ("http://a:1?x=1", "query or fragment"),
        ("http://a:1/?", "query or fragment"),
        ("http://a:1#f", "query or fragment"),
        ("http://a b:80", "blanks"),
        (" http://a:80", "blanks"),
        ("http://a:80\n", "blanks"),
        ("http://a:80/v1/", "without /v1"),
        ("http://me:my secret@a:80", "must not hold credentials"),
        ("http://a:80/v1/chat/completions", "without /v1"),
        ("http://:80", "is not a URL like"),
        ("a:80", "is not a URL like"),
    ],
)
def test_an_address_that_is_none_is_one_line_at_the_start(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=r"^upstream ") as refused:
        GatewayConfig(upstream=url)
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["http://a", "https://a.b.:1/v1/x", "http://[::1]:1", "http://ü:80", "http://a_b:8000"]
)
def test_an_address_that_is_one_is_taken(url: str) -> None:
    assert GatewayConfig(upstream=url).urls == [url]

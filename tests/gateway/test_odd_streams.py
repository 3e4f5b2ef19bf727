"""Answers that no sane engine sends: the agent gets the bytes that it would have got, and what is
captured says what is missing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from tests.gateway.conftest import start
from tests.gateway.test_tape import chunk

if TYPE_CHECKING:
    from tests.gateway.conftest import Agent, StandIn

    Says = Callable[[bytes, str], Awaitable[Agent]]

ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
EVENT_STREAM = "text/event-stream"
USUAL = chunk({"content": "a"}, ["a"], [7])
STRIPPED = USUAL.partition(b'"logprobs":')[0]
STRIPPED += b'"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'


@pytest.fixture
async def says(
    connect: Callable[..., Awaitable[Agent]], engine: StandIn
) -> AsyncIterator[Callable[[bytes, str], Awaitable[Agent]]]:
    """Start a gateway before an engine that answers every call with these bytes."""
    runners = []

    async def says(raw: bytes, content_type: str) -> Agent:
        async def answer(request: web.Request) -> web.Response:
            await request.read()
            return web.Response(body=raw, content_type=content_type)

        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner, engine.url = await start(app)
        runners.append(runner)
        return await connect()

    yield says
    for runner in runners:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("end", "missing"),
    [(b"data: [DONE]", []), (b"", ["end: the stream ended without data: [DONE]"])],
    ids=["done without a blank line", "no end"],
)
async def test_a_ragged_end_is_passed_as_it_is_and_without_our_fields(
    says: Says, end: bytes, missing: list[str]
) -> None:
    agent = await says(USUAL + (USUAL + end if end else USUAL[:-2]), EVENT_STREAM)
    _, stream = await agent.send(ASKED | {"stream": True})
    assert stream == STRIPPED + (STRIPPED + end if end else STRIPPED[:-2])
    (trace,) = await agent.traces()
    assert trace.response_ids is not None
    assert trace.response_ids.tolist() == [7, 7]
    assert set(missing) <= set(trace.meta.missing)


@pytest.mark.parametrize("content", [b"\xff", b"\\ud800", b"\x01"])
async def test_text_that_is_none_reaches_the_agent(says: Says, content: bytes) -> None:
    bad = USUAL.replace(b'"delta":{"content":"a"}', b'"delta":{"content":"%b"}' % content)
    agent = await says(USUAL + bad + b"data: [DONE]\n\n", EVENT_STREAM)
    status, stream = await agent.send(ASKED | {"stream": True})
    assert status == 200
    assert b'"content":"%b"' % content in stream
    (trace,) = await agent.traces()
    assert trace.meta.missing[0].startswith("events: 1 cannot be read")


@pytest.mark.parametrize(
    "body",
    [
        b'{"choices":[{"message":{"role":"assistant","content":"\xff"}}]}',
        b'{"choices":[{"message":{"role":"assistant","content":%b}}]}' % (b"[" * 5000),
        b'{"choices":%b%b}' % (b"[" * 5000, b"]" * 5000),
        json.dumps({"choices": [{"message": {"content": "a"}, "routed_experts": 3}]}).encode(),
    ],
    ids=["not UTF-8", "cut deep", "deep", "routes that are none"],
)
async def test_a_body_that_is_none_reaches_the_agent(says: Says, body: bytes) -> None:
    agent = await says(body, "application/json")
    status, answer = await agent.send(ASKED)
    assert (status, answer) == (200, body)
    assert (await agent.send(ASKED))[0] == 200

"""Answers that no sane engine sends: the agent gets the bytes that it would have got, and what is
captured says what is missing."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from driftgate.gateway.openai import Plan, strip_answer, strip_event
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
    assert trace.meta.missing[0].startswith("answer: delta cannot be read")
    assert trace.response_ids is not None
    assert trace.response_ids.tolist() == [7, 7]  # the token is whole


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


@pytest.mark.parametrize(("n", "came"), [(1, 0), (2, 1)])
async def test_a_whole_answer_that_cannot_be_read_is_said_and_counted(
    says: Says, n: int, came: int
) -> None:
    """The agent has all of it; of the store's gap it must be known whose it is."""
    unread = USUAL.replace(b'"token_ids":[7]', b'"token_ids":"7"').replace(b"0,", b"1,", 1)
    agent = await says(USUAL * came + unread + b"data: [DONE]\n\n", EVENT_STREAM)
    status, _ = await agent.send(ASKED | {"stream": True, "n": n})
    assert status == 200
    (outcome,) = await agent.outcomes()
    assert outcome.status == "capture_failed"
    why = "events: 1 cannot be read, the first: token_ids: Expected `array | null`, got `str`"
    assert outcome.reason == f"{came} of {n} choices came: {why}"
    assert len(await agent.traces()) == came
    assert 'lost_total{record="trace"} 1.0' in agent.gateway.metrics.render().decode()


async def test_a_cut_answer_that_cannot_be_read_says_both(says: Says) -> None:
    agent = await says(USUAL.replace(b"[7]", b'"7"'), EVENT_STREAM)
    await agent.send(ASKED | {"stream": True})
    (outcome,) = await agent.outcomes()
    assert outcome.status == "failed"
    assert outcome.reason.startswith("0 of 1 choices came: the stream ended without data: [DONE]")
    assert "; events: 1 cannot be read, the first: " in outcome.reason


# Text that is no strict JSON.

HIDES = Plan(
    api="chat",
    hide_top=frozenset({"prompt_token_ids"}),
    hide_choice=frozenset({"token_ids", "logprobs"}),
)
NO_JSON = b'{"choices":[{"logprobs":NaN,"token_ids":[5],"message":{"content":"%b"}}]}'


@pytest.mark.parametrize("text", ["NaN", '"NaN"', "\\", 'a\\"-Infinity', "é\n", ""])
def test_numbers_that_json_does_not_have_pass(text: str) -> None:
    logprobs = [math.nan, -math.inf, math.inf, -0.5]
    body = {"a": [math.nan], "choices": [{"x": text, "logprobs": logprobs, "y": -math.inf}]}
    stripped = strip_answer(json.dumps(body).encode(), HIDES).body
    body["choices"] = [{"x": text, "logprobs": None, "y": -math.inf}]
    assert json.dumps(json.loads(stripped)) == json.dumps(body)


@pytest.mark.parametrize(
    "text",
    [b'\\"' * (1 << 19), b'\\"' * (1 << 19) + b"\\", b'"' * (1 << 20), b"-" * (1 << 20)],
    ids=["escaped quotes", "a half escape", "quotes", "signs"],
)
def test_a_megabyte_of_anything_is_looked_through_at_once(text: bytes) -> None:
    """A quadratic search takes hours; the suite's timeout is two minutes."""
    cut = NO_JSON.partition(b"%b")[0] + text
    assert strip_answer(cut, HIDES).body == cut
    assert strip_event(b"data: " + cut, HIDES) == b"data: " + cut


def test_looking_through_an_answer_takes_little_memory() -> None:
    body = NO_JSON % (b"A" * (1 << 22))
    tracemalloc.start()
    try:
        stripped = strip_answer(body, HIDES).body
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert b'"logprobs":null,"token_ids":null' in stripped
    assert peak < 8 * len(body)  # copies, not a note for each character

"""Responses and Messages through a gateway, over real sockets: captured as chat is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web

from driftgate.gateway.keys import TrajectoryKeys, digest_of
from tests.gateway.conftest import Agent, StandIn
from tests.gateway.sdk_shapes import (
    anthropic_message,
    message_of_stream,
    openai_response,
    response_of_stream,
)

USER = {"role": "user", "content": "hi"}
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [USER], "max_tokens": 5},
    "/v1/responses": {"input": "hi", "max_tokens": 5},
    "/v1/messages": {"messages": [USER], "max_tokens": 5},
}
APIS = list(ASKED)[1:]
PARAMETERS = {"type": "object", "properties": {"text": {"type": "string"}}}
TOOLS: dict[str, list[Any]] = {
    "/v1/responses": [{"type": "function", "name": "echo", "parameters": PARAMETERS}],
    "/v1/messages": [{"name": "echo", "input_schema": PARAMETERS}],
}

Connect = Callable[..., Any]


async def ask(agent: Agent, path: str, **more: Any) -> bytes:
    headers = more.pop("headers", None)
    body = {"model": "tiny", "seed": 1, **ASKED[path], **more}
    status, answer = await agent.send(body, path=path, headers=headers)
    assert status == 200, answer
    return answer


def parsed(path: str, answer: bytes, stream: bool) -> Any:
    read = {
        ("/v1/responses", False): openai_response,
        ("/v1/responses", True): response_of_stream,
        ("/v1/messages", False): anthropic_message,
        ("/v1/messages", True): message_of_stream,
    }
    return read[path, stream](answer)


def text_of(answer: Any) -> str:
    if hasattr(answer, "output"):
        return str(answer.output_text)
    return "".join(block.text for block in answer.content if block.type == "text")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize("mode", ["plain", "plugin", "synthesise"])
async def test_captured_as_chat_is(
    connect: Connect, engine: StandIn, path: str, stream: bool, mode: str
) -> None:
    engine.routes = mode != "plain"
    engine.plugin = mode == "plugin"
    agent: Agent = await connect()
    chat = json.loads(await ask(agent, "/v1/chat/completions"))
    answer = await ask(agent, path, stream=stream)
    said = parsed(path, answer, stream)
    assert text_of(said) == chat["choices"][0]["message"]["content"]
    assert said.usage.output_tokens == 5
    assert said.usage.input_tokens == chat["usage"]["prompt_tokens"]
    of_chat, trace = await agent.traces()
    assert (trace.meta.missing, trace.meta.status) == ([], "complete")
    assert trace.meta.api == path.removeprefix("/v1/")
    assert trace.meta.streamed is stream
    assert trace.meta.proof.text_matches is True
    for name in ("prompt_ids", "response_ids", "logprobs"):
        assert np.array_equal(getattr(trace, name), getattr(of_chat, name))
    assert (trace.routes is not None) == engine.routes
    assert json.loads(trace.request)["max_tokens"] == 5
    stored = parsed(path, trace.response, False)
    assert stored == said


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", APIS)
async def test_a_tool_call_and_its_result(agent: Agent, path: str, stream: bool) -> None:
    said = parsed(path, await ask(agent, path, tools=TOOLS[path], stream=stream), stream)
    if path == "/v1/responses":
        call = said.output[0]
        assert (call.type, call.name, call.call_id) == ("function_call", "echo", "call-0")
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
        more: dict[str, Any] = {"input": [USER, call.model_dump(exclude_none=True), result]}
    else:
        assert said.stop_reason == "tool_use"
        call = said.content[0]
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "done"}
        again = {"role": "assistant", "content": [call.model_dump(exclude_none=True)]}
        more = {"messages": [USER, again, {"role": "user", "content": [result]}]}
    await ask(agent, path, **more)
    first, second = await agent.traces()
    assert (second.meta.attribution, second.meta.step) == ("prefix", 1)
    assert second.meta.trajectory == first.meta.trajectory


async def test_a_stream_is_not_held_back(agent: Agent, engine: StandIn) -> None:
    for path in APIS:
        engine.hold = asyncio.Event()
        body = {"model": "tiny", **ASKED[path], "stream": True}
        async with agent.http.post(agent.url + path, json=body) as answer:
            line = await answer.content.readline()
            assert line in (b"event: response.created\n", b"event: message_start\n")
            engine.hold.set()
            assert (await answer.read()).endswith(b"\n\n")


@pytest.mark.parametrize("path", APIS)
async def test_errors_have_the_apis_shape(agent: Agent, engine: StandIn, path: str) -> None:
    def error(answer: bytes) -> dict[str, Any]:
        body = json.loads(answer)
        assert body.get("type", "error") == "error"
        found: dict[str, Any] = body["error"]
        return found

    for stream in (False, True):
        body = {"model": "other", **ASKED[path], "stream": stream}
        status, answer = await agent.send(body, path=path)
        assert status == 404
        assert "`other` does not exist" in error(answer)["message"]
    body = {"model": "tiny", **ASKED[path], "tools": [{"type": "web_search", "name": "w"}]}
    status, answer = await agent.send(body, path=path)
    assert status == 400
    assert "'web_search' is not supported" in error(answer)["message"]
    assert error(answer)["type"] == "invalid_request_error"
    assert (await agent.send(b"no json", path=path))[0] == 400
    body = {"model": "tiny", **ASKED[path], "routed_experts_prompt_start": 7}
    assert (await agent.send(body, path=path))[0] == 400
    engine.error_after = 2
    status, answer = await agent.send({"model": "tiny", **ASKED[path], "stream": True}, path=path)
    assert b"event: error\n" in answer
    assert not answer.endswith(b"[DONE]\n\n")
    (cut,) = await agent.traces()
    assert any("boom" in why for why in cut.meta.missing)
    assert {outcome.http_status for outcome in await agent.outcomes()} == {404, None}


@pytest.mark.parametrize("path", APIS)
async def test_a_stream_that_the_engine_cuts_is_cut(
    agent: Agent, engine: StandIn, path: str
) -> None:
    engine.cut_after = 3
    with pytest.raises(aiohttp.ClientPayloadError):
        await agent.send({"model": "tiny", **ASKED[path], "stream": True}, path=path)
    (trace,) = await agent.traces()
    assert trace.meta.status == "partial"
    if path == "/v1/responses":
        assert json.loads(trace.response)["status"] == "in_progress"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", ["plain", "synthesise"])
@pytest.mark.parametrize("path", APIS)
async def test_an_aborted_answer_is_never_told_as_whole(
    connect: Connect, engine: StandIn, monkeypatch: pytest.MonkeyPatch,
    path: str, mode: str, stream: bool,
) -> None:  # fmt: skip
    engine.routes = mode == "synthesise"
    agent: Agent = await connect()
    await ask(agent, path)
    answered, streamed = engine.chat_answer, engine.chat_events
    end, aborted = b'"finish_reason":"length"', b'"finish_reason":"abort"'
    with monkeypatch.context() as patch:
        patch.setattr(engine, "chat_answer", lambda b: answered(b).replace(end, aborted))
        patch.setattr(
            engine, "chat_events", lambda b: [e.replace(end, aborted) for e in streamed(b)]
        )
        body = {"model": "tiny", **ASKED[path], "seed": 2, "stream": stream}
        status, said = await agent.send(body, path="/t/run" + path)
    assert (status, b"ended its answer early (finish_reason 'abort')" in said) == (
        200 if stream else 503,
        True,
    )
    assert b"message_stop" not in said
    assert b"response.completed" not in said
    headers = {"x-stainless-retry-count": "1"}
    assert (await agent.send(body, path="/t/run" + path, headers=headers))[0] == 200
    _, first, again = await agent.traces()
    assert (first.meta.finish_reason, first.meta.missing) == ("abort", [])
    assert first.response_ids is not None
    assert (first.meta.step, again.meta.step, again.meta.retry) == (0, 0, 1)


async def test_count_tokens(agent: Agent, engine: StandIn) -> None:
    path = "/v1/messages/count_tokens"
    body = {"model": "tiny", "messages": [USER]}
    status, answer = await agent.send(body, path=path)
    assert (status, json.loads(answer)) == (200, {"input_tokens": len(engine.render([USER]))})
    status, answer = await agent.send(body | {"model": "other"}, path=path)
    assert (status, json.loads(answer)["error"]["type"]) == (404, "not_found_error")
    assert await agent.traces() == []


@pytest.mark.parametrize("first", [True, False])
async def test_a_later_system_message_stands_where_the_template_takes_it(
    connect: Connect, engine: StandIn, first: bool
) -> None:
    engine.system_first = first
    agent: Agent = await connect(continuation="exact")
    await agent.gateway.upstreams.all[0].ready()
    later = {"role": "system", "content": "plan mode is on"}
    turns: list[Any] = [USER, later, USER]
    merged = [{"role": "system", "content": "be\n\nplan mode is on"}, USER, USER]
    kept = [{"role": "system", "content": "be"}, *turns]
    body = {"model": "tiny", "max_tokens": 5, "system": "be", "messages": turns}
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        assert (await agent.send(body, path=path))[0] == 200
    assert engine.asked["messages"] == (merged if first else kept)
    await ask(agent, "/v1/responses", instructions="be", input=turns)
    assert engine.asked["messages"] == (merged if first else kept)
    (trace, _) = await agent.traces()
    assert json.loads(trace.request)["messages"] == turns


# previous_response_id


async def respond(agent: Agent, text: str, **more: Any) -> Any:
    return openai_response(await ask(agent, "/v1/responses", input=text, **more))


@pytest.mark.parametrize("restart", [False, True])
async def test_a_conversation_by_previous_response(
    connect: Connect, engine: StandIn, restart: bool
) -> None:
    agent: Agent = await connect()
    first = await respond(agent, "one", instructions="be")
    second = await respond(agent, "two", previous_response_id=first.id)
    await agent.flush()
    if restart:
        agent = await connect()
    await respond(agent, "three", previous_response_id=second.id, instructions="so")
    assert engine.asked["messages"] == [
        {"role": "system", "content": "so"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": second.output_text},
        {"role": "user", "content": "three"},
    ]
    traces = await agent.traces()
    assert [(t.meta.step, t.meta.attribution) for t in traces] == [
        (0, "new"),
        (1, "previous_response"),
        (2, "previous_response"),
    ]
    assert len({t.meta.trajectory for t in traces}) == 1


async def test_two_that_go_on_from_one_are_one_trajectory(agent: Agent) -> None:
    first = await respond(agent, "one")
    for text in ("left", "right"):
        await respond(agent, text, previous_response_id=first.id)
    assert [t.meta.step for t in await agent.traces()] == [0, 1, 2]


@pytest.mark.parametrize("restart", [False, True])
async def test_what_was_not_to_be_stored_cannot_be_named(connect: Connect, restart: bool) -> None:
    agent: Agent = await connect()
    first = await respond(agent, "one", store=False)
    await agent.flush()
    if restart:
        agent = await connect()
    for named in (first.id, "resp_nothing", "../../etc"):
        body = {"model": "tiny", "input": "two", "previous_response_id": named}
        status, answer = await agent.send(body, path="/v1/responses")
        assert (status, b"not found" in answer) == (400, True)
    async with agent.http.get(f"{agent.url}/v1/responses/{first.id}") as got:
        assert got.status == 404
    assert len(await agent.traces()) == 1  # traced all the same


async def test_a_response_can_be_read_again(connect: Connect) -> None:
    agent: Agent = await connect()
    first = await respond(agent, "one")
    await agent.flush()
    for reached in (agent, await connect()):
        async with reached.http.get(f"{reached.url}/v1/responses/{first.id}") as got:
            assert openai_response(await got.read()) == first


async def test_redacted_input_is_not_taken_for_the_real_one(connect: Connect) -> None:
    agent: Agent = await connect(redact=["input"])
    first = await respond(agent, "one")
    await agent.flush()
    agent = await connect(redact=["input"])
    body = {"model": "tiny", "input": "two", "previous_response_id": first.id}
    assert (await agent.send(body, path="/v1/responses"))[0] == 400


async def test_a_trajectorys_key_does_not_read_anothers_response(connect: Connect) -> None:
    key, secret = "call-key-0123456789abcdef", "0123456789abcdef" * 2
    agent: Agent = await connect(call_keys=[digest_of(key)], signing_key=secret)
    first = await respond(agent, "one", headers={"x-api-key": key})
    other = TrajectoryKeys(secret).make("other")
    headers = {"Authorization": f"Bearer {other}"}
    body = {"model": "tiny", "input": "two", "previous_response_id": first.id}
    assert (await agent.send(body, path="/v1/responses", headers=headers))[0] == 400
    async with agent.http.get(f"{agent.url}/v1/responses/{first.id}", headers=headers) as got:
        assert got.status == 404


@pytest.mark.parametrize("path", APIS)
async def test_an_unnamed_run_goes_on_after_a_restart(connect: Connect, path: str) -> None:
    agent: Agent = await connect()
    said = text_of(parsed(path, await ask(agent, path), False))
    await agent.flush()
    agent = await connect()
    history = [USER, {"role": "assistant", "content": said}, USER]
    await ask(agent, path, **{"input" if path == "/v1/responses" else "messages": history})
    assert [(t.meta.step, t.meta.attribution) for t in await agent.traces()] == [
        (0, "new"),
        (1, "prefix"),
    ]


@pytest.mark.parametrize("path", APIS)
async def test_strict_records_before_the_end(connect: Connect, path: str) -> None:
    agent: Agent = await connect(durability="strict")
    for stream in (False, True):
        parsed(path, await ask(agent, path, stream=stream), stream)
    assert [t.meta.delivery for t in await agent.traces()] == ["delivered"] * 2


@pytest.mark.parametrize("mode", ["plain", "synthesise"])
async def test_an_error_page_becomes_an_error_of_the_agents_api(
    connect: Connect, engine: StandIn, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    engine.routes = True
    agent: Agent = await connect(streaming_routes=mode)
    await ask(agent, "/v1/messages")

    def page(*_: Any) -> web.Response:
        return web.Response(status=502, text="<html>Bad Gateway</html>", content_type="text/html")

    monkeypatch.setattr(engine, "error", page)
    engine.status = 502
    body = {"model": "tiny", "messages": [USER], "max_tokens": 5, "stream": True}
    async with agent.http.post(agent.url + "/v1/messages", json=body) as answer:
        assert (answer.status, answer.content_type) == (502, "application/json")
        assert "Bad Gateway" in (await answer.json())["error"]["message"]

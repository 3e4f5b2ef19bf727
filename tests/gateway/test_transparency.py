"""The agent's answer is the engine's: direct and proxied are compared byte for byte."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from driftgate.trace import Trace

if TYPE_CHECKING:
    from tests.gateway.conftest import Agent, StandIn

TOOLS = [{"type": "function", "function": {"name": "echo", "parameters": {"type": "object"}}}]

CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "seed": 3,
}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "once upon", "seed": 3}

CHAT_EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two choices": {"n": 2},
    "tools": {"tools": TOOLS},
    "tools, two choices": {"tools": TOOLS, "n": 2},
    "logprobs off": {"logprobs": False},
    "logprobs": {"logprobs": True},
    "top logprobs": {"logprobs": True, "top_logprobs": 2},
    "top logprobs null": {"logprobs": True, "top_logprobs": None},
    "ids": {"return_token_ids": True},
    "ids off": {"return_token_ids": False},
    "ids and tools": {"return_token_ids": True, "tools": TOOLS},
    "all": {"return_token_ids": True, "logprobs": True, "top_logprobs": 1, "n": 2},
    "echo": {"echo": True},
    "echo, top logprobs null": {"echo": True, "top_logprobs": None},
    "echo, logprobs, top logprobs null": {"echo": True, "logprobs": True, "top_logprobs": None},
    "echo, prompt logprobs": {"echo": True, "prompt_logprobs": 1},
    "echo, both": {"echo": True, "prompt_logprobs": 1, "top_logprobs": None},
    "no tokens named": {"logprob_token_ids": []},
}

TEXT_EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two choices": {"n": 2},
    "logprobs": {"logprobs": 0},
    "top logprobs": {"logprobs": 2},
    "ids": {"return_token_ids": True},
    "two prompts": {"prompt": ["a", "bc"], "n": 2},
    "token ids": {"prompt": [5, 6, 7]},
    "tokens named": {"logprobs": 0, "logprob_token_ids": [5, 6]},
    "no tokens named": {"logprob_token_ids": []},
}


def statuses(traces: list[Trace]) -> list[str]:
    return [trace.meta.status for trace in traces]


@pytest.mark.parametrize("routes", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("extra", CHAT_EXTRAS.values(), ids=CHAT_EXTRAS)
async def test_json_chat_is_the_engines(
    agent: Agent, engine: StandIn, extra: dict[str, Any], routes: bool
) -> None:
    engine.routes = routes
    direct, proxied = await agent.both(CHAT | extra)
    assert proxied == direct
    assert statuses(await agent.traces()) == ["complete"] * extra.get("n", 1)


@pytest.mark.parametrize("usage", [False, True], ids=["no usage", "usage"])
@pytest.mark.parametrize("extra", CHAT_EXTRAS.values(), ids=CHAT_EXTRAS)
async def test_streamed_chat_is_the_engines(
    agent: Agent, extra: dict[str, Any], usage: bool
) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    direct, proxied = await agent.both(CHAT | extra | {"stream": True} | options)
    assert proxied == direct
    assert statuses(await agent.traces()) == ["complete"] * extra.get("n", 1)


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
@pytest.mark.parametrize("extra", TEXT_EXTRAS.values(), ids=TEXT_EXTRAS)
async def test_completions_are_the_engines(
    agent: Agent, extra: dict[str, Any], stream: bool
) -> None:
    direct, proxied = await agent.both(TEXT | extra | {"stream": stream}, path="/v1/completions")
    assert proxied == direct
    prompts = 2 if extra.get("prompt") == ["a", "bc"] else 1
    assert statuses(await agent.traces()) == ["complete"] * extra.get("n", 1) * prompts


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
async def test_what_is_captured_is_what_the_engine_sampled(
    agent: Agent, engine: StandIn, stream: bool
) -> None:
    body = CHAT | {"logprobs": False, "n": 2, "stream": stream}
    await agent.send(body)
    for choice, trace in enumerate(await agent.traces()):
        ids, texts, logprobs = engine.sample(body, choice)
        assert trace.prompt_ids is not None
        assert trace.response_ids is not None
        assert trace.token_offsets is not None
        assert trace.prompt_ids.tolist() == engine.render(CHAT["messages"])
        assert trace.response_ids.tolist() == ids
        np.testing.assert_array_equal(trace.logprobs, np.array(logprobs, np.float32))
        bounds = trace.token_offsets.tolist()
        pieces = [trace.token_bytes[a:b].decode() for a, b in itertools.pairwise(bounds)]
        assert pieces == texts
        assert trace.meta.proof.text_matches is True
        assert json.loads(trace.request) == body
        assert json.loads(trace.response)["message"]["content"] == "".join(texts)


async def test_unknown_fields_and_spelling_reach_the_engine(agent: Agent, engine: StandIn) -> None:
    body = (
        b'{"model":"tiny", "messages":[{"role":"user","content":"\\u00e9"}],'
        b'"temperature":1.50,"x":{"a" : 1e0}}'
    )
    await agent.send(body)
    sent = engine.bodies[-1]
    assert b'"temperature":1.50' in sent
    assert b'"x":{"a" : 1e0}' in sent
    assert b'"content":"\\u00e9"' in sent


async def test_headers_pass_both_ways_without_ours(agent: Agent, engine: StandIn) -> None:
    headers = {"Authorization": "Bearer mine", "X-Mine": "1", "x-driftgate-trajectory": "t"}
    url = agent.url + "/v1/chat/completions"
    async with agent.http.post(url, json=CHAT, headers=headers) as answer:
        assert answer.headers["X-Engine"] == "yes"
    assert engine.headers[-1]["Authorization"] == "Bearer mine"
    assert engine.headers[-1]["X-Mine"] == "1"
    assert engine.headers[-1]["Accept-Encoding"] == "identity"
    assert "x-driftgate-trajectory" not in engine.headers[-1]


@pytest.mark.parametrize(
    "extra",
    [{"top_logprobs": 2}, {"model": "other"}, {"n": 0, "model": None}],
    ids=["top_logprobs alone", "unknown model", "no model"],
)
async def test_what_the_engine_refuses_is_refused_by_it(
    agent: Agent, extra: dict[str, Any]
) -> None:
    direct, proxied = await agent.both(CHAT | extra)
    assert proxied == direct
    assert [outcome.status for outcome in await agent.outcomes()] == ["failed"]


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
async def test_tokens_that_are_named_without_logprobs_are_refused_by_the_engine(
    agent: Agent, stream: bool
) -> None:
    for body, path in ((CHAT, "/v1/chat/completions"), (TEXT, "/v1/completions")):
        named = body | {"logprob_token_ids": [5, 6], "stream": stream}
        assert (await agent.send(named, path=path))[0] == 400
        direct, proxied = await agent.both(named, path=path)
        assert proxied == direct


async def test_malformed_json_gets_the_engines_answer(agent: Agent) -> None:
    status, direct = await agent.send(b'{"model": ', direct=True)
    assert (status, direct) == await agent.send(b'{"model": ')
    (outcome,) = await agent.outcomes()
    assert outcome.http_status == 400


async def test_the_prompt_start_field_is_refused(agent: Agent, engine: StandIn) -> None:
    status, answer = await agent.send(CHAT | {"routed_experts_prompt_start": 4})
    assert status == 400
    assert "routed_experts_prompt_start" in json.loads(answer)["error"]["message"]
    assert engine.bodies == []
    for unset in (0, False, None):
        status, _ = await agent.send(CHAT | {"routed_experts_prompt_start": unset})
        assert status == 200

"""What storage holds after a call through the gateway is what the engine gives to a direct call."""

from __future__ import annotations

import base64
import io
import json
import operator
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from driftgate.testing.engine import EngineProcess
from driftgate.tops import alternatives
from driftgate.trace import Trace
from tests.e2e.support import Proxied, ask, proxy, without_identity

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

PROMPTS = 20
ASK = {"logprobs": True, "top_logprobs": 0, "return_token_ids": True}
"""What the gateway asks for on the agent's behalf, asked for directly."""

FORMS: dict[str, dict[str, Any]] = {"json": {}, "sse": {"stream": True}, "n=2": {"n": 2}}


@pytest.fixture(params=["dense", "moe"])
async def proxied(
    request: pytest.FixtureRequest, engines: dict[str, EngineProcess], tmp_path: Path
) -> AsyncIterator[Proxied]:
    async with proxy(engines[request.param], tmp_path / "store") as running:
        yield running


def body(engine: EngineProcess, number: int, **more: Any) -> dict[str, Any]:
    question = f"Prompt number {number}: " + "tell me more about it. " * (number % 5)
    return {
        "model": engine.model,
        "messages": [{"role": "user", "content": question}],
        "seed": number,
        "temperature": 1.0,
        "max_tokens": 24,
        **more,
    }


def said(answer: Any) -> Any:
    """An answer without its identity; a stream's chunks are joined per choice, key by key.

    vLLM puts the tokens that are ready into one chunk, so where the chunks are cut depends on
    timing: texts, logprobs and ids are joined, and every other value stays as each chunk has it.
    """
    answer = without_identity(answer)
    if isinstance(answer, dict):
        return answer
    choices: dict[int, dict[str, Any]] = {}
    rest: dict[str, set[str]] = {}
    for chunk in answer:
        for choice in chunk.pop("choices"):
            join(choices.setdefault(choice["index"], {}), choice)
        for key, value in chunk.items():
            rest.setdefault(key, set()).add(json.dumps(value))
    return choices, rest


def join(into: dict[str, Any], value: dict[str, Any]) -> None:
    """Add a chunk's object: strings and lists are joined, objects gone into, the last else kept."""
    for key, new in value.items():
        old = into.get(key)
        if isinstance(new, dict):
            if not isinstance(old, dict):
                into[key] = {}
            join(into[key], new)
        elif key == "tool_calls":
            for call in new:
                join(into.setdefault(key, {}).setdefault(call["index"], {}), call)
        elif isinstance(new, (str, list)) and isinstance(old, type(new)):
            into[key] = operator.add(old, new)
        elif new is not None or key not in into:
            into[key] = new


def engine_arrays(answer: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    """What a direct JSON answer says of one choice, as arrays."""
    rows = choice["logprobs"]["content"]
    routes = choice["routed_experts"]
    return {
        "prompt_ids": np.array(answer["prompt_token_ids"], np.int32),
        "response_ids": np.array(choice["token_ids"], np.int32),
        "logprobs": np.array([row["logprob"] for row in rows], np.float32),
        "token_bytes": b"".join(bytes(row["bytes"]) for row in rows),
        "routes": routes and np.load(io.BytesIO(base64.b64decode(routes)), allow_pickle=False),
    }


def tries(payload: dict[str, Any]) -> range:
    """How often both sides may be asked until they agree.

    Which of two samples enters the first batch is a matter of timing, and a batch of two rounds
    otherwise than two of one: now and then even two direct calls with n = 2 differ.
    """
    return range(4 if payload.get("n", 1) > 1 else 1)


def differences(trace: Trace, expected: dict[str, Any]) -> list[str]:
    """What of a trace is not what the engine's direct answer says, bit for bit."""
    different = []
    for name, value in expected.items():
        stored = getattr(trace, name)
        if isinstance(value, np.ndarray):
            same = stored.dtype == value.dtype and np.array_equal(stored, value)
        else:
            same = stored == value
        different += [] if same else [name]
    return different


@pytest.mark.parametrize("form", FORMS)
async def test_traces_hold_what_a_direct_call_returns(proxied: Proxied, form: str) -> None:
    n = FORMS[form].get("n", 1)
    for number in range(PROMPTS):  # one at a time: in a mixed batch the engine rounds differently
        payload = body(proxied.engine, number, n=n)
        for attempt in tries(payload):
            name = f"{form}-{number}-{attempt}"
            direct = await ask(proxied.http, f"{proxied.engine.url}/v1", payload | ASK)
            await proxied.call(name, payload | FORMS[form])
            traces = proxied.traces(name)
            assert len(traces) == n
            assert all(trace.meta.missing == [] for trace in traces)
            assert all(trace.meta.status == "complete" for trace in traces)
            different = [
                differences(trace, engine_arrays(direct, choice))
                for trace, choice in zip(traces, direct["choices"], strict=True)
            ]
            if not any(different):
                break
        assert not any(different), (name, different)


AGENTS: dict[str, dict[str, Any]] = {
    "nothing asked": {},
    "logprobs switched off": {"logprobs": False},
    "logprobs asked": {"logprobs": True, "top_logprobs": 2},
    "token ids asked": {"return_token_ids": True},
    "two answers": {"n": 2},
    "stop string": {"stop": ["e"]},
    "structured": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "pick",
                "schema": {"type": "object", "properties": {"x": {"enum": [1, 2]}},
                           "required": ["x"], "additionalProperties": False},
            },
        }
    },
    "forced tool": {
        "tools": [
            {"type": "function", "function": {"name": "pick", "parameters": {
                "type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"],
                "additionalProperties": False}}}
        ],
        "tool_choice": {"type": "function", "function": {"name": "pick"}},
        "max_tokens": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
@pytest.mark.parametrize("agent", AGENTS)
async def test_the_agent_gets_the_engines_own_answer(
    proxied: Proxied, agent: str, stream: bool
) -> None:
    payload = body(proxied.engine, 7, stream=stream, **AGENTS[agent])
    for _ in tries(payload):
        direct = await ask(proxied.http, f"{proxied.engine.url}/v1", payload)
        through = await proxied.call("agent", payload)
        if said(through) == said(direct):
            break
    assert said(through) == said(direct)
    for trace in proxied.traces("agent"):
        assert trace.meta.missing == []
        assert trace.logprobs is not None
        likely = alternatives(trace.response, tokens=trace.response_ids)
        assert {len(row) for row in likely or ()} == {2} & {AGENTS[agent].get("top_logprobs")}
        if likely is not None:  # the first is at least as likely as what was sampled
            pairs = zip(likely, trace.logprobs, strict=True)
            assert all(row[0].logprob >= value - 1e-5 for row, value in pairs)


async def test_usage_comes_on_a_stream_only_if_asked(proxied: Proxied) -> None:
    url = f"{proxied.url}/t/usage/v1"
    payload = body(proxied.engine, 3, stream=True)
    assert not any("usage" in chunk for chunk in await ask(proxied.http, url, payload))
    asked = payload | {"stream_options": {"include_usage": True}}
    direct = await ask(proxied.http, f"{proxied.engine.url}/v1", asked)
    through = await ask(proxied.http, url, asked)
    assert through[-1]["usage"] == direct[-1]["usage"]
    assert said(through) == said(direct)


async def test_completions_of_token_ids_extend_exactly(proxied: Proxied) -> None:
    ids = [5, 6, 7, 8]
    for step in range(3):
        payload = {"model": proxied.engine.model, "prompt": ids, "max_tokens": 8, "seed": step,
                   "temperature": 1.0, "return_token_ids": True}  # fmt: skip
        async with proxied.http.post(
            f"{proxied.url}/t/tokens/v1/completions", json=payload
        ) as reply:
            choice = (await reply.json())["choices"][0]
        assert choice["prompt_token_ids"] == ids
        ids = ids + choice["token_ids"] + [9, 10]
    traces = proxied.traces("tokens")
    assert [trace.meta.prefix_exact for trace in traces] == [False, True, True]
    assert traces[2].prompt_ids is not None
    assert traces[2].meta.prefix_len == len(traces[2].prompt_ids) - 2
    assert all(trace.meta.missing == [] for trace in traces)

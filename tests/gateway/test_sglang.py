"""SGLang's shapes, on answers written from its public sources, which ``adapters/sglang.py`` names:
no live server was asked."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from driftgate.adapters.engines import adapter_for
from driftgate.adapters.sglang import Sglang
from driftgate.gateway.capture import fold_answer
from driftgate.gateway.flags import cache_flags, read_info
from driftgate.gateway.openai import read_request, rewrite, strip_answer
from driftgate.gateway.probe import probe
from driftgate.trace import WeightSpan
from tests.gateway.conftest import Agent, StandIn, start
from tests.gateway.sdk_shapes import anthropic_message, message_of_stream

Connect = Callable[..., Any]

LAYERS, K = 2, 2
SHAPED = Sglang((LAYERS, K))
PROMPT, IDS = [5, 6, 7], [1000, 1001, 1002, 1003]
TEXTS, VALUES = ["Hel", "lo", " wor", "ld"], [-0.5, -0.25, -1.0, -2.0]
ROWS = len(PROMPT) + len(IDS) - 1
ROUTES = np.arange(ROWS * LAYERS * K, dtype="<i4").reshape(ROWS, LAYERS, K) % 16
TOP = {"a": -1.0, "b": -2.0}
SPANS = [{"version": "41", "start": 0, "end": 3}, {"version": "42", "start": 3, "end": 4}]
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "temperature": 0.7,
}


def meta_info() -> dict[str, Any]:
    rows = [[lp, i, None] for lp, i in zip(VALUES, IDS, strict=True)]
    return {
        "id": "r1",
        "finish_reason": {"type": "length", "length": 4},
        "prompt_tokens": len(PROMPT),
        "completion_tokens": len(IDS),
        "weight_version": "42",
        "weight_versions": SPANS,
        "output_token_logprobs": rows,
        "routed_experts": base64.b64encode(ROUTES.tobytes()).decode(),
    }


def answer(body: dict[str, Any], *, old: bool = False) -> dict[str, Any]:
    """As ``ChatCompletionResponse`` is written: what was not asked for has no key.

    ``old``: a server that does not know ``return_token_ids`` yet.
    """
    top = [{"token": t, "bytes": list(t.encode()), "logprob": v} for t, v in TOP.items()]
    rows = [
        {
            "token": t,
            "bytes": list(t.encode()),
            "logprob": v,
            "top_logprobs": top[: body.get("top_logprobs") or 0],
        }
        for t, v in zip(TEXTS, VALUES, strict=True)
    ]
    choice: dict[str, Any] = {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "Hello world",
            "reasoning_content": None,
            "tool_calls": None,
        },
        "logprobs": {"content": rows} if body.get("logprobs") else None,
        "finish_reason": "length",
        "matched_stop": None,
    }
    if body.get("return_prompt_token_ids") or (body.get("return_token_ids") and not old):
        choice["prompt_token_ids"] = PROMPT
    if body.get("return_token_ids") and not old:
        choice["token_ids"] = IDS
    if body.get("return_meta_info"):
        choice["meta_info"] = meta_info()
    said: dict[str, Any] = {
        "id": "r1",
        "object": "chat.completion",
        "created": 7,
        "model": "tiny",
        "choices": [choice],
        "usage": {
            "prompt_tokens": 3,
            "total_tokens": 7,
            "completion_tokens": 4,
            "prompt_tokens_details": None,
            "reasoning_tokens": 0,
        },
        "metadata": {"weight_version": "42", "weight_versions": SPANS},
    }
    if body.get("return_routed_experts"):
        said["sglext"] = {"routed_experts": meta_info()["routed_experts"]}
    return said


def asked(body: dict[str, Any], adapter: Sglang = SHAPED) -> tuple[dict[str, Any], Any]:
    sent, plan = rewrite("chat", read_request(json.dumps(body).encode()), adapter, "synthesise")
    assert sent is not None
    return json.loads(sent), plan


def test_what_is_asked_for() -> None:
    body, plan = asked(CHAT | {"stream": True, "stream_options": {"include_usage": True}})
    more = {
        "return_token_ids",
        "return_prompt_token_ids",
        "return_meta_info",
        "return_routed_experts",
    }
    assert {name for name in body if body[name] is True} == more | {"logprobs"}
    assert (body["stream"], "stream_options" in body) == (False, False)  # chat streams refuse them
    assert (plan.mode, plan.stream) == ("synthesise", True)
    assert "return_routed_experts" not in asked(CHAT, Sglang())[0]  # nothing could shape them


@pytest.mark.parametrize("old", [False, True])
def test_an_answer_becomes_a_trace(old: bool) -> None:
    body, plan = asked(CHAT)
    raw = json.dumps(answer(body, old=old), separators=(",", ":")).encode()
    (sample,) = fold_answer(raw, plan, SHAPED, expect_routes=True).samples
    assert sample.missing == []
    assert sample.prompt_ids is not None
    assert sample.prompt_ids.tolist() == PROMPT
    assert sample.response_ids is not None
    assert sample.response_ids.tolist() == IDS
    assert sample.logprobs is not None
    np.testing.assert_array_equal(sample.logprobs, np.array(VALUES, np.float32))
    assert sample.routes is not None
    np.testing.assert_array_equal(sample.routes, ROUTES)
    assert sample.weight_spans == [WeightSpan(0, "41"), WeightSpan(3, "42")]
    assert sample.proof.text_matches is True
    assert b"meta_info" not in sample.response


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"return_meta_info": True},
        {"return_prompt_token_ids": True},
        {"return_token_ids": True},
        {"logprobs": True},
        {"return_routed_experts": True},
    ],
)
def test_the_agent_gets_what_it_asked_for_and_no_key_more(own: dict[str, Any]) -> None:
    body, plan = asked(CHAT | own)
    stripped = strip_answer(json.dumps(answer(body)).encode(), plan)
    assert json.loads(stripped.body) == answer(CHAT | own)


def test_a_version_of_the_last_token_alone_is_no_span() -> None:
    said = answer(asked(CHAT)[0])
    del said["choices"][0]["meta_info"]["weight_versions"]
    (sample,) = fold_answer(
        json.dumps(said).encode(), asked(CHAT)[1], SHAPED, expect_routes=True
    ).samples
    assert sample.weight_spans == []


def test_routes_of_another_size_are_refused() -> None:
    encoded = base64.b64encode(ROUTES[:-1].tobytes())
    with pytest.raises(ValueError, match=r"int32 \[6, 2, 2\]"):
        SHAPED.decode_routes(encoded, prompt_len=3, response_len=4)
    with pytest.raises(ValueError, match="not known"):
        Sglang().decode_routes(encoded, prompt_len=3, response_len=4)


def test_flags_that_change_numbers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": LAYERS, "num_experts_per_tok": K})
    )
    said = {
        "version": "0.5.13", "dtype": "bfloat16", "tp_size": 4, "quantization": None,
        "enable_return_routed_experts": True, "host": "10.0.0.1", "api_key": "secret",
    }  # fmt: skip
    info = read_info(said, str(tmp_path))
    assert info == ("0.5.13", {"dtype": "bfloat16", "tp": "4"}, (LAYERS, K))
    assert read_info(said, None).route_shape is None
    metrics = (
        b'# HELP x\nvllm:cache_config_info{block_size="16",cache_dtype="fp8",engine="0"} 1.0\n'
    )
    assert cache_flags(metrics) == {"kv_block_size": "16", "kv_cache_dtype": "fp8"}
    assert cache_flags(b"") == {}


# Over real sockets, before a server that was written from the same sources.


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[str]:
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": LAYERS, "num_experts_per_tok": K})
    )

    async def chat(request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("stream"):
            return web.json_response({"object": "error", "message": "no streams"}, status=400)
        said = answer(body)
        if body.get("stop"):
            said["choices"][0] |= {"finish_reason": "stop", "matched_stop": body["stop"][0]}
        return web.json_response(said)

    async def models(_request: web.Request) -> web.Response:
        entry = {"id": "tiny", "object": "model", "owned_by": "sglang", "root": str(tmp_path)}
        return web.json_response({"object": "list", "data": [entry]})

    async def info(_request: web.Request) -> web.Response:
        flags = {"version": "0.5.13", "dtype": "auto", "enable_return_routed_experts": True}
        return web.json_response(flags)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/get_server_info", info)
    runner, url = await start(app)
    yield url
    await runner.cleanup()


async def test_the_probe_knows_it(server: str) -> None:
    report = await probe(server)
    assert (report.engine, report.version) == ("sglang", "0.5.13")
    assert report.adapter is adapter_for("sglang", (LAYERS, K))
    assert report.captures
    assert report.routes
    assert report.logprobs_mode == "raw_logprobs"  # the stand-in ignores the temperature
    assert report.flags == {"dtype": "auto"}


async def test_its_documented_convention_is_taken_where_the_probe_cannot_tell(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOP, "b", TOP["a"])
    assert (await probe(server)).logprobs_mode == "processed_logprobs"


async def test_a_streaming_agent_is_captured_whole(
    server: str, connect: Connect, engine: StandIn
) -> None:
    agent: Agent = await connect(upstream=server)
    status, raw = await agent.send(CHAT | {"stream": True})
    assert status == 200
    chunks = [json.loads(e[6:]) for e in raw.split(b"\n\n") if e.startswith(b"data: {")]
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
    assert text == "Hello world"
    assert b"meta_info" not in raw
    assert b"sglext" not in raw
    (trace,) = await agent.traces()
    assert (trace.meta.status, trace.meta.routes_via) == ("complete", "synthesised")
    assert trace.meta.engine.name == "sglang"
    assert trace.meta.weight_version == "41+42"


@pytest.mark.parametrize("stream", [False, True])
async def test_messages_say_the_stop_sequence_and_the_prompts_tokens(
    server: str, connect: Connect, stream: bool
) -> None:
    agent: Agent = await connect(upstream=server)
    body = CHAT | {"max_tokens": 9, "stop_sequences": ["STOP"], "stream": stream}
    status, raw = await agent.send(body, path="/v1/messages")
    message = (message_of_stream if stream else anthropic_message)(raw)
    assert (status, message.stop_reason, message.stop_sequence) == (200, "stop_sequence", "STOP")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (3, 4)
    if stream:
        assert b'"usage":{"input_tokens":3,"output_tokens":0}' in raw.split(b"\n\n")[0]


async def test_a_written_stream_has_its_name_for_the_stop(server: str, connect: Connect) -> None:
    agent: Agent = await connect(upstream=server)
    _, raw = await agent.send(CHAT | {"stream": True, "stop": ["STOP"]})
    assert b'"matched_stop":"STOP"' in raw


async def test_exact_continuation_goes_the_ordinary_way(server: str, connect: Connect) -> None:
    agent: Agent = await connect(upstream=server, continuation="exact")
    said = {"role": "assistant", "content": "Hello world"}
    for messages in (CHAT["messages"], [*CHAT["messages"], said, *CHAT["messages"]]):
        assert (await agent.send(CHAT | {"messages": messages}, path="/t/run/v1/chat/completions"))[
            0
        ] == 200
    _, second = await agent.traces()
    assert second.meta.continuation is not None
    assert second.meta.continuation.way == "ordinary"
    assert second.meta.continuation.reason == "sglang: its chat completions take no token ids"

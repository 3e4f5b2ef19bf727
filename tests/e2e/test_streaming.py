"""Routed experts of a streaming MoE agent: by the plugin, by a stream of our own, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import aiohttp
import numpy as np
import pytest
from openai import AsyncOpenAI

from driftgate.gateway.openai import Plan
from driftgate.gateway.sse import Splitter
from driftgate.gateway.tape import Tape
from driftgate.testing.engine import EngineProcess
from tests.e2e.rollouts import question
from tests.e2e.support import CHAT, Proxied, ask, proxy

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

ASKED: dict[str, Any] = {"seed": 5, "n": 2, "max_tokens": 16}


async def streamed(proxied: Proxied) -> dict[int, str]:
    """What the OpenAI SDK makes of a stream: the text of each choice."""
    texts: dict[int, str] = {}
    finished: dict[int, str] = {}
    asked = question(proxied.engine, **ASKED)
    ignore_eos = asked.pop("ignore_eos")
    async with AsyncOpenAI(base_url=f"{proxied.url}/t/s/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            stream=True, extra_body={"ignore_eos": ignore_eos}, **asked
        )
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
                if choice.finish_reason is not None:
                    finished[choice.index] = choice.finish_reason
    assert finished == {0: "length", 1: "length"}
    return texts


@pytest.mark.parametrize("mode", ["plugin", "synthesise"])
async def test_a_stream_has_the_text_and_the_trace_has_the_routes(
    engines: dict[str, EngineProcess], tmp_path: Path, mode: Literal["plugin", "synthesise"]
) -> None:
    async with proxy(engines["moe"], tmp_path, streaming_routes=mode) as proxied:
        direct = await ask(
            proxied.http, f"{proxied.engine.url}/v1", question(proxied.engine, **ASKED)
        )
        texts = await streamed(proxied)
        whole = await proxied.call("json", question(proxied.engine, **ASKED))
    assert texts == {c["index"]: c["message"]["content"] for c in direct["choices"]}
    assert whole["choices"] == direct["choices"]
    for stream, json in zip(proxied.traces("s"), proxied.traces("json"), strict=True):
        assert stream.meta.missing == []
        assert (stream.meta.streamed, stream.meta.routes_via) == (
            True,
            {"plugin": "plugin", "synthesise": "synthesised"}[mode],
        )
        assert stream.routes is not None
        assert json.routes is not None
        assert np.array_equal(stream.routes, json.routes)
        assert stream.logprobs is not None
        assert json.logprobs is not None
        assert np.array_equal(stream.logprobs, json.logprobs)


async def test_a_stream_without_routes_says_so(
    engines: dict[str, EngineProcess], tmp_path: Path
) -> None:
    async with proxy(engines["moe"], tmp_path, streaming_routes="off") as proxied:
        await streamed(proxied)
    for trace in proxied.traces("s"):
        assert trace.routes is None
        assert trace.logprobs is not None
        assert any(word.startswith("routed_experts: ") for word in trace.meta.missing)


async def test_the_plugin_is_found_by_the_probe(
    engines: dict[str, EngineProcess], tmp_path: Path
) -> None:
    async with proxy(engines["moe"], tmp_path) as proxied:
        await streamed(proxied)
        async with proxied.http.get(f"{proxied.url}/readyz") as answer:
            engine = (await answer.json())["engine"]
    assert (engine["routes"], engine["streaming_routes"]) == (True, True)
    assert engine["logprobs_mode"] == "raw_logprobs"
    assert {trace.meta.routes_via for trace in proxied.traces("s")} == {"plugin"}


async def test_the_engines_events_have_the_form_that_is_read_fast(
    engines: dict[str, EngineProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new engine version that writes them otherwise is still captured, four times slower."""
    asked = question(engines["moe"], **ASKED) | {
        "stream": True,
        "logprobs": True,
        "top_logprobs": 0,
        "return_token_ids": True,
    }
    url = f"{engines['moe'].url}/v1/{CHAT}"
    async with aiohttp.ClientSession() as http, http.post(url, json=asked) as answer:
        events = Splitter().feed(await answer.read())
    parsed = list[bytes]()
    parse = Tape._take_other

    def counted(self: Tape, event: bytes) -> bytes | None:
        parsed.append(event)
        return parse(self, event)

    monkeypatch.setattr(Tape, "_take_other", counted)
    tape = Tape(Plan(api="chat", stream=True), limit_bytes=1 << 30)
    for event in events:
        tape.take(event)
    assert len(events) > 2 * 8
    # Of each choice its role and its end, then [DONE].
    assert len(parsed) <= 2 * 2 + 1, parsed

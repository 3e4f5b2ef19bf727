"""The probe says what an engine gives, and how to switch on what is missing."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from aiohttp import web

from driftgate.errors import UpstreamError
from driftgate.facts import NEUTRAL_DEFAULTS
from driftgate.gateway.generation_config import sampling_defaults
from driftgate.gateway.probe import ProbeReport, probe
from driftgate.gateway.probe_answers import logprobs_mode
from driftgate.trace import LogprobsMode
from tests.gateway.test_upstream import serving

if TYPE_CHECKING:
    from tests.gateway.conftest import StandIn


async def test_a_dense_engine(engine: StandIn) -> None:
    report = await probe(engine.url)
    assert (report.engine, report.version, report.model) == ("vllm", "0.29.0", "tiny")
    assert report.system_fingerprint == engine.fingerprint
    assert report.models[0].max_model_len == 4096
    assert report.captures
    assert report.logprobs_mode == "raw_logprobs"
    assert not report.routes
    (note,) = report.notes
    assert "--enable-return-routed-experts" in note


async def test_a_moe_engine_with_and_without_the_plugin(engine: StandIn) -> None:
    engine.routes = True
    bare = await probe(engine.url)
    assert (bare.routes, bare.streaming_routes) == (True, False)
    assert "plugin" in bare.notes[0]
    engine.plugin = True
    assert (await probe(engine.url)).notes == []


async def test_processed_logprobs_are_seen(engine: StandIn) -> None:
    engine.logprobs_scale = lambda temperature: 1 / temperature
    assert (await probe(engine.url)).logprobs_mode == "processed_logprobs"


async def test_an_unknown_model_and_no_engine(engine: StandIn) -> None:
    with pytest.raises(UpstreamError, match="not 'other'"):
        await probe(engine.url, model="other")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UpstreamError, match="no engine answers at"):
            await probe(f"http://127.0.0.1:{unused.getsockname()[1]}")
    with pytest.raises(UpstreamError, match="no engine answers at"):
        await probe("http://127.0.0.1:99999")


def test_defaults_are_read_from_the_model(tmp_path: Path) -> None:
    neutral = dict(NEUTRAL_DEFAULTS)
    assert sampling_defaults(tmp_path) == neutral
    config = tmp_path / "generation_config.json"
    config.write_text('{"temperature": 0.6, "top_k": 20, "top_p": null, "do_sample": true}')
    assert sampling_defaults(tmp_path) == neutral | {"temperature": 0.6, "top_k": 20.0}
    for broken in ("{", "[]"):
        config.write_text(broken)
        assert sampling_defaults(tmp_path) is None


async def test_defaults_become_settings_where_they_are_known(engine: StandIn) -> None:
    report = await probe(engine.url)
    assert (report.sampling_defaults, report.default_settings) == (None, {})  # /nowhere
    known = msgspec.structs.replace(report, sampling_defaults={"top_k": 20.0, "min_p": 0.05})
    assert known.default_settings == {"default_top_k": "20", "default_min_p": "0.05"}


def softmax_logs(logits: dict[str, float], temperature: float) -> dict[str, float]:
    scaled = {token: value / temperature for token, value in logits.items()}
    total = math.log(sum(math.exp(value) for value in scaled.values()))
    return {token: value - total for token, value in scaled.items()}


LOGITS = {"a": 3.0, "b": 2.0, "c": 0.5}


@pytest.mark.parametrize(
    ("warm", "cold", "mode"),
    [
        (softmax_logs(LOGITS, 1), softmax_logs(LOGITS, 1), "raw_logprobs"),
        (softmax_logs(LOGITS, 1), softmax_logs(LOGITS, 0.25), "processed_logprobs"),
        (LOGITS, LOGITS, "raw_logits"),
        (LOGITS, {token: 4 * value for token, value in LOGITS.items()}, "processed_logits"),
        ({"a": -0.7, "b": -0.7}, {"a": -0.7, "b": -0.7}, "unknown"),
        ({"a": -0.1}, {"a": -0.1}, "unknown"),
        ({}, {}, "unknown"),
    ],
)
def test_logprobs_mode(warm: dict[str, float], cold: dict[str, float], mode: LogprobsMode) -> None:
    assert logprobs_mode(warm, cold) == mode


async def test_a_new_engine_behind_the_same_address_is_probed_again(
    connect: Callable[..., Any], engine: StandIn
) -> None:
    agent = await connect()
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    await agent.send(chat)
    engine.fingerprint = "vllm-0.30.0-other"
    await agent.send(chat)
    first, second = [trace.meta.engine for trace in await agent.traces()]
    assert (first.name, first.version, first.logprobs_mode) == ("vllm", "0.29.0", "raw_logprobs")
    assert first.system_fingerprint == "vllm-0.29.0-standin"
    assert second.system_fingerprint == "vllm-0.30.0-other"
    assert first.digest != second.digest
    while agent.gateway.upstreams.all[0].report.system_fingerprint != "vllm-0.30.0-other":
        await agent.send(chat)


# Fields of other types than they should have.

ROW = {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "a", "logprob": -0.5}]}
CHOICE: dict[str, Any] = {"token_ids": [7], "logprobs": {"content": [ROW]}}
EVENT = b'data: {"choices":[{"token_ids":[7],"logprobs":{"content":[]}}]}\n\n'


async def odd(answer: dict[str, Any], stream: bytes = EVENT) -> ProbeReport:
    """The report of an engine that answers the probe like this."""

    def chat(body: dict[str, Any]) -> web.Response:
        if body.get("stream"):
            return web.Response(body=stream, content_type="text/event-stream")
        return web.json_response({"prompt_token_ids": [1], "choices": [CHOICE]} | answer)

    async with serving(chat) as url:
        return await probe(url)


@pytest.mark.parametrize("choices", [[None], {"0": CHOICE}, [], None, 3])
async def test_a_choice_that_is_none_is_absent(choices: Any) -> None:
    report = await odd({"choices": choices})
    assert (report.answered, report.token_ids, report.logprobs) == (True, False, False)
    assert report.notes[0] == "A chat completion holds no choice that can be read."


@pytest.mark.parametrize("logprobs", [[-0.5], "a", 1])
async def test_logprobs_that_are_none_are_absent(logprobs: Any) -> None:
    report = await odd({"choices": [CHOICE | {"logprobs": logprobs}]})
    assert (report.token_ids, report.logprobs) == (True, False)


@pytest.mark.parametrize(
    "row",
    [
        None,
        {"top_logprobs": [{"id": 5, "logprob": -1}]},
        {"top_logprobs": [{"token": "a", "logprob": None}]},
        {"top_logprobs": {"a": -1.0}},
        {"top_logprobs": [None]},
    ],
)
async def test_rows_of_another_form_tell_no_mode(row: Any) -> None:
    report = await odd({"choices": [CHOICE | {"logprobs": {"content": [row]}}]})
    assert report.captures
    assert report.logprobs_mode == "unknown" or report.engine == "vllm"


async def test_a_fingerprint_that_is_no_text_is_absent() -> None:
    assert (await odd({"system_fingerprint": [5]})).system_fingerprint is None


@pytest.mark.parametrize(
    "event",
    [b'{"choices":[{"logprobs":{"content":[{"logprob":NaN}]}}]}', b'{"choices":[', b"[]", b"\xff"],
)
async def test_events_that_cannot_be_read_are_said(event: bytes) -> None:
    alone = await odd({}, b"data: %b\n\ndata: [DONE]\n\n" % event)
    assert not alone.streaming
    assert any("1 events of a stream cannot be read" in note for note in alone.notes)
    assert not any("let agents ask without" in note for note in alone.notes)
    assert (await odd({}, b"data: %b\n\n" % event + EVENT)).streaming


@pytest.mark.parametrize("choices", ["null", "[null]"])
async def test_events_without_a_choice_show_nothing(choices: str) -> None:
    report = await odd({}, b'data: {"choices":%b}\n\n' % choices.encode())
    assert (report.logprobs, report.streaming) == (True, False)

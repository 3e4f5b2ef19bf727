"""Sampling settings are recorded as the engine reads them: vLLM's parser takes "0.25" and 50.0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from driftgate.adapters.vllm import Vllm
from driftgate.gateway.openai import Plan, read_request, rewrite
from driftgate.trace import Sampling

if TYPE_CHECKING:
    from tests.gateway.conftest import Agent

CHAT = b'{"model":"tiny","messages":[{"role":"user","content":"hi"}],%b}'


def planned(sent: bytes) -> Plan:
    return rewrite("chat", read_request(CHAT % sent), Vllm(), "plain")[1]


# What vLLM 0.29's ChatCompletionRequest makes of them.
@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (b'"temperature":"0.25"', {"temperature": 0.25}),
        (b'"temperature":true', {"temperature": 1.0}),
        (b'"temperature":null', {}),
        (b'"top_p":"0.5","seed":"7"', {"top_p": 0.5, "seed": 7}),
        (b'"top_k":50.0,"min_tokens":"2"', {"top_k": 50, "min_tokens": 2}),
        (b'"max_tokens":"5"', {"max_tokens": 5}),
        (b'"max_tokens":5,"max_completion_tokens":6.0', {"max_tokens": 6}),
        (b'"n":"2"', {"n": 2}),
        (b'"n":2.0', {"n": 2}),
        (b'"repetition_penalty":"1.3"', {"repetition_penalty": 1.3}),
        (b'"logit_bias":{"5":"2"}', {"logit_bias": True}),
        (b'"allowed_token_ids":["5"]', {"allowed_token_ids": True}),
    ],
)
def test_settings_are_read_as_the_engine_reads_them(sent: bytes, read: dict[str, Any]) -> None:
    plan = planned(sent)
    assert (plan.sampling, plan.unread) == (Sampling(**read), ())
    assert plan.choices == read.get("n", 1)


@pytest.mark.parametrize("sent", [b"true", b'"true"', b"1", b'"yes"'])
def test_beam_search_is_seen_in_any_spelling(sent: bytes) -> None:
    assert "beam search" in (planned(b'"use_beam_search":' + sent).uncaptured or "")
    assert planned(b'"use_beam_search":false').uncaptured is None


@pytest.mark.parametrize("sent", [b'" 0.5 "', b'"nan"', b"{}"])
async def test_a_setting_that_cannot_be_read_is_named(agent: Agent, sent: bytes) -> None:
    assert (await agent.send(CHAT % (b'"temperature":' + sent)))[0] == 200
    (trace,) = await agent.traces()
    assert trace.meta.sampling.temperature is None
    assert trace.meta.missing == ["sampling: temperature cannot be read"]

"""What is not to be stored is not stored, and the engine still gets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.redact import redacted
from tests.gateway.conftest import StandIn

BODY = (
    b'{"model":"m","user":"ann","temperature":1.50,"metadata":{"email":"a@b","run":7},'
    b'"messages":[{"role":"user","name":"Ann","content":"hi"},{"role":"tool","content":[]}],'
    b'"x":{"a":{"k":1},"b":{"k":2}}}'
)


@pytest.mark.parametrize(
    ("paths", "old", "new"),
    [
        (["user"], b'"ann"', b'"[redacted]"'),
        (["metadata.email"], b'"a@b"', b'"[redacted]"'),
        (["metadata"], b'{"email":"a@b","run":7}', b'"[redacted]"'),
        (["messages.*.name"], b'"Ann"', b'"[redacted]"'),
        (
            ["x.*.k"],
            b'{"a":{"k":1},"b":{"k":2}}',
            b'{"a":{"k":"[redacted]"},"b":{"k":"[redacted]"}}',
        ),
        (["nothing", "user.of", "messages.name", "model.*", "metadata.*.a"], b"", b""),
    ],
)
def test_only_what_is_named_changes(paths: list[str], old: bytes, new: bytes) -> None:
    assert redacted(BODY, paths) == BODY.replace(old, new)


def test_a_spelling_does_not_hide_a_field() -> None:
    for body in (b'{"\\u0075ser":"ann"}', b'{"user":"ann","user":"ann"}', b' {\n"user" : "ann" }'):
        assert redacted(body, ["user"]) == b'{"user":"[redacted]"}'
    for field in (b'{"user":17}', b'{"user":["ann"]}', b'{"user":{"a":"ann"}}'):
        assert redacted(field, ["user"]) == b'{"user":"[redacted]"}'
    assert redacted(b'{"user":null}', ["user"]) == b'{"user":null}'


@pytest.mark.parametrize(
    "body",
    [b'{"user":"ann"', b"\xff", '{"user":"ann"}'.encode("utf-16"), b'{"a":NaN,"user":"ann"}'],
)
def test_what_cannot_be_read_is_not_stored_at_all(body: bytes) -> None:
    assert redacted(body, ["user"]) == b'"[redacted]"'


@pytest.mark.parametrize("path", ["", ".", "a.", ".a", "a..b"])
def test_a_path_that_is_none(path: str) -> None:
    with pytest.raises(ValueError, match="no path"):
        GatewayConfig(upstream="http://e:1", redact=[path])


@pytest.mark.parametrize("stream", [False, True])
async def test_the_engine_gets_what_is_not_stored(
    connect: Callable[..., Any], engine: StandIn, stream: bool
) -> None:
    agent = await connect(redact=["user", "metadata.email"])
    sent = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "user": "ann",
        "metadata": {"email": "a@b", "trajectory_id": "m"},
        "stream": stream,
    }
    status, _ = await agent.send(sent)
    assert status == 200
    assert (engine.asked["user"], engine.asked["metadata"]["email"]) == ("ann", "a@b")
    (trace,) = await agent.traces()
    stored = json.loads(trace.request)
    assert stored["user"] == stored["metadata"]["email"] == "[redacted]"
    assert stored["metadata"]["trajectory_id"] == trace.meta.trajectory == "m"
    assert (stored["messages"], stored["stream"]) == (sent["messages"], stream)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", ["chat/completions", "responses", "messages"])
async def test_an_answer_that_repeats_its_request_is_stored_without_it(
    connect: Callable[..., Any], api: str, stream: bool
) -> None:
    hidden = {"user": "s3cret", "safety_identifier": "s3cret", "prompt_cache_key": "s3cret"}
    sent = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "input": "hi",
        "max_tokens": 5,
        "metadata": {"email": "s3cret", "run": "7"},
        "stream": stream,
        **hidden,
    }
    agent = await connect(redact=[*hidden, "metadata.email"])
    status, said = await agent.send(sent, path=f"/v1/{api}")
    assert (status, b"s3cret" in said) == (200, api == "responses")
    (trace,) = await agent.traces()
    assert b"s3cret" not in trace.request + trace.response
    if api == "responses":
        stored = json.loads(trace.response)
        assert (stored["metadata"], stored["user"]) == (
            {"email": "[redacted]", "run": "7"},
            "[redacted]",
        )
        assert (stored["status"], stored["instructions"]) == ("completed", None)

"""What the agent is told of an engine that breaks: what happened, and never what it said."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.gateway.conftest import StandIn

Connect = Callable[..., Any]

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
BROKEN = {
    "content-length too short": (
        OK + b'content-length: 5\r\n\r\n{"secret":1}',
        "no valid HTTP .*Bad status line",
    ),
    "no HTTP": (b"secret, this is\r\n\r\n", "no valid HTTP .*Bad status line"),
    "a bad header": (OK + b"se cret: 1\r\n\r\n", "no valid HTTP .*Invalid header token"),
    "two lengths": (OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}", "no valid HTTP"),
    "a bad chunk": (
        OK + b"transfer-encoding: chunked\r\n\r\nsecret\r\n",
        "no valid HTTP|broke off its answer",
    ),
    "a long header": (OK + b"x: " + b"secret" * 9000 + b"\r\n\r\n", "no valid HTTP"),
    "no answer": (b"", "closed the connection without an answer"),
    "half a head": (OK + b"x: secret", "closed the connection in the middle of .* headers"),
    "half a body": (
        OK + b'content-length: 99\r\n\r\n{"secret"',
        r"broke off its answer: .*content-length \(received 9 of 99 bytes\)",
    ),
    "half a chunk": (
        OK + b"transfer-encoding: chunked\r\n\r\n99\r\nsecret",
        "broke off its answer: .*the last chunk",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_the_agent_and_the_store_are_told_what_happened(
    connect: Connect, engine: StandIn, case: str
) -> None:
    answer, expected = BROKEN[case]

    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(broken, "127.0.0.1", 0)
    engine.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    agent = await connect()
    status, body = await agent.send(CHAT)
    server.close()
    said = json.loads(body)["error"]["message"]
    (outcome,) = await agent.outcomes()
    assert (status, outcome.status) == (502, "failed")
    for text in (said, outcome.reason):
        assert re.search(expected, text), text
        assert "secret" not in text

"""The SDKs ask again when their connection is cut: one step, and one sample of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from driftgate.adapters.export_select import Selection
from driftgate.gateway.api_tree import read_tree
from driftgate.storage import Reader

if TYPE_CHECKING:
    from tests.gateway.conftest import Agent

PART = 300
"""Bytes of an answer: behind its head, before its end."""


@contextlib.asynccontextmanager
async def cutting(agent: Agent, after_bytes: int) -> AsyncIterator[str]:
    """A way to the gateway that takes the whole of the first answer and gives only its start."""
    left = [after_bytes]
    host, port = agent.url.removeprefix("http://").split(":")

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside, outside = await asyncio.open_connection(host, int(port))
        asking = asyncio.create_task(pass_on(reader, outside))
        head = await inside.readuntil(b"\r\n\r\n")
        size = next(
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length")
        )
        answer = head + await inside.readexactly(size)
        writer.write(answer[: left.pop()] if left else answer)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        asking.cancel()
        outside.close()
        writer.close()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def by_chat(url: str) -> None:
    """Two turns."""
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    async with AsyncOpenAI(base_url=f"{url}/t/run/v1", api_key="none", max_retries=2) as client:
        for _ in range(2):
            answer = await client.chat.completions.create(model="tiny", messages=messages)
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
            messages.append({"role": "user", "content": "go on"})


async def by_responses(url: str) -> None:
    """The same."""
    items: list[Any] = [{"role": "user", "content": "hi"}]
    async with AsyncOpenAI(base_url=f"{url}/t/run/v1", api_key="none", max_retries=2) as client:
        for _ in range(2):
            answer = await client.responses.create(model="tiny", input=items)
            items.append({"role": "assistant", "content": answer.output_text})
            items.append({"role": "user", "content": "go on"})


async def by_messages(url: str) -> None:
    """The same."""
    turns: list[Any] = [{"role": "user", "content": "hi"}]
    async with AsyncAnthropic(base_url=f"{url}/t/run", api_key="none", max_retries=2) as client:
        for _ in range(2):
            answer = await client.messages.create(model="tiny", max_tokens=9, messages=turns)
            turns.append({"role": "assistant", "content": answer.content})
            turns.append({"role": "user", "content": "go on"})


@pytest.mark.parametrize("after_bytes", [0, PART])
@pytest.mark.parametrize("converse", [by_chat, by_responses, by_messages])
async def test_an_answer_that_was_lost_on_the_way_is_no_sample(
    agent: Agent, after_bytes: int, converse: Callable[[str], Awaitable[None]]
) -> None:
    await agent.gateway.upstreams.ready()
    async with cutting(agent, after_bytes) as url:
        await converse(url)
    lost, first, second = await agent.traces()
    assert [(t.meta.step, t.meta.retry) for t in (lost, first, second)] == [(0, 0), (0, 1), (1, 0)]
    reader = agent.gateway.reader
    assert reader is not None
    assert_one_sample_a_step(reader)


def assert_one_sample_a_step(reader: Reader) -> None:
    tree = read_tree(reader, "run")
    assert [node.kind for node in tree.nodes] == ["retried", "root", "extension"]
    assert (tree.samples, tree.tokens.lines) == (2, 1)
    selection = Selection(reader)
    (sample,) = selection.samples("run")
    assert [(span.step, span.trace_id) for span in sample.meta.spans] == [
        (node.step, node.trace_id) for node in tree.nodes[1:]
    ]
    assert selection.left_out["retried"] == 1

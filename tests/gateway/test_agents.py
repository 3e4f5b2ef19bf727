"""Which agent of a run called: the headers that coding agents document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from multidict import CIMultiDict

from driftgate.gateway.agents import MAX_CHARS, read_agent
from driftgate.trace import Agent

if TYPE_CHECKING:
    from tests.gateway.conftest import Agent as Client

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("headers", "agent"),
    [
        ({}, None),
        ({"X-Claude-Code-Session-Id": "s"}, Agent(id="s")),
        (
            {
                "x-claude-code-session-id": "s",
                "x-claude-code-agent-id": "a",
                "x-claude-code-agent-type": "Explore",
            },
            Agent(id="a", parent="s", kind="Explore"),
        ),
        (
            {
                "x-claude-code-session-id": "s",
                "x-claude-code-agent-id": "b",
                "x-claude-code-parent-agent-id": "a",
            },
            Agent(id="b", parent="a"),
        ),
        (
            {
                "x-claude-code-session-id": "s",
                "x-claude-code-request-class": "main",
                "x-claude-code-context-compacted": "auto",
            },
            Agent(id="s", kind="main", compacted=True),
        ),
        (
            {"session-id": "s", "thread-id": "s", "x-codex-window-id": "s:1"},
            Agent(id="s", window="s:1"),
        ),
        (
            {
                "session-id": "s",
                "thread-id": "t",
                "x-codex-parent-thread-id": "s",
                "x-openai-subagent": "collab_spawn",
            },
            Agent(id="t", parent="s", kind="collab_spawn"),
        ),
        ({"x-session-id": "s", "x-parent-session-id": "p"}, Agent(id="s", parent="p")),
        ({"x-session-id": "x" * (MAX_CHARS + 1)}, None),
        ({"x-session-id": "a\x00b"}, None),
    ],
)
def test_an_agent_is_read_from_its_headers(headers: dict[str, str], agent: Agent | None) -> None:
    assert read_agent(CIMultiDict(headers)) == agent


async def test_a_trace_keeps_its_agent_in_a_named_trajectory(agent: Client) -> None:
    for headers in ({"x-session-id": "p"}, {"x-session-id": "c", "x-parent-session-id": "p"}):
        await agent.send(CHAT, path="/t/run/v1/chat/completions", headers=headers)
    assert [trace.meta.agent for trace in await agent.traces()] == [
        Agent(id="p"),
        Agent(id="c", parent="p"),
    ]


async def test_the_tree_over_http(agent: Client) -> None:
    for headers in ({"x-session-id": "p"}, {"x-session-id": "c", "x-parent-session-id": "p"}):
        await agent.send(CHAT, path="/t/a%2Fb/v1/chat/completions", headers=headers)
    await agent.flush()
    async with agent.http.get(agent.url + "/api/trajectories/a%2Fb/tree") as answer:
        assert answer.status == 200
        tree = await answer.json()
    assert [node["kind"] for node in tree["nodes"]] == ["root", "sub_agent"]
    async with agent.http.get(agent.url + "/api/trajectories/nobody/tree") as answer:
        assert answer.status == 404

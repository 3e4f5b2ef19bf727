"""A conversation that goes on under another system message, or without its beginning, is still the
run that got the tool calls in it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.gateway.conftest import Agent, StandIn

GUIDE = {"role": "system", "content": "You hand over."}
RECKONER = {"role": "system", "content": "You multiply."}
USER = {"role": "user", "content": "hi"}
TOOLS = [{"type": "function", "function": {"name": "transfer_to_reckoner"}}]


@pytest.fixture
def tool_ids(engine: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids as vLLM draws them."""
    made = engine.tool_call

    def drawn(text: str, choice: int) -> dict[str, Any]:
        return made(text, choice) | {"id": f"chatcmpl-tool-{secrets.token_hex(8)}"}

    monkeypatch.setattr(engine, "tool_call", drawn)


async def handed_over(agent: Agent) -> list[Any]:
    """A first call, and the history that the next agent gets."""
    called = await ask(agent, [GUIDE, USER])
    done = {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": "{}"}
    return [USER, called, done]


async def ask(agent: Agent, messages: list[Any]) -> dict[str, Any]:
    status, body = await agent.send({"model": "tiny", "messages": messages, "tools": TOOLS})
    assert status == 200
    message: dict[str, Any] = json.loads(body)["choices"][0]["message"]
    return message


async def places(agent: Agent) -> list[tuple[str, int, str]]:
    metas = sorted((t.meta for t in await agent.traces()), key=lambda m: m.started_ns)
    return [(m.trajectory, m.step, m.attribution) for m in metas]


@pytest.mark.usefixtures("tool_ids")
async def test_a_handoff_stays_in_its_run(agent: Agent) -> None:
    runs = [await handed_over(agent) for _ in range(2)]
    for history in reversed(runs):
        await ask(agent, [RECKONER, *history])
    one, two, *handed = await places(agent)
    assert handed == [(two[0], 1, "tool_call"), (one[0], 1, "tool_call")]


@pytest.mark.usefixtures("tool_ids")
async def test_a_context_without_its_beginning_stays_in_its_run(agent: Agent) -> None:
    _, called, done = await handed_over(agent)
    await ask(agent, [GUIDE, {"role": "user", "content": "(cut)"}, called, done])
    first, second = await places(agent)
    assert second == (first[0], 1, "tool_call")


@pytest.mark.usefixtures("tool_ids")
async def test_a_handoff_goes_on_after_a_restart(connect: Callable[..., Any]) -> None:
    agent = await connect()
    history = await handed_over(agent)
    await agent.flush()
    other: Agent = await connect()
    await ask(other, [RECKONER, *history])
    first, second = await places(other)
    assert second == (first[0], 1, "tool_call")


async def test_ids_that_are_the_same_in_every_run_prove_nothing(
    agent: Agent, engine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine.tool_call
    monkeypatch.setattr(
        engine, "tool_call", lambda text, choice: made(text, choice) | {"id": "functions.ls:0"}
    )
    await ask(agent, [RECKONER, *await handed_over(agent)])
    assert [rule for _, _, rule in await places(agent)] == ["new", "new"]


async def test_an_id_that_two_runs_got_is_ambiguous(
    agent: Agent, engine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, same = engine.tool_call, f"call_{secrets.token_hex(12)}"
    monkeypatch.setattr(engine, "tool_call", lambda text, choice: made(text, choice) | {"id": same})
    await handed_over(agent)
    await ask(agent, [RECKONER, *await handed_over(agent)])
    first, second, third = sorted(
        (t.meta for t in await agent.traces()), key=lambda m: m.started_ns
    )
    assert third.attribution == "new"
    assert third.ambiguous == sorted([first.trajectory, second.trajectory])

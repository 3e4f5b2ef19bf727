"""What large requests make long is not done on the event loop."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from driftgate.gateway import anthropic, config, earlier, proxy

Connect = Callable[..., Any]


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[bool]]:
    """Watch a function: for each call, whether it came on the loop's thread."""

    def watch(module: Any, name: str) -> list[bool]:
        on_loop = list[bool]()
        real = getattr(module, name)

        def watched(*arguments: Any) -> Any:
            on_loop.append(threading.current_thread() is threading.main_thread())
            return real(*arguments)

        monkeypatch.setattr(module, name, watched)
        return on_loop

    monkeypatch.setattr(proxy, "LARGE_BODY_BYTES", 10)
    monkeypatch.setattr(earlier, "LONG_BYTES", 10)
    return watch


async def test_redaction(connect: Connect, threads: Callable[[Any, str], list[bool]]) -> None:
    agent = await connect(redact=["user"])
    on_loop = threads(config, "redacted")
    await agent.send({"model": "tiny", "messages": [], "user": "ann"})
    assert on_loop == [False]


async def test_counting_tokens(connect: Connect, threads: Callable[[Any, str], list[bool]]) -> None:
    agent = await connect()
    on_loop = threads(anthropic, "count_request")
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    status, said = await agent.send(asked, path="/v1/messages/count_tokens")
    assert (status, json.loads(said)["input_tokens"] > 0, on_loop) == (200, True, [False])


async def test_a_long_conversation(
    connect: Connect, threads: Callable[[Any, str], list[bool]]
) -> None:
    agent = await connect()
    on_loop = threads(earlier, "message_of")
    previous = None
    for _ in range(3):
        asked = {"model": "tiny", "input": "hi", "previous_response_id": previous}
        status, said = await agent.send(asked, path="/v1/responses")
        assert status == 200
        previous = json.loads(said)["id"]
    assert on_loop == [False] * 3
    assert [m["role"] for m in agent.engine.asked["messages"]] == ["user", "assistant"] * 2 + [
        "user"
    ]

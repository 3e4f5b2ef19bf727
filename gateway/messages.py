"""The assistant's message of an answer: put together from a stream's deltas. Pure.

Both the fold (on the writer thread) and attribution (which must know the message before the agent's
next call can arrive) need it, so it stands alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from driftgate.errors import JSON_ERRORS
from driftgate.gateway import sse

__all__ = ["Delta", "assemble", "streamed_messages"]


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    index: int = 0
    id: str | None = None
    type: str | None = None
    function: _Function | None = None


class Delta(msgspec.Struct):
    """What a chunk adds to a message."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    """The older name that some engines and clients use for ``reasoning``."""
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: Delta | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []


_CHUNK = msgspec.json.Decoder(_Chunk)


def assemble(deltas: Iterable[Delta]) -> dict[str, Any]:
    """The message that the deltas add up to, with the keys of a JSON answer's message."""
    role = "assistant"
    texts: dict[str, list[str]] = {}
    calls: dict[int, _ToolCall] = {}
    arguments: dict[int, list[str]] = {}
    for delta in deltas:
        role = delta.role or role
        for name in ("content", "reasoning", "reasoning_content", "refusal"):
            text = getattr(delta, name)
            if text is not None:
                texts.setdefault(name, []).append(text)
        for call in delta.tool_calls or ():
            first = calls.setdefault(call.index, call)
            first.id = first.id or call.id
            first.type = first.type or call.type
            if call.function is not None:
                if first.function is None:
                    first.function = _Function()
                first.function.name = first.function.name or call.function.name
                arguments.setdefault(call.index, []).append(call.function.arguments or "")
    message: dict[str, Any] = {"role": role, "content": None}
    message |= {name: "".join(parts) for name, parts in texts.items()}
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type or "function",
                "function": {
                    "name": call.function.name if call.function else None,
                    "arguments": "".join(arguments.get(index, ())),
                },
            }
            for index, call in sorted(calls.items())
        ]
        message["content"] = message["content"] or None
    return message


def streamed_messages(events: Sequence[bytes]) -> list[dict[str, Any]]:
    """The messages of a chat stream, in order of choices; about 1 µs an event."""
    deltas: dict[int, list[Delta]] = {}
    for event in events:
        data = sse.event_data(event)
        if data is None or data == sse.DONE:
            continue
        try:
            chunk = _CHUNK.decode(data)
        except JSON_ERRORS:
            continue  # the fold names it
        for choice in chunk.choices:
            if choice.delta is not None:
                deltas.setdefault(choice.index, []).append(choice.delta)
    return [assemble(deltas[index]) for index in sorted(deltas)]

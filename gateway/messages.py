"""The assistant's message of an answer: put together from a stream's deltas as they come.

Both the fold (on the writer thread) and attribution (which must know the message before the agent's
next call can arrive) need it, so it stands alone. Texts grow in buffers, not in a list of pieces: a
piece of three letters would cost sixty bytes."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from operator import attrgetter
from typing import Any

import msgspec

__all__ = ["Delta", "Function", "Message"]


_TEXTS = ("content", "reasoning", "reasoning_content", "refusal")


class Function(msgspec.Struct, gc=False):
    """What a chunk adds to a tool call."""

    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct, gc=False):
    index: int = 0
    id: str | None = None
    type: str | None = None
    function: Function | None = None


class Delta(msgspec.Struct, gc=False):
    """What a chunk adds to a message."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    """The older name that some engines and clients use for ``reasoning``."""
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Call:
    """A tool call of which parts have come."""

    __slots__ = ("arguments", "id", "name", "type")

    def __init__(self) -> None:
        self.id: str | None = None
        self.type: str | None = None
        self.name: str | None = None
        self.arguments = StringIO()

    def add(self, part: _ToolCall) -> None:
        self.id = self.id or part.id
        self.type = self.type or part.type
        if part.function is not None:
            self.name = self.name or part.function.name
            self.arguments.write(part.function.arguments or "")


class Message:
    """What has come of one choice's message."""

    __slots__ = ("_calls", "_role", "_texts")

    def __init__(self) -> None:
        self._role = "assistant"
        self._texts: dict[str, StringIO] = {}
        self._calls: dict[int, _Call] = {}

    @property
    def size_chars(self) -> int:
        """Of its texts."""
        buffers = [*self._texts.values(), *(call.arguments for call in self._calls.values())]
        return sum(buffer.tell() for buffer in buffers)

    def add(self, deltas: Sequence[Delta]) -> None:
        """Add chunks' parts, in order."""
        for name in _TEXTS:
            read = attrgetter(name)
            parts = [text for text in map(read, deltas) if text is not None]
            if parts:
                self._texts.setdefault(name, StringIO()).write("".join(parts))
        for delta in deltas:
            if delta.tool_calls is not None:
                for part in delta.tool_calls:
                    self._calls.setdefault(part.index, _Call()).add(part)
            if delta.role:
                self._role = delta.role

    def body(self) -> dict[str, Any]:
        """The message, with the keys of a JSON answer's."""
        message: dict[str, Any] = {"role": self._role, "content": None}
        message |= {name: text.getvalue() for name, text in self._texts.items()}
        if self._calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type or "function",
                    "function": {"name": call.name, "arguments": call.arguments.getvalue()},
                }
                for _, call in sorted(self._calls.items())
            ]
            message["content"] = message["content"] or None
        return message

"""The assistant's message of an answer, whichever API its agent spoke. Pure.

A trace keeps the answer as the agent got it: a choice of chat completions or completions, a
Responses object or an Anthropic message. What reads a message (classes of tokens, attribution)
reads it here, as chat completions have it. An agent sends the same items or blocks back in its
next request, which are read by the same functions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Raw

from driftgate.errors import UNREADABLE

__all__ = ["INVALID_JSON", "Block", "Item", "Part", "message_of", "of_blocks", "of_items"]

INVALID_JSON = "INVALID_JSON"
"""Key under which a tool's input that is no JSON object is kept: an Anthropic block must hold one.
Anthropic's documentation of fine-grained tool streaming names it."""


class Part(msgspec.Struct):
    """A part of a Responses item."""

    type: str = ""
    text: str = ""
    refusal: str = ""
    image_url: str | None = None
    detail: str | None = None


class Item(msgspec.Struct):
    """A Responses item, going in or coming out; the fields that are read of it."""

    type: str = "message"
    role: str = ""
    content: str | list[Part] | None = None
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    output: str | list[Part] = ""
    summary: list[Part] | None = None
    namespace: str | None = None


class Source(msgspec.Struct):
    """Where an Anthropic image comes from."""

    type: str = ""
    media_type: str = ""
    data: str = ""
    url: str = ""


class Block(msgspec.Struct):
    """An Anthropic content block, going in or coming out; the fields that are read of it."""

    type: str = ""
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: Raw = Raw(b"{}")
    tool_use_id: str = ""
    content: str | list[Block] | None = None
    source: Source | None = None


class _Answer(msgspec.Struct):
    object: str = ""
    type: str = ""
    message: dict[str, Any] | None = None
    output: list[Item] = []
    content: list[Block] = []


_ANSWER = msgspec.json.Decoder(_Answer)
_OBJECT = msgspec.json.Decoder(dict[str, Raw])


def message_of(response: bytes) -> dict[str, Any]:
    """The message of ``Trace.response``; empty for a completion and for what is none."""
    try:
        answer = _ANSWER.decode(response or b"{}")
    except UNREADABLE:
        return {}
    if answer.message is not None:
        return answer.message
    if answer.object == "response":
        return of_items(answer.output)
    if answer.type == "message":
        return of_blocks(answer.content)
    return {}


def of_items(items: Iterable[Item]) -> dict[str, Any]:
    """One assistant message of Responses items: reasoning, text and function calls."""
    reasoning, texts, calls = "", list[str](), list[dict[str, Any]]()
    for item in items:
        if item.type == "reasoning":
            parts = item.content or item.summary or []
            reasoning += parts if isinstance(parts, str) else "".join(p.text for p in parts)
        elif item.type == "function_call":
            calls.append(_call(item.call_id, item.name, item.arguments))
        elif isinstance(item.content, str):
            texts.append(item.content)
        else:
            texts += [part.text or part.refusal for part in item.content or ()]
    return _message(reasoning, texts, calls)


def of_blocks(blocks: Iterable[Block]) -> dict[str, Any]:
    """One assistant message of Anthropic blocks: thinking, text and tool uses."""
    reasoning, texts, calls = "", list[str](), list[dict[str, Any]]()
    for block in blocks:
        if block.type == "thinking":
            reasoning += block.thinking
        elif block.type == "text":
            texts.append(block.text)
        elif block.type == "tool_use":
            calls.append(_call(block.id, block.name, _arguments(block.input)))
    return _message(reasoning, texts, calls)


def _arguments(raw: Raw) -> str:
    """A tool's input as the text that was sampled, as far as it is known."""
    fields = _OBJECT.decode(raw)
    if list(fields) == [INVALID_JSON]:
        return msgspec.json.decode(fields[INVALID_JSON], type=str)
    return bytes(raw).decode()


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def _message(reasoning: str, texts: list[str], calls: list[dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if not texts and calls:
        message["content"] = None
    if reasoning:
        message["reasoning"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message

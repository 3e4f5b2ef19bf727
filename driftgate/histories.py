"""The history in a request of the Responses or the Messages API, as chat messages. Pure.

What one answer said comes back as several items or blocks; here it is one assistant message again.
What a chat message cannot hold is refused in words that name what there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from driftgate.errors import UNREADABLE, RequestError
from driftgate.spoken import Block, Item, Part, of_blocks, of_items

__all__ = [
    "Message",
    "led",
    "messages_of_blocks",
    "messages_of_input",
    "said",
    "system_first",
]

IN_INPUT = (
    "supported are text and image_url messages, function tools, function_call and "
    "function_call_output items, reasoning items and previous_response_id"
)
IN_BLOCKS = "supported are text, image, tool_use, tool_result and thinking blocks"

BILLING = "x-anthropic-billing-header"
"""Begins a line that Claude Code changes with every call. vLLM's own Messages route drops it too,
because it would break every prefix; the stored request keeps it."""

_INPUT = msgspec.json.Decoder(str | list[Item])


class Message(msgspec.Struct):
    """One of the Messages API."""

    role: str
    content: str | list[Block]


def said(role: str, content: Any) -> dict[str, Any]:
    """A chat message."""
    return {"role": role, "content": content}


def led(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``messages`` with the system messages that they begin with as one: many templates take no
    second one."""
    count = 0
    while count < len(messages) and _system_text(messages[count]) is not None:
        count += 1
    return [*_as_one(messages[:count]), *messages[count:]]


def system_first(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``messages`` with every system message in the first, for a template that takes them nowhere
    else; as vLLM's own Messages route does it."""
    found = [message for message in messages if _system_text(message) is not None]
    return _as_one(found) + [m for m in messages if _system_text(m) is None]


def _as_one(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(messages) < 2:
        return [*messages]
    return [said("system", "\n\n".join(filter(None, map(_system_text, messages))))]


def _system_text(message: dict[str, Any]) -> str | None:
    """Of a system message that is only text; parts are joined as vLLM joins them."""
    content = message.get("content")
    if message.get("role") != "system":
        return None
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str)]
    return "\n".join(texts) if len(texts) == len(parts) else None


# Responses: items.


def messages_of_input(raw: bytes) -> list[Any]:
    """Chat messages of a request's ``input``. What one answer said (reasoning, text, calls) is one
    message again. RequestError for items that a chat request cannot hold."""
    try:
        found = _INPUT.decode(raw)
    except UNREADABLE as error:
        raise RequestError(f"input does not have the form of one: {error}") from error
    if isinstance(found, str):
        return [said("user", found)]
    messages: list[Any] = []
    turn: list[Item] = []
    for item in found:
        if _is_assistants(item):
            if turn and _begins_a_turn(item, turn):
                messages.append(of_items(turn))
                turn = []
            turn.append(item)
            continue
        if turn:
            messages.append(of_items(turn))
            turn = []
        messages.append(_of_item(item))
    return [*messages, of_items(turn)] if turn else messages


def _is_assistants(item: Item) -> bool:
    said = item.type == "message" and item.role == "assistant"
    return said or item.type in ("reasoning", "function_call")


def _begins_a_turn(item: Item, turn: Sequence[Item]) -> bool:
    """Reasoning stands first in an answer and text before calls, so either can begin another."""
    if item.type == "reasoning":
        return any(earlier.type != "reasoning" for earlier in turn)
    return item.type == "message" and any(earlier.type != "reasoning" for earlier in turn)


def _of_item(item: Item) -> dict[str, Any]:
    if item.type == "function_call_output":
        return {
            "role": "tool",
            "tool_call_id": item.call_id,
            "content": _of_parts(item.output),
        }
    if item.type == "message" and item.role in ("user", "system", "developer"):
        # Templates know no developer; OpenAI's models take the two for one.
        role = "user" if item.role == "user" else "system"
        return said(role, _of_parts(item.content or ""))
    what = f"a message of role {item.role!r}" if item.type == "message" else f"{item.type!r}"
    raise RequestError(f"input: {what} is not supported; {IN_INPUT}")


def _of_parts(content: str | list[Part]) -> Any:
    if isinstance(content, str):
        return content
    parts = [_of_part(part) for part in content]
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _of_part(part: Part) -> dict[str, Any]:
    if part.type in ("input_text", "output_text", "text"):
        return {"type": "text", "text": part.text}
    if part.type == "input_image" and part.image_url is not None:
        image = {"url": part.image_url}
        return {"type": "image_url", "image_url": image}
    raise RequestError(
        f"input: a part of type {part.type!r} is not supported"
        f"{' without image_url' if part.type == 'input_image' else ''}; {IN_INPUT}"
    )


# Messages: blocks.


def messages_of_blocks(
    system: str | list[Block] | None, messages: Iterable[Message]
) -> list[dict[str, Any]]:
    """Chat messages of a request. RequestError for blocks that a chat request cannot hold."""
    rest = (chat for message in messages for chat in _of_message(message))
    return led([*_system(system), *rest])


def _system(system: str | list[Block] | None) -> Iterator[dict[str, Any]]:
    if isinstance(system, list):
        _refuse_others(system, {"text"})
        system = "".join(b.text for b in system if not b.text.startswith(BILLING))
    if system and not system.startswith(BILLING):
        yield {"role": "system", "content": system}


def _of_message(message: Message) -> Iterator[dict[str, Any]]:
    """The chat messages of one message: results of tools are messages of their own."""
    if message.role not in ("user", "assistant", "system"):
        raise RequestError(f"messages: role {message.role!r} is not one of user and assistant")
    if message.role == "system":
        yield from _system(message.content)
        return
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    if message.role == "assistant":
        _refuse_others(message.content, {"text", "thinking", "redacted_thinking", "tool_use"})
        try:
            yield of_blocks(message.content)
        except UNREADABLE as error:
            raise RequestError(f"messages: a tool_use's input is no object: {error}") from error
        return
    _refuse_others(message.content, {"text", "image", "tool_result"})
    rest = []
    for block in message.content:
        if block.type == "tool_result":
            yield {
                "role": "tool",
                "tool_call_id": block.tool_use_id,
                "content": _of_blocks(block.content or ""),
            }
        else:
            rest.append(block)
    if rest:
        yield {"role": message.role, "content": _of_blocks(rest)}


def _refuse_others(blocks: Iterable[Block], allowed: set[str]) -> None:
    for block in blocks:
        if block.type not in allowed:
            raise RequestError(
                f"messages: a block of type {block.type!r} is not supported here; {IN_BLOCKS}"
            )


def _of_blocks(content: str | list[Block]) -> Any:
    if isinstance(content, str):
        return content
    _refuse_others(content, {"text", "image"})
    parts = [_of_block(block) for block in content]
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _of_block(block: Block) -> dict[str, Any]:
    if block.type == "text":
        return {"type": "text", "text": block.text}
    source = block.source
    if source is None or source.type not in ("base64", "url"):
        raise RequestError("messages: an image's source must be of type base64 or url")
    url = source.url or f"data:{source.media_type};base64,{source.data}"
    return {"type": "image_url", "image_url": {"url": url}}

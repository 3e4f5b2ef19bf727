"""What the template puts behind an earlier answer, found without knowing the template. Pure.

The request is rendered twice with another text in the answer's place. What both renderings end with
does not depend on the answer: the end of its turn and all that follows, up to where the next answer
begins. That is put behind the ids that were sampled.

A turn's end is nearly always a control token, which no text merges with. Where the sampled ids do
not end with it (an answer cut at ``max_tokens``, a stop string) nothing else proves that none of it
was merged into the placeholder's last token, so one more placeholder, of another kind of character,
has to give the same. Behind a tool call's arguments brackets are closed before the turn ends, so
its ids must end with the token that ends turns: that of a rendering with a text in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw

from driftgate.adapters.base import EngineAdapter
from driftgate.errors import UNREADABLE
from driftgate.gateway.openai import Fields
from driftgate.gateway.sampled import SAMPLING, VARYING, Known
from driftgate.trace import I32

__all__ = [
    "Asked",
    "asked",
    "behind",
    "behind_calls",
    "ends_turns",
    "needs_third",
    "obstacle",
]

PLACEHOLDERS = ("driftgate x", "driftgate 7", "driftgate.")
"""They end with a letter, a digit and a mark: a tokenizer joins what follows with one of these at
most."""

HIDDEN = "the template does not show that answer, or nothing behind it"

_MESSAGES = msgspec.json.Decoder(list[Raw])
_MESSAGE = msgspec.json.Decoder(dict[str, Any])
_NULL = b"null"
_ENCODER = msgspec.json.Encoder()


def obstacle(fields: Fields, adapter: EngineAdapter) -> str | None:
    """What in a request cannot be done with ids; None where nothing is."""
    for name, harmless in (
        ("continue_final_message", b"false"),
        ("add_generation_prompt", b"true"),
        ("echo", b"false"),
        ("truncate_prompt_tokens", _NULL),
        ("return_prompt_text", b"false"),
        ("use_beam_search", b"false"),
        (adapter.prompt_ids_field[0], _NULL),
    ):
        if bytes(fields.get(name, _NULL)) not in (_NULL, harmless):
            return f"{name} cannot be served with token ids"
    messages = _messages(fields)
    if any(_has_media(message) for message in messages):
        return "the messages hold more than text"
    if not all(_are_calls(message.get("tool_calls") or []) for message in messages):
        return "the messages hold tool calls that are none"
    return None


def _messages(fields: Fields) -> list[dict[str, Any]]:
    try:
        return [_MESSAGE.decode(raw) for raw in _MESSAGES.decode(fields.get("messages", b"[]"))]
    except UNREADABLE:
        return []


def _are_calls(calls: object) -> bool:
    return isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls
    )


def _has_media(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else ()
    return any(not isinstance(part, dict) or part.get("type") != "text" for part in parts)


def body(
    fields: Fields, position: int, placeholder: str, varying: Mapping[str, bytes] | None = None
) -> bytes:
    """A request that renders ``fields`` with ``placeholder`` as the answer at ``position``, which
    keeps its tool calls but for the arguments of the last one.

    ``varying``: these fields in place of the request's own.
    """
    messages = _MESSAGES.decode(fields["messages"])
    message = _MESSAGE.decode(messages[position])
    messages[position] = Raw(_ENCODER.encode(_with(message, placeholder)))
    shown = {name: raw for name, raw in fields.items() if name not in SAMPLING}
    if varying is not None:
        own = {name: raw for name, raw in shown.items() if name not in VARYING}
        shown = own | {name: Raw(raw) for name, raw in varying.items()}
    return _ENCODER.encode(shown | {"messages": messages})


def _with(message: dict[str, Any], placeholder: str) -> dict[str, Any]:
    changed = {k: v for k, v in message.items() if k not in ("reasoning", "reasoning_content")}
    if not message.get("tool_calls"):
        return changed | {"content": placeholder}
    *calls, last = message["tool_calls"]
    arguments = _ENCODER.encode({"text": placeholder}).decode()
    function = {**last["function"], "arguments": arguments}
    return changed | {"tool_calls": [*calls, {**last, "function": function}]}


class Asked(NamedTuple):
    """What has to be rendered to find what stands behind an answer."""

    first: bytes
    second: bytes
    third: bytes
    """Where ``needs_third``."""
    plain: tuple[bytes, bytes] | None
    """The first two with a text in place of the tool calls; None where the answer has none."""
    before: bytes | None
    """The first with ``VARYING`` fields as they were; None where they are the same."""


def asked(fields: Fields, known: Known, varying: Mapping[str, bytes]) -> Asked:
    """The requests; ``varying``: as they are now."""
    position, (first, second, third) = known.position, PLACEHOLDERS
    plain = before = None
    messages = _MESSAGES.decode(fields["messages"])
    message = _MESSAGE.decode(messages[position])
    if message.pop("tool_calls", None):
        messages[position] = Raw(_ENCODER.encode(message))
        without = fields | {"messages": Raw(_ENCODER.encode(messages))}
        plain = body(without, position, first), body(without, position, second)
    if varying != known.sampled.varying:
        before = body(fields, position, first, known.sampled.varying)
    return Asked(
        first=body(fields, position, first),
        second=body(fields, position, second),
        third=body(fields, position, third),
        plain=plain,
        before=before,
    )


def tail(first: I32, second: I32) -> I32:
    """The ids that two renderings end with alike; none where they are one and the same."""
    size = min(len(first), len(second))
    same = first[len(first) - size :][::-1] == second[len(second) - size :][::-1]
    length = size if same.all() else int(same.argmin())
    return first[len(first) - length :] if length < len(first) else first[:0]


def needs_third(rendered: Sequence[I32], last_id: int) -> bool:
    """The end of the turn is not the token that the answer ended with."""
    ids = tail(*rendered)
    return len(ids) > 0 and int(ids[0]) != last_id


def behind(rendered: Sequence[I32], last_id: int) -> list[int] | str:
    """The ids behind an answer whose sampled ids end with ``last_id``; in words why there are none.

    ``rendered``: with different placeholders, at least two.
    """
    first, *others = rendered
    ids = min((tail(first, other) for other in others), key=len)
    if not len(ids):
        return HIDDEN
    if any(len(tail(first, other)) > len(ids) for other in others):
        return "the tokenizer joins the end of a turn with the text before it"
    whole: list[int] = ids.tolist()
    return whole[1:] if whole[0] == last_id else whole


def ends_turns(plain: Sequence[I32], last_id: int) -> bool:
    """``last_id`` is what the template ends a turn with. ``plain``: with different texts."""
    ids = tail(*plain)
    return len(ids) > 0 and int(ids[0]) == last_id


def behind_calls(rendered: Sequence[I32], last_id: int) -> list[int] | str:
    """As ``behind``, where the answer calls tools: the template closes brackets behind the
    arguments before it ends the turn, which is with ``last_id``."""
    ids: list[int] = tail(*rendered).tolist()
    return ids[ids.index(last_id) + 1 :] if last_id in ids else HIDDEN

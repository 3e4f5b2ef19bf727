"""A conversation as a chain of digests, so that a later call can be recognised as its continuation.
Pure.

Histories come back changed: reasoning stripped, tool-call JSON written anew, ids renamed, cache
marks moved. The chain is over what survives that: roles, texts, tool names and canonical arguments.
Tool-call ids stay out of it and are kept beside it, to tell equal conversations apart."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw

from driftgate.errors import UNREADABLE
from driftgate.gateway.recent import Recent

__all__ = [
    "MAX_SEEN",
    "Conversation",
    "Seen",
    "Turn",
    "read_conversation",
    "tool_ids_of",
    "verbatim",
]

MAX_SEEN = 8_192
"""Messages remembered by their bytes: 80 runs of 100 messages, about 3 MB. One that was forgotten
is parsed again, in the time of hashing it."""

_DIGEST_BYTES = 16

_MESSAGES = msgspec.json.Decoder(list[Raw])
_MESSAGE = msgspec.json.Decoder(dict[str, Any])

_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
"""Reasoning in the text itself, where the engine runs without a reasoning parser; agents cut it
off."""

_NO_IDS: frozenset[str] = frozenset()
"""One for all: ``frozenset[str]()`` is a new one each time, of 216 bytes, kept for every turn."""

_SPELLED = ("role", "content", "tool_calls", "reasoning", "reasoning_content")
"""Of an assistant's message: read by themselves, or not compared."""

_RANDOM = re.compile(r"(?=[A-Za-z]*[0-9])[0-9A-Za-z]{16,}")
"""In the ids of tool calls that engines and APIs draw at random (``chatcmpl-tool-`` and ``call_``
with 16 characters or more). Others count (``functions.ls:0``), and are the same in every run."""

_NONE: frozenset[str] = frozenset()

_MOVING = ("cache_control",)
"""Marks that agents move from message to message."""


class Turn(NamedTuple):
    """The conversation up to and including one assistant message."""

    digest: bytes
    tool_ids: frozenset[str]
    """Of all its tool calls."""
    told: frozenset[str] = frozenset()
    """Of those, the ones of the last message, where no other call can have them by chance."""

    @property
    def key(self) -> bytes:
        """Stands for the whole of it."""
        return self.digest


class Conversation(NamedTuple):
    """The messages of a request."""

    digest: bytes
    """Of all of them."""
    tool_ids: frozenset[str]
    turns: tuple[Turn, ...]
    """One for each assistant message, in order."""

    def answered(self, message: Mapping[str, Any]) -> Turn:
        """The turn that ``message``, an answer to this conversation, completes."""
        seen = _read({**message, "role": "assistant"})
        # A union with nothing would be a new set of 216 bytes, kept for each of 100,000 turns.
        ids = self.tool_ids | seen.tool_ids if seen.tool_ids else self.tool_ids
        return Turn(_digest(self.digest + seen.digest), ids, _unique(seen.tool_ids))


class Seen(NamedTuple):
    """What of one message enters the chain."""

    digest: bytes
    tool_ids: frozenset[str] | None
    """None where it is not an assistant's."""


def read_conversation(
    messages: bytes | Raw, known: Recent[bytes, Seen] | None = None
) -> Conversation | None:
    """The chain of a request's ``messages`` (JSON); None where they are not a list of objects.

    ``known`` remembers messages by their bytes: each call of a run brings all earlier ones
    again."""
    try:
        items = _MESSAGES.decode(messages)
        seen = [_seen(item, known) for item in items]
    except UNREADABLE:
        return None
    digest, ids = b"", _NO_IDS
    turns = []
    for message in seen:
        digest = _digest(digest + message.digest)
        if message.tool_ids is not None:
            ids = ids | message.tool_ids if message.tool_ids else ids
            turns.append(Turn(digest, ids, _unique(message.tool_ids)))
    return Conversation(digest, ids, tuple(turns))


def _unique(tool_ids: frozenset[str] | None) -> frozenset[str]:
    return frozenset(filter(_RANDOM.search, tool_ids)) if tool_ids else _NONE


def _seen(raw: Raw, known: Recent[bytes, Seen] | None) -> Seen:
    if known is None:
        return _read(_MESSAGE.decode(raw))
    key = _digest(raw)
    found = known.get(key)
    if found is None:
        found = _read(_MESSAGE.decode(raw))
        known.put(key, found)
    return found


def verbatim(message: Mapping[str, Any]) -> Any:
    """What of a message a template may show, less what only spells it: blanks around an answer,
    the form of its tool calls' JSON, ids of calls, cache marks. Reasoning in a field of its own is
    left out; reasoning in the text is text."""
    if message.get("role") != "assistant":
        return _other(message, _shown)
    text = _shown(message.get("content")) or ""
    more = {k: v for k, v in message.items() if k not in _SPELLED and k not in _MOVING and v}
    text = text.strip() if isinstance(text, str) else text
    return ["assistant", text, _named_calls(message), more]


def _read(message: Mapping[str, Any]) -> Seen:
    is_assistant = message.get("role") == "assistant"
    canonical = _assistant(message) if is_assistant else _other(message, _text)
    ids = tool_ids_of(message) if is_assistant else None
    return Seen(_digest(msgspec.json.encode(canonical, order="sorted")), ids)


def _digest(data: bytes | Raw) -> bytes:
    """SHA-256, which processors compute at twice the speed of BLAKE2b, cut short."""
    return hashlib.sha256(data).digest()[:_DIGEST_BYTES]


def _assistant(message: Mapping[str, Any]) -> list[Any]:
    text = _text(message.get("content")) or ""
    if isinstance(text, str):
        text = _THOUGHT.sub("", text).strip()
    return ["assistant", text, _named_calls(message)]


def _named_calls(message: Mapping[str, Any]) -> list[list[Any]]:
    return [[f.get("name"), _arguments(f.get("arguments"))] for _, f in _calls(message)]


def _other(message: Mapping[str, Any], read: Callable[[object], Any]) -> dict[str, Any]:
    kept = {k: v for k, v in message.items() if k != "tool_call_id" and k not in _MOVING}
    kept["content"] = read(message.get("content"))
    return kept


def _text(content: object) -> Any:
    """Content as text where it is only text; other parts as they are, without moving marks."""
    if not isinstance(content, list):
        return content
    parts = _unmarked(content)
    texts = _texts(parts)
    return "".join(texts) if len(texts) == len(parts) else parts


def _shown(content: object) -> Any:
    """The same to the letter: a template may put something between several parts, as vLLM does."""
    if not isinstance(content, list):
        return content
    parts = _unmarked(content)
    texts = _texts(parts)
    return texts[0] if len(texts) == len(parts) == 1 else parts


def _unmarked(parts: list[Any]) -> list[Any]:
    return [
        {k: v for k, v in part.items() if k not in _MOVING} if isinstance(part, dict) else part
        for part in parts
    ]


def _texts(parts: list[Any]) -> list[str]:
    """Of those parts that are text."""
    return [
        part["text"]
        for part in parts
        if isinstance(part, dict)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    ]


def _arguments(arguments: object) -> object:
    """Arguments as the value they spell; as they are where they spell none."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return msgspec.json.decode(arguments)
    except UNREADABLE:
        return arguments


def _calls(message: Mapping[str, Any]) -> Iterator[tuple[object, dict[str, Any]]]:
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            yield call.get("id"), function


def tool_ids_of(message: Mapping[str, Any]) -> frozenset[str]:
    """Of a message's tool calls."""
    return frozenset(call_id for call_id, _ in _calls(message) if isinstance(call_id, str))

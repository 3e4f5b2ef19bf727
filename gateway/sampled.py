"""Which earlier answer of ours a chat request goes on from, and the ids that were sampled for it.
Pure; lives on the event loop.

Unlike ``conversation``, which recognises a run by anything that reads alike, this must never put
into a prompt what the agent took out of its history. So a chain of digests stands for everything
that a template may show: all fields of the request but those that only steer sampling, and every
message to the letter. Three things may differ, because they are another spelling of one turn:
blanks around an answer, the JSON of its tool calls, and reasoning in a field of its own that did
not come back. Reasoning that comes back changed, or thoughts cut out of the text, are edits.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from driftgate.errors import UNREADABLE
from driftgate.gateway.conversation import tool_ids_of, verbatim
from driftgate.gateway.openai import Fields, read
from driftgate.gateway.sessions import MAX_CANDIDATES

__all__ = ["SAMPLING", "VARYING", "Chain", "Link", "Memory", "Sampled", "read_chain"]

SAMPLING = frozenset((
    "temperature", "top_p", "top_k", "min_p", "seed", "n", "max_tokens", "max_completion_tokens",
    "min_tokens", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    "skip_special_tokens", "spaces_between_special_tokens", "stream", "stream_options",
    "stream_interval", "logprobs", "top_logprobs", "logprob_token_ids", "prompt_logprobs",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "length_penalty", "logit_bias",
    "allowed_token_ids", "bad_words", "structured_outputs", "guided_json", "guided_regex",
    "guided_choice", "guided_grammar", "guided_decoding_backend", "repetition_detection",
    "thinking_token_budget", "parallel_tool_calls", "include_reasoning", "user", "metadata",
    "store", "priority", "request_id", "session_id", "cache_salt", "return_token_ids",
    "return_tokens_as_token_ids", "service_tier", "safety_identifier", "prompt_cache_key",
))  # fmt: skip
"""Fields of a chat request that no template sees. Any other one, known or not, has to be the same
in both calls."""

VARYING = ("tool_choice", "response_format")
"""Fields that agents change from call to call and that few templates show. Where they differ, two
renderings are compared."""

MAX_BYTES = 256 << 20
"""Of all answers; as JSON a token takes six bytes: 1,300 answers at 32k tokens. Behind a forgotten
one the engine's rendering is used."""

ENTRY_BYTES = 1024
"""Counted per answer besides its ids."""

HIDDEN = b"hidden"
"""Stands for reasoning that was sampled and not told, as far as its text goes."""

_MARK = re.compile(r"[<\[|/][^<>\[\]{}\s]{0,16}think", re.IGNORECASE)
"""Of reasoning, as templates write it: ``</think>``, ``[/THINK]``, ``<|END_THINKING|>``."""

_DIGEST_BYTES = 16
_MESSAGES = msgspec.json.Decoder(list[dict[str, Any]])

Thoughts = tuple[bytes | None, ...]
"""Of each assistant message up to one: the digest of its reasoning, or ``HIDDEN``; None where it
has none."""


class Link(NamedTuple):
    """A request's messages up to and including one."""

    digest: bytes
    tool_ids: frozenset[str]
    thoughts: Thoughts


class Chain(NamedTuple):
    """A chat request as a template sees it."""

    end: Link
    """All of its messages."""
    answers: tuple[tuple[int, Link], ...]
    """Up to each assistant message, with its position."""
    varying: dict[str, bytes]
    hides: bool = False
    """Answers are told without their reasoning."""

    def after(self, message: Mapping[str, Any], spoken: str | None = None) -> Link:
        """``message``, an answer to this request, behind it; ``spoken``: the text of all of its
        tokens, where it is known."""
        link = _next(self.end, {**message, "role": "assistant"})
        told = link.thoughts[-1] is not None
        if told or not (self.hides or (spoken is not None and _holds_more(spoken, message))):
            return link
        return link._replace(thoughts=(*link.thoughts[:-1], HIDDEN))


class Sampled(NamedTuple):
    """An answer of ours, and all that stood before it."""

    trace_id: str
    trajectory: str
    tool_ids: frozenset[str]
    thoughts: Thoughts
    varying: dict[str, bytes]
    prompt_ids: bytes
    response_ids: bytes
    """JSON arrays."""

    @property
    def size_bytes(self) -> int:
        """Memory, about."""
        return ENTRY_BYTES + len(self.prompt_ids) + len(self.response_ids)

    @property
    def length(self) -> int:
        """Tokens of both."""
        return self.prompt_ids.count(b",") + self.response_ids.count(b",") + 2

    @property
    def last_id(self) -> int:
        """The last sampled one."""
        return int(self.response_ids[1:-1].rpartition(b",")[2])

    @property
    def ids(self) -> tuple[bytes, bytes]:
        """What tells two samples apart."""
        return self.prompt_ids, self.response_ids


class Known(NamedTuple):
    """The last answer among a request's messages whose ids can be kept."""

    position: int
    """Of its message."""
    sampled: Sampled
    thoughts: Thoughts
    """Up to it, with those that did not come back."""


def read_chain(fields: Fields, tokenizer: str | None) -> Chain | None:
    """Of a chat request; None where its messages are not a list of objects. ``tokenizer`` stands
    for what gives the ids."""
    try:
        messages = _MESSAGES.decode(fields.get("messages", b""))
        shown = {
            name: value
            for name, raw in fields.items()
            if name not in SAMPLING and name not in VARYING and name != "messages"
            if (value := msgspec.json.decode(raw)) is not None
        }
        link = Link(_digest(_canonical([tokenizer, shown])), frozenset(), ())
        answers = list[tuple[int, Link]]()
        for position, message in enumerate(messages):
            link = _next(link, message)
            if message.get("role") == "assistant":
                answers.append((position, link))
    except UNREADABLE:
        return None
    varying = {name: bytes(fields[name]) for name in VARYING if name in fields}
    hides = read(fields, "include_reasoning", bool) is False
    return Chain(link, tuple(answers), varying, hides)


def _holds_more(spoken: str, message: Mapping[str, Any]) -> bool:
    """More was sampled before the words that were told: marks of reasoning that was empty."""
    text = message.get("content")
    if isinstance(text, str) and (text := text.strip()):
        return not spoken.lstrip().startswith(text)
    return _MARK.search(spoken.partition("{")[0]) is not None


def _next(link: Link, message: Mapping[str, Any]) -> Link:
    digest = _digest(link.digest + _canonical(verbatim(message)))
    if message.get("role") != "assistant":
        return Link(digest, link.tool_ids, link.thoughts)
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    thought = _digest(_canonical(reasoning)) if reasoning else None
    return Link(digest, link.tool_ids | tool_ids_of(message), (*link.thoughts, thought))


def _canonical(value: Any) -> bytes:
    return msgspec.json.encode(value, order="sorted")


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_DIGEST_BYTES]


class Memory:
    """Answers by what stands for them and all before them. Not thread-safe."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._known: OrderedDict[bytes, tuple[Sampled, ...]] = OrderedDict()

    def put(self, link: Link, sampled: Sampled) -> None:
        """Remember one, then forget what was not used for longest."""
        earlier = self._known.get(link.digest, ())
        if any(one.trace_id == sampled.trace_id for one in earlier):
            return
        kept = (*earlier, sampled)[-MAX_CANDIDATES:]
        self._known[link.digest] = kept
        self._known.move_to_end(link.digest)
        self._size_bytes += _size(kept) - _size(earlier)
        while self._size_bytes > self._max_bytes and len(self._known) > 1:
            _, forgotten = self._known.popitem(last=False)
            self._size_bytes -= _size(forgotten)

    def find(self, chain: Chain, trajectory: str) -> tuple[Known | None, str | None]:
        """The last answer of ``trajectory`` among the messages, and why no later one counts."""
        why: str | None = None
        for position, link in reversed(chain.answers):
            found = self._known.get(link.digest, ())
            same = [one for one in found if one.trajectory == trajectory]
            fit = [one for one in same if _fit(link.thoughts, one.thoughts)]
            fit = [one for one in fit if one.tool_ids == link.tool_ids] or fit
            if len({one.ids for one in fit}) > 1:
                why = why or f"message {position}: {len(fit)} samples of this run read the same"
            elif fit:
                self._known.move_to_end(link.digest)
                return Known(position, fit[-1], _joined(link.thoughts, fit[-1].thoughts)), why
            elif same:
                why = why or f"message {position}: its reasoning, or one before, came back changed"
            else:
                why = why or (
                    f"message {position}: not an answer of this run as it was given, to the same "
                    "messages and tools"
                )
        return None, why


def _size(entries: Sequence[Sampled]) -> int:
    return sum(entry.size_bytes for entry in entries)


def _fit(given: Thoughts, known: Thoughts) -> bool:
    """Reasoning may be left out, and must be what it was where it is not."""
    return all(mine is None or mine == its for mine, its in zip(given, known, strict=True))


def _joined(given: Thoughts, known: Thoughts) -> Thoughts:
    return tuple(its or mine for mine, its in zip(given, known, strict=True))

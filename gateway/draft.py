"""An answer's or chunk's fields, typed, and what has come for one choice so far. Pure.

A draft costs some 20 bytes a token, whether the answer comes in one piece or in a hundred thousand
events: numbers stay digits or machine numbers, texts stay in buffers."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, TypeAlias

import msgspec
from msgspec import Raw

from driftgate.errors import UNREADABLE
from driftgate.gateway.messages import Delta, Message
from driftgate.gateway.pieces import Pieces, Row
from driftgate.gateway.texts import says_bytes, token_texts
from driftgate.trace import WeightSpan

__all__ = ["HEAD", "Choice", "Draft", "Head", "Odd", "Usage", "given", "read_choice"]

MAX_COUNT = 1 << 63
"""Of tokens: the store holds no larger number."""

ALIGNED = ("index", "token_ids", "logprobs")
"""Fields of a choice without which the rest of it belongs to no token."""

Odd: TypeAlias = dict[str, str]
"""Fields that cannot be read, and why; the rest of their answer is whole."""

_NULL = Raw(b"null")
_NO_ALTERNATIVES = (b"", b"null", b"[]", b"{}")


class _Row(msgspec.Struct, gc=False):
    token: str = ""
    logprob: float | None = None
    bytes: list[int] | None = None
    top_logprobs: Raw = Raw()


class _Rows(msgspec.Struct, gc=False):
    content: list[_Row] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: Raw = Raw()


class Choice(msgspec.Struct):
    index: int = 0
    delta: Delta | None = None
    message: Delta | None = None
    text: str | None = None
    logprobs: _Rows | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: Raw = Raw()
    routed_experts: Raw = Raw()
    weight_spans: list[WeightSpan] = []


class Usage(msgspec.Struct):
    """Each count is read by itself, in any spelling: a surprise in one must not cost the
    capture."""

    said_prompt: Any = msgspec.field(default=None, name="prompt_tokens")
    said_completion: Any = msgspec.field(default=None, name="completion_tokens")
    prompt_tokens_details: Any = None
    completion_tokens_details: Any = None

    @property
    def prompt_tokens(self) -> int | None:
        """Of all choices."""
        return _number(self.said_prompt)

    @property
    def completion_tokens(self) -> int | None:
        """Of all choices."""
        return _number(self.said_completion)

    @property
    def reasoning_tokens(self) -> int | None:
        """Sampled tokens that are reasoning, where the engine counts them."""
        return _count(self.completion_tokens_details, "reasoning_tokens")

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens from the engine's prefix cache, where it counts them."""
        return _count(self.prompt_tokens_details, "cached_tokens")


def _count(details: object, name: str) -> int | None:
    return _number(details.get(name)) if isinstance(details, dict) else None


def _number(said: object) -> int | None:
    """2, 2.0 and "2" are one count."""
    if said is None:
        return None
    try:  # which takes microseconds, and nearly all counts are numbers
        count = said if type(said) is int else msgspec.convert(said, int, strict=False)
    except msgspec.ValidationError:
        return None
    return count if 0 <= count < MAX_COUNT else None


class Head(msgspec.Struct):
    choices: list[Raw] = []
    prompt_token_ids: Raw = Raw()
    said_usage: Raw = msgspec.field(default=Raw(), name="usage")
    said_fingerprint: Any = msgspec.field(default=None, name="system_fingerprint")
    error: Raw = Raw()

    def usage(self, odd: Odd) -> Usage | None:
        """What of it cannot be read is put into ``odd``."""
        if given(self.said_usage) is None:
            return None
        try:
            usage = _USAGE.decode(self.said_usage)
        except UNREADABLE as error:
            odd.setdefault("usage", str(error))
            return None
        if usage.said_prompt is not None and usage.prompt_tokens is None:
            odd.setdefault("usage.prompt_tokens", "it is no count")
        if usage.said_completion is not None and usage.completion_tokens is None:
            odd.setdefault("usage.completion_tokens", "it is no count")
        return usage

    def fingerprint(self, odd: Odd) -> str | None:
        """``system_fingerprint``, likewise."""
        said = self.said_fingerprint
        if said is None or isinstance(said, str):
            return said
        odd.setdefault("system_fingerprint", "it is no text")
        return None


HEAD = msgspec.json.Decoder(Head)
_USAGE = msgspec.json.Decoder(Usage)
_CHOICE = msgspec.json.Decoder(Choice)
_PARTS = {part.name: msgspec.json.Decoder(part.type) for part in msgspec.structs.fields(Choice)}
_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_SHORT_ROWS = msgspec.json.Decoder(list[Row])
_RAWS = msgspec.json.Decoder(list[Raw])
_LONG_ROWS = msgspec.json.Decoder(list[_Row])


def given(raw: Raw) -> Raw | None:
    """None for a field that is absent or null."""
    return raw if raw and raw != _NULL else None


def read_choice(raw: Raw, position: int | None = None) -> tuple[Choice, Odd]:
    """A choice, of which a field that cannot be read costs no other. One of ``UNREADABLE`` where
    it is none, or its tokens cannot be read. ``position``: its index, where that is not said."""
    try:
        return _CHOICE.decode(raw), {}
    except UNREADABLE:
        fields = _FIELDS.decode(raw)
    choice, odd = Choice(index=position or 0), Odd()
    for name, part in _PARTS.items():
        try:
            if name in fields:
                setattr(choice, name, part.decode(fields[name]))
        except UNREADABLE as error:
            if name in ALIGNED and not (name == "index" and position is not None):
                raise msgspec.ValidationError(f"{name}: {error}") from error
            odd[name] = str(error)
    return choice, odd


def _list_of(raw: Raw) -> list[Raw]:
    """Empty where it is no list: nothing else of an answer depends on it."""
    try:
        return _RAWS.decode(raw)
    except UNREADABLE:
        return []


@dataclass(slots=True, kw_only=True)
class Draft:
    """What came for one choice so far."""

    index: int
    prompt_ids: bytes | None = None
    """The JSON array: thousands of ids are read by numpy, not into Python integers."""
    ids: bytearray | None = None
    """The same without its brackets; None until some came."""
    logprobs: array[float] = field(default_factory=lambda: array("f"))
    """One for each row; 0 where none came."""
    nulls: int = 0
    """Rows without a logprob."""
    rows: bool = False
    """Rows came, be it none."""
    token_bytes: bytearray = field(default_factory=bytearray)
    lengths: array[int] = field(default_factory=lambda: array("i"))
    """Of each row's text, in bytes."""
    nameless: bool = False
    """A row does not say its text."""
    alternatives: list[bytes] = field(default_factory=list)
    """JSON of each row's ``top_logprobs`` up to the last that has any: an agent asked for them."""
    alternatives_bytes: int = 0
    message: Message | None = None
    text: StringIO | None = None
    routes: bytes | None = None
    """Base64."""
    weight_spans: list[WeightSpan] = field(default_factory=list)
    """Where the answer says them."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    response: bytes | None = None
    missing: list[str] = field(default_factory=list)
    odd: Odd = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Memory, about."""
        texts = self.message.size_chars if self.message is not None else 0
        texts += self.text.tell() if self.text is not None else 0
        parts = (self.prompt_ids, self.ids, self.token_bytes, self.routes, self.response)
        arrays = 4 * (len(self.logprobs) + len(self.lengths)) + self.alternatives_bytes
        return texts + arrays + sum(len(part) for part in parts if part is not None)

    @property
    def row_count(self) -> int | None:
        """Rows of logprobs; None where none came."""
        return len(self.logprobs) if self.rows else None

    def count_ids(self) -> int:
        """How many response ids came."""
        return self.ids.count(b",") + 1 if self.ids else 0

    def ids_array(self) -> bytes | None:
        """The response ids as a JSON array; None where none came."""
        return None if self.ids is None else b"".join([b"[", self.ids, b"]"])

    def add(self, choice: Choice, odd: Odd) -> None:
        self.odd = odd | self.odd
        if (prompt_ids := given(choice.prompt_token_ids)) is not None:
            self.prompt_ids = bytes(prompt_ids)
        if choice.token_ids is not None:
            self.add_ids(",".join(map(str, choice.token_ids)).encode())
        if choice.logprobs is not None:
            self._add_logprobs(choice.logprobs)
        delta = choice.delta or choice.message
        if delta is not None:
            self.add_deltas([delta])
        if choice.text is not None:
            self.text = self.text or StringIO()
            self.text.write(choice.text)
        if choice.finish_reason is not None:
            self.finish_reason = choice.finish_reason
        if choice.stop_reason is not None:
            self.stop_reason = choice.stop_reason
        self.weight_spans = choice.weight_spans or self.weight_spans
        self.add_routes(choice.routed_experts)

    def add_pieces(self, pieces: Pieces) -> None:
        """What was taken out of the only choice of an answer."""
        self.prompt_ids, self.ids = pieces.prompt_token_ids, bytearray(pieces.token_ids[1:-1])
        self.add_named(pieces.tokens, pieces.logprobs)
        if pieces.routed_experts is not None:
            self.add_routes(pieces.routed_experts)

    def add_ids(self, digits: bytes) -> None:
        """Response ids, separated by commas."""
        if self.ids is None:
            self.ids = bytearray()
        if self.ids and digits:
            self.ids += b","
        self.ids += digits

    def add_deltas(self, deltas: Sequence[Delta]) -> None:
        if self.message is None:
            self.message = Message()
        self.message.add(deltas)

    def add_rows(self, array: bytes) -> None:
        """Rows of chat logprobs, as JSON; one of ``UNREADABLE`` where they are none."""
        rows = _SHORT_ROWS.decode(array)
        tokens = [row.token for row in rows]
        if says_bytes("".join(tokens)):
            self.add_named(tokens, [row.logprob for row in rows])
        else:
            self._add_logprobs(_Rows(content=_LONG_ROWS.decode(array)))

    def add_named(self, tokens: list[str], logprobs: list[float]) -> None:
        """Rows whose texts say their bytes. ``fromlist`` takes half of the time of ``extend``."""
        self.rows = True
        self.logprobs.fromlist(logprobs)
        joined = "".join(tokens)
        self.token_bytes += joined.encode()
        encoded = tokens if joined.isascii() else [token.encode() for token in tokens]
        self.lengths.fromlist(list(map(len, encoded)))

    def add_routes(self, raw: Raw) -> None:
        if given(raw) is None:
            return
        view = memoryview(raw)
        text = bytes(view[1:-1])
        if b"\\" in text or view[0] != ord('"'):
            try:
                text = msgspec.json.decode(raw, type=str).encode()
            except UNREADABLE as error:
                self.missing.append(f"routed_experts: {error}")
                return
        self.routes = text

    def _add_logprobs(self, rows: _Rows) -> None:
        if rows.content is not None:
            values = [row.logprob for row in rows.content]
            texts = token_texts((row.token, row.bytes) for row in rows.content)
            self._add_alternatives([row.top_logprobs for row in rows.content])
        elif rows.tokens is not None and rows.token_logprobs is not None:
            values = rows.token_logprobs
            texts = token_texts((token, None) for token in rows.tokens)
            self._add_alternatives(_list_of(rows.top_logprobs))
        else:
            return
        self.rows = True
        self.nulls += values.count(None)
        self.logprobs.extend([0.0 if value is None else value for value in values])
        self.nameless = self.nameless or None in texts
        for text in texts:
            self.token_bytes += text or b""
            self.lengths.append(len(text or b""))

    def _add_alternatives(self, rows: Sequence[Raw]) -> None:
        """Of the rows that are about to be added."""
        first = len(self.logprobs)
        for number, raw in enumerate(rows, first):
            if (said := bytes(raw)) not in _NO_ALTERNATIVES:
                self.alternatives += [b"[]"] * (number - len(self.alternatives))
                self.alternatives.append(said)
                self.alternatives_bytes += len(said)

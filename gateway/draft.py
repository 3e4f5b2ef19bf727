"""An answer's or chunk's fields, typed, and what has come for one choice so far. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import Raw

from driftgate.gateway.messages import Delta
from driftgate.gateway.pieces import Pieces
from driftgate.gateway.texts import token_texts

__all__ = ["CHOICE", "HEAD", "Choice", "Draft", "Head", "Usage", "given"]

_NULL = Raw(b"null")


class _Row(msgspec.Struct):
    token: str = ""
    logprob: float | None = None
    bytes: list[int] | None = None


class _Rows(msgspec.Struct):
    content: list[_Row] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None


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


class Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Any = None
    """Whatever an engine puts here: a surprise in it must not cost the capture."""

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens from the engine's prefix cache, where it counts them."""
        details = self.prompt_tokens_details
        count = details.get("cached_tokens") if isinstance(details, dict) else None
        return count if isinstance(count, int) else None


class Head(msgspec.Struct):
    choices: list[Raw] = []
    prompt_token_ids: Raw = Raw()
    usage: Usage | None = None
    system_fingerprint: str | None = None
    error: Raw = Raw()


HEAD = msgspec.json.Decoder(Head)
CHOICE = msgspec.json.Decoder(Choice)


def given(raw: Raw) -> Raw | None:
    """None for a field that is absent or null."""
    return raw if raw and raw != _NULL else None


@dataclass(slots=True, kw_only=True)
class Draft:
    """What came for one choice so far."""

    index: int
    prompt_ids: Raw | None = None
    """Not parsed yet: thousands of ids are read by numpy, not into Python integers."""
    ids: list[int] | None = None
    rows: int | None = None
    logprobs: list[float | None] = field(default_factory=list)
    texts: list[bytes | None] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    routes: bytes | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    response: bytes | None = None
    missing: list[str] = field(default_factory=list)

    def add(self, choice: Choice) -> None:
        self.prompt_ids = given(choice.prompt_token_ids) or self.prompt_ids
        if choice.token_ids is not None:
            self.ids = self.ids or []
            self.ids.extend(choice.token_ids)
        if choice.logprobs is not None:
            self._add_rows(choice.logprobs)
        delta = choice.delta or choice.message
        if delta is not None:
            self.deltas.append(delta)
        if choice.text is not None:
            self.text.append(choice.text)
        if choice.finish_reason is not None:
            self.finish_reason = choice.finish_reason
        if choice.stop_reason is not None:
            self.stop_reason = choice.stop_reason
        self.add_routes(choice.routed_experts)

    def add_pieces(self, pieces: Pieces) -> None:
        """What was taken out of the only choice of an answer."""
        self.prompt_ids, self.ids = pieces.prompt_token_ids, pieces.token_ids
        self.rows = len(pieces.rows)
        self.logprobs = [row.logprob for row in pieces.rows]
        self.texts = [row.token.encode() for row in pieces.rows]
        if pieces.routed_experts is not None:
            self.add_routes(pieces.routed_experts)

    def add_routes(self, raw: Raw) -> None:
        if given(raw) is not None:
            self.routes = msgspec.json.decode(raw, type=str).encode()

    def _add_rows(self, rows: _Rows) -> None:
        if rows.content is not None:
            values = [row.logprob for row in rows.content]
            texts = token_texts((row.token, row.bytes) for row in rows.content)
        elif rows.tokens is not None and rows.token_logprobs is not None:
            values = rows.token_logprobs
            texts = token_texts((token, None) for token in rows.tokens)
        else:
            return
        self.rows = (self.rows or 0) + len(values)
        self.logprobs += values
        self.texts += texts

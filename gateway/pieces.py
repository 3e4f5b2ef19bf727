"""Takes the long arrays out of an answer by searching for their keys: little is left to parse.

Nine tenths of an answer are ids and logprobs. A search finds where they begin and end at the speed
of ``memchr``; a parser looks at each of their bytes, once for the agent's answer and again for the
fold. Only the form that vLLM gives for one chat choice is taken apart, and what was found is
proven: rows must parse as a whole array, and the rest must be JSON in which a mark stands exactly
where each array stood. Any other answer is parsed as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
from msgspec import Raw

from driftgate.errors import UNREADABLE
from driftgate.gateway.texts import says_bytes

__all__ = ["Pieces", "Row", "check_text", "take_apart"]

_ROWS_KEY = b'"logprobs":{"content":['
_ROWS_END = b']},"finish_reason":'
_IDS_KEY = b'"token_ids":['
_ROUTES_KEY = b'"routed_experts":"'
_PROMPT_KEY = b'"prompt_token_ids":['

_MARK = Raw(b"0")
"""Stands in the rest for what was taken out; none of these fields can be a number."""


class Row(msgspec.Struct, gc=False):
    """A sampled token. Its text says its bytes, so their list is passed over."""

    token: str
    logprob: float


_NULL = Raw(b"null")
_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_CHOICES = msgspec.json.Decoder(list[dict[str, Raw]])
_ROWS = msgspec.json.Decoder(list[Row])
_IDS = msgspec.json.Decoder(list[int])
_ENCODER = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """An answer of one choice, taken apart."""

    fields: dict[str, Raw]
    """The answer's, with null for what was taken out."""
    choice: dict[str, Raw]
    """The choice's, with null for what was taken out."""
    tokens: list[str]
    """The sampled tokens' texts, which say their bytes."""
    logprobs: list[float]
    """Theirs."""
    token_ids: bytes
    """A JSON array of integers."""
    prompt_token_ids: bytes
    """A JSON array, not parsed: thousands of numbers are for numpy to read, off the loop."""
    routed_experts: Raw | None
    """A JSON string; None where none came."""

    def rest(self) -> bytes:
        """The answer with null for what was taken out."""
        return _ENCODER.encode({**self.fields, "choices": [self.choice]})


def take_apart(body: bytes) -> Pieces | None:
    """The pieces of an answer; None where it has another form than the one known here."""
    rows_at, rows_end = body.find(_ROWS_KEY), body.find(_ROWS_END)
    ids_at, prompt_at = body.find(_IDS_KEY, rows_end), body.rfind(_PROMPT_KEY)
    if not 0 < rows_at < rows_end < ids_at < prompt_at:
        return None
    logprobs = rows_at + len(b'"logprobs":'), rows_end + len(b"]}")
    ids = _span(body, ids_at, _IDS_KEY, b"]")
    prompt = _span(body, prompt_at, _PROMPT_KEY, b"]")
    spans = {"logprobs": logprobs, "token_ids": ids}
    routes_at = body.find(_ROUTES_KEY, ids[1], prompt[0])
    if routes_at > 0:
        spans["routed_experts"] = _span(body, routes_at, _ROUTES_KEY, b'"')
    rest = _rest(body, [*spans.values(), prompt])
    try:
        check_text(body)
        fields = _FIELDS.decode(rest)
        (choice,) = _CHOICES.decode(fields.get("choices", b"[]"))
        rows = _ROWS.decode(memoryview(body)[rows_at + len(_ROWS_KEY) - 1 : rows_end + 1])
        _IDS.decode(token_ids := body[slice(*ids)])
    except (*UNREADABLE, ValueError):  # also where there is not one choice
        return None
    if not (_take(fields, ["prompt_token_ids"]) and _take(choice, spans)):
        return None
    tokens = [row.token for row in rows]
    if not says_bytes("".join(tokens)):
        return None
    routes = spans.get("routed_experts")
    return Pieces(
        fields=fields,
        choice=choice,
        tokens=tokens,
        logprobs=[row.logprob for row in rows],
        token_ids=token_ids,
        prompt_token_ids=body[slice(*prompt)],
        routed_experts=Raw(body[slice(*routes)]) if routes else None,
    )


def check_text(data: bytes) -> None:
    """UnicodeDecodeError where it is not UTF-8: msgspec looks at a text only where it is read."""
    if not data.isascii():
        data.decode()


def _span(body: bytes, at: int, key: bytes, end: bytes) -> tuple[int, int]:
    """Where the value of the ``key`` at ``at`` begins and ends."""
    start = at + len(key)
    return start - 1, body.find(end, start) + 1


def _rest(body: bytes, spans: Iterable[tuple[int, int]]) -> bytes:
    """The body with marks in place of ``spans``, which are in order."""
    kept, at = [], 0
    for start, end in spans:
        kept.append(body[at:start])
        at = end
    return bytes(_MARK).join([*kept, body[at:]])


def _take(fields: dict[str, Raw], names: Iterable[str]) -> bool:
    """Put null for each mark; False where one is not where it should be."""
    for name in names:
        if fields.get(name) != _MARK:
            return False
        fields[name] = _NULL
    return True

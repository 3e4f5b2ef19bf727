"""The alternatives that an agent asked for (``top_logprobs``), out of a stored answer. Pure.

Their tokens have no ids: an engine gives texts. So they are shown, and nothing is computed of them.
"""

from __future__ import annotations

from collections.abc import Sized

import msgspec

from driftgate.errors import UNREADABLE

__all__ = ["Alternative", "alternatives"]


class Alternative(msgspec.Struct, frozen=True, kw_only=True):
    """A token that the engine found likely at some place."""

    text: str
    logprob: float | None
    """Nats, as the engine reported it."""


_KEY = b'"top_logprobs"'


class _Top(msgspec.Struct):
    token: str = ""
    logprob: float | None = None


class _Row(msgspec.Struct):
    top_logprobs: list[_Top] = []


class _Logprobs(msgspec.Struct):
    content: list[_Row] | None = None
    top_logprobs: list[dict[str, float | None] | list[None] | None] | None = None


class _Choice(msgspec.Struct):
    logprobs: _Logprobs | None = None


_CHOICE = msgspec.json.Decoder(_Choice)


def alternatives(response: bytes, *, tokens: Sized | None) -> list[list[Alternative]] | None:
    """Of each of the sampled ``tokens``; None where none were asked for, or not one list for each.

    ``response``: as ``Trace.response``, of a chat completion or a completion.
    """
    found = _read(response) if _KEY in response else None
    return found if found and tokens is not None and len(found) == len(tokens) else None


def _read(response: bytes) -> list[list[Alternative]] | None:
    try:
        said = _CHOICE.decode(response).logprobs
    except UNREADABLE:
        return None
    if said is None:
        return None
    if said.content is not None:
        return [
            [Alternative(text=top.token, logprob=top.logprob) for top in row.top_logprobs]
            for row in said.content
        ]
    return [
        [Alternative(text=text, logprob=logprob) for text, logprob in row.items()]
        if isinstance(row, dict)
        else []
        for row in said.top_logprobs or []
    ]

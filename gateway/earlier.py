"""Responses that a later call may name by ``previous_response_id``.

Kept in memory up to a size, and found in the store beyond that and after a restart: a trace holds
request and response, and a response's id names its call. Each response keeps only what its own
call added; the conversation is the chain of them. ``store: false`` is honoured: such a response is
traced like any other and cannot be named or read again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from driftgate.errors import NotFoundError, RequestError
from driftgate.gateway import openai
from driftgate.gateway.openai import Fields
from driftgate.histories import messages_of_input
from driftgate.spoken import message_of
from driftgate.storage import Reader

__all__ = ["MAX_CHAIN", "MAX_KEPT_BYTES", "Earlier", "Kept", "kept_of"]

MAX_KEPT_BYTES = 64 << 20
"""Of requests' inputs and answers: some ten thousand calls. What was forgotten is read from the
store, in a millisecond."""

MAX_CHAIN = 10_000
"""Responses of one conversation: ten times the longest agents, and an end to a damaged chain."""

LONG_BYTES = 1 << 20
"""Of a conversation: 8 MB took 90 ms to read, so longer ones are read on a thread."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One response."""

    trajectory: str
    previous: str | None
    input: bytes
    """As it was asked, JSON."""
    body: bytes
    """The response."""

    @property
    def size_bytes(self) -> int:
        """Memory, about."""
        return len(self.input) + len(self.body) + 500


class Earlier:
    """All of one gateway. Use it on the event loop."""

    def __init__(self, reader: Reader | None, redacted: Sequence[str]) -> None:
        """``redacted``: paths of request fields that the store does not hold."""
        holds = not any(path.split(".")[0] in ("input", "*") for path in redacted)
        self._reader = reader if holds else None
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._size_bytes = 0

    def remember(self, response_id: str, kept: Kept) -> None:
        """Keep a response; the least recently used ones make room."""
        self._kept[response_id] = kept
        self._size_bytes += kept.size_bytes
        while self._size_bytes > MAX_KEPT_BYTES:
            _, gone = self._kept.popitem(last=False)
            self._size_bytes -= gone.size_bytes

    async def find(self, response_id: str, *, only: str | None = None) -> Kept:
        """The response. NotFoundError where it is not known, was not to be stored, did not end, or
        belongs to another trajectory than ``only``."""
        kept = self._kept.get(response_id)
        if kept is not None:
            self._kept.move_to_end(response_id)
        elif self._reader is not None:
            kept = await asyncio.to_thread(_read, self._reader, response_id)
        if kept is None or only not in (None, kept.trajectory):
            raise NotFoundError(
                f"Response with id {response_id[:100]!r} not found: it is not one of this "
                "gateway's, was asked with store: false, or did not end; send the conversation "
                "as input"
            )
        return kept

    async def conversation(self, response_id: str, *, only: str | None = None) -> list[Any]:
        """Chat messages up to and including the response. NotFoundError as in `find`."""
        chain: list[Kept] = []
        named: str | None = response_id
        while named is not None and len(chain) < MAX_CHAIN:
            chain.append(await self.find(named, only=only))
            named = chain[-1].previous
        is_long = sum(kept.size_bytes for kept in chain) > LONG_BYTES
        return await asyncio.to_thread(_messages, chain) if is_long else _messages(chain)


def _messages(chain: Sequence[Kept]) -> list[Any]:
    messages: list[Any] = []
    for kept in reversed(chain):
        messages += [*messages_of_input(kept.input), message_of(kept.body)]
    return messages


def kept_of(fields: Fields, trajectory: str, body: bytes) -> Kept | None:
    """What is kept of a request's fields and its response; None where it is not to be stored."""
    if openai.read(fields, "store", bool) is False:
        return None
    previous = openai.read(fields, "previous_response_id", str)
    return Kept(trajectory, previous, bytes(fields.get("input", b'""')), body)


def _read(reader: Reader, response_id: str) -> Kept | None:
    """From the store. Blocking."""
    prefix, _, call = response_id.partition("_")
    if prefix != "resp" or not call.isalnum():
        return None
    try:
        trace = reader.trace(f"c-{call}.0")
    except NotFoundError:
        return None
    if trace.meta.api != "responses" or not trace.meta.proof.terminal:
        return None
    try:
        fields = openai.read_request(trace.request)
    except RequestError:
        return None  # it was redacted
    return kept_of(fields, trace.meta.trajectory, trace.response)

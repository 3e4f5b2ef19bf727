"""A completions prompt as bytes whose prefixes can be recognised: does it begin with an earlier
call's prompt and what was sampled for it? Pure.

Where in a prompt earlier answers ended cannot be seen, unlike in a conversation. So a prompt is
hashed block by block, each digest over all blocks before it, and an end is remembered as the digest
of its whole blocks and the bytes behind them. A lookup costs one digest a block, and one dictionary
access for each length at which some end is known behind that block: at most one a byte, whatever
number of prompts is known."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Collection, Iterator
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from driftgate.errors import UNREADABLE

__all__ = ["End", "Kind", "Prompt", "read_prompt"]

Kind: TypeAlias = Literal["text", "ids"]

BLOCK_BYTES = 512
"""Smaller blocks cost more digests, larger ones more lengths to try in each."""

_DIGEST_BYTES = 16

_PROMPT = msgspec.json.Decoder(str | list[int | str | list[int]])


class End(NamedTuple):
    """Where an earlier call's answer ends in a prompt."""

    block: bytes
    """Digest of all whole blocks before the end."""
    tail: bytes
    """What stands between them and the end; shorter than a block."""

    @property
    def key(self) -> bytes:
        """Stands for the whole prefix up to the end."""
        return self.block + self.tail


class Prompt:
    """One prompt. Texts are UTF-8, token ids 4 bytes each; the two are never equal."""

    __slots__ = ("_blocks", "_data", "kind")

    def __init__(self, kind: Kind, data: bytes) -> None:
        self.kind: Kind = kind
        self._data = data
        self._blocks = list(_chain(hashlib.sha256(kind.encode()).digest()[:_DIGEST_BYTES], data))

    def __len__(self) -> int:
        """In bytes."""
        return len(self._data)

    @classmethod
    def of_text(cls, text: str) -> Prompt:
        """A text."""
        return cls("text", _text_bytes(text))

    @classmethod
    def of_ids(cls, ids: Collection[int]) -> Prompt | None:
        """Token ids; None where one of them has more than 32 bits."""
        data = _id_bytes(ids)
        return None if data is None else cls("ids", data)

    def after_text(self, text: str, *, echoed: bool = False) -> End | None:
        """The end of ``text`` sampled for this prompt, a text; ``echoed``: it begins with it."""
        data = _text_bytes(text)
        if not echoed:
            return self._after(data)
        return self._after(data[len(self) :]) if data.startswith(self._data) else None

    def after_ids(self, ids: Collection[int]) -> End | None:
        """The end of ``ids`` sampled for this prompt, token ids."""
        data = _id_bytes(ids)
        return None if data is None else self._after(data)

    def _after(self, sampled: bytes) -> End:
        rest = self._data[(len(self._blocks) - 1) * BLOCK_BYTES :] + sampled
        *_, block = _chain(self._blocks[-1], rest)
        return End(block, rest[len(rest) - len(rest) % BLOCK_BYTES :])

    def known_ends(
        self, lengths: Callable[[bytes], Collection[int] | None]
    ) -> Iterator[tuple[int, bytes]]:
        """``(bytes before it, key)`` of each end that may be known, the last one first.

        ``lengths(block)`` gives the tail lengths of the known ends behind these blocks."""
        for position in range(len(self._blocks) - 1, -1, -1):
            block = self._blocks[position]
            start = position * BLOCK_BYTES
            room = len(self._data) - start
            for length in sorted(lengths(block) or (), reverse=True):
                if length <= room:
                    yield start + length, block + self._data[start : start + length]


def _chain(digest: bytes, data: bytes) -> Iterator[bytes]:
    """``digest``, then one for each whole block of ``data`` behind it."""
    yield digest
    for start in range(0, len(data) - BLOCK_BYTES + 1, BLOCK_BYTES):
        block = digest + data[start : start + BLOCK_BYTES]
        digest = hashlib.sha256(block).digest()[:_DIGEST_BYTES]
        yield digest


def read_prompt(prompt: bytes) -> Prompt | None:
    """A request's ``prompt`` (JSON); None where it is not exactly one text or list of ids."""
    try:
        given = _PROMPT.decode(prompt)
        if isinstance(given, list) and len(given) == 1 and not isinstance(given[0], int):
            given = given[0]
        if isinstance(given, str):
            return Prompt.of_text(given)
        return Prompt.of_ids(msgspec.convert(given, list[int]))
    except UNREADABLE:  # also where it is none of these
        return None


def _text_bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _id_bytes(ids: Collection[int]) -> bytes | None:
    try:
        return array("i", ids).tobytes()
    except OverflowError:
        return None

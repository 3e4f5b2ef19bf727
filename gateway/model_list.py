"""The list of models of several engines as that of one. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec import Raw

from driftgate.errors import UNREADABLE

__all__ = ["united"]


class _Entry(msgspec.Struct):
    id: str


class _List(msgspec.Struct):
    data: list[Raw]


def united(lists: Iterable[bytes]) -> bytes:
    """``GET /v1/models`` answers, put together: each model once, as the first engine says it.

    What cannot be read is left out.
    """
    found: dict[str, Raw] = {}
    for body in lists:
        try:
            for raw in msgspec.json.decode(body, type=_List).data:
                found.setdefault(msgspec.json.decode(raw, type=_Entry).id, raw)
        except UNREADABLE:
            continue
    return msgspec.json.encode({"object": "list", "data": list(found.values())})

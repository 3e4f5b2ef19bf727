"""The API's handler that answers with two cells on the same prompts.

Mounted by ``gateway.api``, whose ``Api`` answers it as it answers its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Protocol

import msgspec
from aiohttp import web

from driftgate.errors import RequestError
from driftgate.gateway.openapi import Route
from driftgate.gateway.pairing import CellName, Pairing
from driftgate.gateway.wire import query_of
from driftgate.live_views import PairedCells
from driftgate.storage import Reader

__all__ = ["ROUTES"]


class Asker(Protocol):
    """What this handler needs of the API: a store, and a thread to read it on."""

    @property
    def reader(self) -> Reader:
        """The store."""
        ...

    async def answer(self, ask: Callable[[], msgspec.Struct]) -> web.Response:
        """``ask()`` on a thread, as JSON."""
        ...


CellText = Annotated[str, msgspec.Meta(description="`ENGINE/TRAINER/MODEL`, digests as in cells")]


class PairQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which cells."""

    a: CellText
    b: CellText


async def get_pair(api: Asker, request: web.Request) -> web.StreamResponse:
    """Two cells over the answers whose prompt both engines were given, by its token ids."""
    query = query_of(request, PairQuery)
    a, b = _cell(query.a), _cell(query.b)
    return await api.answer(lambda: Pairing(api.reader).pair(a, b))


def _cell(text: str) -> CellName:
    parts = text.split("/", 2)  # a model's name may hold slashes
    if len(parts) != 3 or not all(parts):
        raise RequestError(
            f"{text[:200]!r} names no cell: give ENGINE/TRAINER/MODEL as in /api/cells"
        )
    return CellName(*parts)


ROUTES: tuple[Route, ...] = (
    Route(
        method="GET",
        path="/api/cells/pair",
        handler=get_pair,
        query=PairQuery,
        answer=PairedCells,
    ),
)

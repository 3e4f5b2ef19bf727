"""The API's handlers about single cells: two on the same prompts, and the load of experts of one.

Mounted by ``gateway.api``, whose ``Api`` answers them as it answers its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Protocol

import msgspec
from aiohttp import web

from driftgate.errors import RequestError
from driftgate.gateway.loading import expert_load
from driftgate.gateway.openapi import Route
from driftgate.gateway.pairing import CellName, Pairing
from driftgate.gateway.wire import query_of
from driftgate.live_views import ExpertLoad, PairedCells
from driftgate.storage import Reader

__all__ = ["ROUTES"]


class Asker(Protocol):
    """What these handlers need of the API: a store, and a thread to read it on."""

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


class LoadQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which cell."""

    cell: CellText


async def get_load(api: Asker, request: web.Request) -> web.StreamResponse:
    """How a cell's tokens are spread over the experts of each layer, by engine and by trainer."""
    cell = _cell(query_of(request, LoadQuery).cell)
    return await api.answer(lambda: expert_load(api.reader, cell))


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
    Route(
        method="GET",
        path="/api/cells/load",
        handler=get_load,
        query=LoadQuery,
        answer=ExpertLoad,
    ),
)

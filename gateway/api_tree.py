"""The API's handler that answers with a run's tree.

Mounted by ``gateway.api``, whose ``Api`` answers it as it answers its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import msgspec
from aiohttp import web

from driftgate.errors import FormatError, NotFoundError
from driftgate.gateway.openapi import Route
from driftgate.storage import Reader
from driftgate.trace import Trace
from driftgate.tree import Tree, build_tree

__all__ = ["ROUTES", "read_tree"]

log = logging.getLogger("driftgate.api")


class Asker(Protocol):
    """What this handler needs of the API: a store, and a thread to read it on."""

    @property
    def reader(self) -> Reader:
        """The store."""
        ...

    async def answer(self, ask: Callable[[], msgspec.Struct]) -> web.Response:
        """``ask()`` on a thread, as JSON."""
        ...


def read_tree(reader: Reader, trajectory: str) -> Tree:
    """The tree of a stored trajectory. NotFoundError where there is none of that name."""
    reader.trajectory(trajectory)

    def load(trace_id: str) -> Trace | None:
        try:
            return reader.trace(trace_id)
        except (NotFoundError, FormatError) as error:
            log.warning("%s", error)
            return None

    return build_tree(trajectory, [row.meta for row in reader.traces(trajectory)], load)


async def get_tree(api: Asker, request: web.Request) -> web.StreamResponse:
    """Which call of a run continues which, by exact tokens, and where and why a prefix broke.

    Also how many tokens a trainer feeds when calls that continue one another are one sequence.
    """
    name = request.match_info["trajectory"]
    return await api.answer(lambda: read_tree(api.reader, name))


ROUTES: tuple[Route, ...] = (
    Route(
        method="GET",
        path="/api/trajectories/{trajectory}/tree",
        handler=get_tree,
        answer=Tree,
    ),
)

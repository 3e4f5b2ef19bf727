"""Stands before every handler: nothing is read of a request that may not be made.

Without keys the gateway trusts whoever reaches it, which on loopback is whoever runs programs on
this machine. Web pages run there too, in its users' browsers: what a browser sends on behalf of
another site is refused, and so is a name that a stranger's name server may have pointed here.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Literal, TypeAlias

from aiohttp import web
from yarl import URL

from driftgate.errors import AccessError
from driftgate.gateway.keys import Keys, access_of, private_name
from driftgate.gateway.sessions import TRAJECTORY_HEADER

__all__ = ["Guard", "Refusal"]

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
Refusal: TypeAlias = Literal["no_key", "wrong_key", "foreign_page", "connections"]

DRIFT = "/api/drift"

MAX_ORIGINS = 64
"""Pairs of Host and Origin that were let through and are not looked at again: an address is taken
apart in 20 us."""


class Guard:
    """Its ``check`` is an aiohttp middleware; ``refused`` counts."""

    def __init__(self, keys: Keys, refused: Callable[[Refusal], None]) -> None:
        self._keys = keys
        self._refused = refused

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Serve the request. AccessError where it may not be made."""
        resource = request.match_info.route.resource
        if resource is not None:  # else it is a 404 or 405, which says nothing of what is here
            self._check(request, resource.canonical)
        return await handler(request)

    def may_read(self, request: web.Request) -> bool:
        """The request may see what ``read`` opens."""
        try:
            self._keys.check("read", request.headers)
        except AccessError:
            return False
        return True

    def _check(self, request: web.Request, route: str) -> None:
        if not self._keys.required:
            try:
                _check_origin(request.headers.get("Host"), request.headers.get("Origin"))
            except AccessError:
                self._refused("foreign_page")
                raise
            return
        access = access_of(request.method, route)
        try:
            self._keys.check(access, request.headers, named=_named(request, route))
        except AccessError as error:
            self._refused("wrong_key" if error.status == 403 else "no_key")
            raise


def _named(request: web.Request, route: str) -> list[str]:
    """The trajectories that the request names; its metadata names none where a key does."""
    named = [*request.headers.getall(TRAJECTORY_HEADER, ())]
    if (in_path := request.match_info.get("trajectory")) is not None:
        named.append(in_path)
    if route == DRIFT:
        named += request.query.getall("trajectory", ())
    return named


@functools.lru_cache(MAX_ORIGINS)
def _check_origin(host: str | None, origin: str | None) -> None:
    """AccessError for what a web page of another site may have sent. Only browsers send
    ``Origin``; all of them send ``Host``."""
    if host is None:
        return
    ours = _url(f"http://{host}")
    name = ours.host
    if name is not None and not private_name(name):
        raise AccessError(
            f"the Host header {host[:200]!r} is a public name: without keys the gateway goes by "
            "its address or a local name, so that no web page can lead here; set keys to serve it "
            "under that name",
            status=403,
        )
    if origin is None:
        return
    theirs = _url(origin)  # "null" has no host
    if theirs.host is None or (theirs.host, theirs.explicit_port) != (name, ours.explicit_port):
        raise AccessError(
            f"a page of {origin[:200]!r} asked for this: without keys only the gateway's own "
            "pages may; set keys to serve others",
            status=403,
        )


def _url(text: str) -> URL:
    try:
        return URL(text)
    except ValueError:
        return URL()

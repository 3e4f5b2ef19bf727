"""Serves the dashboard: the files of ``gateway/web`` at ``/`` and ``/static/``, from memory.

Only what was in that folder at the start is served, by exact name: a request is never a path on
disk. The page carries no data; what it shows it asks of ``/api``, with the reader's key where the
gateway wants one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files
from importlib.resources.abc import Traversable

from aiohttp import web

__all__ = ["POLICY", "add_pages", "page_files"]

POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'"
)
"""Everything comes from here: no script, style, font or picture of another host or written into
the page."""

HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # ask each time; the ETag makes that a 304
}

TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".txt": "text/plain",
}
"""By ending; files of other endings are not served."""

INDEX = "index.html"


def add_pages(app: web.Application) -> None:
    """Mount every file of the dashboard on ``app``."""
    for name, body in page_files().items():
        path = "/" if name == INDEX else f"/static/{name}"
        app.router.add_get(path, _handler(body, TYPES[_ending(name)]))


def page_files() -> dict[str, bytes]:
    """The dashboard's files by their names below ``/static/``, ``index.html`` among them."""
    return dict(_assets(files("driftgate.gateway") / "web"))


def _assets(folder: Traversable, prefix: str = "") -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            found += _assets(entry, f"{prefix}{entry.name}/")
        elif _ending(entry.name) in TYPES:
            found.append((prefix + entry.name, entry.read_bytes()))
    return found


def _ending(name: str) -> str:
    return name[name.rfind(".") :] if "." in name else ""


def _handler(body: bytes, kind: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    tag = hashlib.sha256(body).hexdigest()[:16]

    async def serve(request: web.Request) -> web.Response:
        """One file, or 304 where the browser has it."""
        known = request.if_none_match or ()
        if any(etag.value in (tag, "*") for etag in known):
            response = web.Response(status=304, headers=HEADERS)
        else:
            response = web.Response(body=body, content_type=kind, charset="utf-8", headers=HEADERS)
        response.etag = tag
        return response

    return serve

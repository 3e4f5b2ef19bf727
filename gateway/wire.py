"""Requests into typed values, values and errors into JSON answers, for the API's handlers."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from aiohttp import web

from driftgate.client import CURSOR_HEADER
from driftgate.errors import UNREADABLE, RequestError
from driftgate.gateway.limits import read_body
from driftgate.views import ApiError, ErrorBody

__all__ = [
    "MAX_STEP",
    "body_of",
    "error_answer",
    "json_answer",
    "origin_of",
    "query_of",
    "step_of",
    "stream_answer",
]

T = TypeVar("T")

MAX_STEP = 999_999_999
"""Far above any run, far below what an index column holds."""

FIXES: dict[int, str] = {
    400: "Correct the request; /api/openapi.json describes every parameter.",
    401: "Give a key for it: `--key` or DRIFTGATE_KEY, `Client(key=...)`, the dashboard's field.",
    403: "Use a key that opens it; where no keys are set, the message says what to do instead.",
    404: "GET /api/trajectories lists what there is; a call shows up when its record is synced.",
    408: "Send the body without pauses.",
    413: "Send less, or raise max_request_bytes in the gateway's configuration.",
    502: "Check the engine; `driftgate probe URL` says what it answers.",
    503: "Try again; /metrics and the gateway's log say what the store is waiting for.",
}
FIX_OTHERWISE = "The gateway's log has the details."

CODES: dict[int, str] = {
    400: "bad_request",
    401: "no_access",
    403: "no_access",
    404: "not_found",
    408: "too_slow",
    413: "too_large",
    502: "upstream",
    503: "storage",
}


def error_answer(status: int, message: str) -> web.Response:
    """``message`` as the API's error body, with what to do about it."""
    body = ErrorBody(
        code=CODES.get(status, "internal"), message=message, fix=FIXES.get(status, FIX_OTHERWISE)
    )
    return json_answer(msgspec.json.encode(ApiError(error=body)), status=status)


def json_answer(body: bytes, status: int = 200) -> web.Response:
    """Encoded JSON as an answer, never to be taken for a page: it quotes models and agents."""
    return web.Response(
        body=body,
        status=status,
        content_type="application/json",
        headers={"X-Content-Type-Options": "nosniff"},
    )


def query_of(request: web.Request, kind: type[T]) -> T:
    """The query string as ``kind``. RequestError names the parameter that does not fit."""
    values: dict[str, str] = {}
    for name, value in request.query.items():
        if name in values:
            raise RequestError(f"parameter {name!r} is given twice")
        values[name] = value
    try:
        query = msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise RequestError(f"query of {request.path}: {error}") from error
    for name, value in values.items():  # msgspec reads 1e2 as 100 and null as nothing given
        read = getattr(query, name, value)
        if read is None or (type(read) is int and str(read) != value):
            raise RequestError(
                f"query of {request.path}: {value!r} is no value of parameter {name!r}"
            )
    return query


async def body_of(request: web.Request, kind: type[T]) -> T:
    """The JSON body as ``kind``; an empty one counts as ``{}``. RequestError."""
    try:
        return msgspec.json.decode(await read_body(request) or b"{}", type=kind)
    except UNREADABLE as error:
        raise RequestError(f"body of {request.method} {request.path}: {error}") from error


def origin_of(request: web.Request) -> str:
    """Scheme and authority that the caller used. RequestError where its Host header is none."""
    try:
        return str(request.url.origin())
    except ValueError as error:
        raise RequestError(f"the Host header {request.host!r} is no address: {error}") from error


def step_of(request: web.Request) -> int:
    """The path's step. RequestError where it is no number."""
    text = request.match_info["step"]
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) > MAX_STEP:
        raise RequestError(f"step {text[:20]!r} is not a number from 0 to {MAX_STEP}")
    return int(text)


def stream_answer(cursor: int, *, sse: bool) -> web.StreamResponse:
    """The head of a stream of events behind ``cursor``: SSE or JSON lines."""
    return web.StreamResponse(
        headers={
            "content-type": "text/event-stream" if sse else "application/x-ndjson",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            CURSOR_HEADER: str(cursor),
        }
    )

"""What a stranger's request may cost, and the reading of its body within that.

aiohttp keeps most of these limits once it is told them (``gateway.listen``). docs/threat-model.md
shows them all in one table, which a test holds against this file.
"""

from __future__ import annotations

import asyncio
import json

import numpy as np
from aiohttp import http_exceptions, web

from driftgate.errors import RequestError

__all__ = ["json_depth", "read_body"]

MAX_CONNECTIONS = 4096
"""At once; what comes then is closed. Four times the largest load that is measured, at some 20 kB
for an idle one."""

MAX_LINE_BYTES = 8190
"""Of a request line, as nginx and Apache have it: a trajectory's name has 200 characters."""

MAX_HEADER_BYTES = 8190
"""Of one header; the longest in use, a signed token, has 2 or 3 kB."""

MAX_HEADERS = 100
"""In one request, as Apache has it; SDKs send 20."""

HANDSHAKE_TIMEOUT_S = 10.0
"""For TLS; it takes two round trips."""

IDLE_TIMEOUT_S = 75.0
"""For a request's headers, and between two requests on one connection. Longer than the 60 s after
which nginx and cloud balancers close what is idle, so that no request runs into a closing one."""

BODY_TIMEOUT_S = 120.0
"""For a request's whole body: 64 MB in that time are 4 Mbit/s. aiohttp's parser does not tell the
reader of a body whose chunks turn bad; it waits this long as well."""

LINGER_TIMEOUT_S = 5.0
"""For the rest of a body that is not wanted, so that its sender reads the answer first."""

STALLED_TIMEOUT_S = 300.0
"""For an agent that does not read its answer. It may think about a chunk, but not hold an engine's
stream for ever."""

MAX_JSON_DEPTH = 200
"""Of a request body: tool schemas nest 20 deep, and pydantic's own parser ends here. Python's ends
at 1,000 frames, whoever's they are."""

THREAD_BYTES = 1 << 20
"""A longer body's depth is measured on a thread: it takes about 2 ms for 1 MB."""

_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


async def read_body(request: web.Request) -> bytes:
    """The whole body, decompressed; aiohttp keeps it for the request's next reader.

    RequestError for one that is broken or nested too deeply; aiohttp's 413 for one that is too
    long, compressed or not, and 408 for one that takes too long.
    """
    length, limit = request.content_length, request.client_max_size
    if length is not None and length > limit:
        raise web.HTTPRequestEntityTooLarge(limit, length)
    try:
        if request.content.is_eof():  # it is here: a timer would cost as much as reading it
            body = await request.read()
        else:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await request.read()
    except TimeoutError as error:
        raise web.HTTPRequestTimeout from error
    except (http_exceptions.HttpProcessingError, web.RequestPayloadError) as error:
        raise RequestError(
            f"the request body is not what its headers say: {type(error).__name__}"
        ) from error
    depth = (
        await asyncio.to_thread(json_depth, body) if len(body) > THREAD_BYTES else json_depth(body)
    )
    if depth > MAX_JSON_DEPTH:
        raise RequestError(
            f"the request body is nested {depth} deep, more than {MAX_JSON_DEPTH}: flatten it"
        )
    return body


def json_depth(body: bytes) -> int:
    """How deep ``body`` is nested if it is JSON in any of Unicode's encodings, at most; exact where
    that is more than `MAX_JSON_DEPTH`. For anything else some number."""
    # "[" and "{" differ in one bit. ``bytes.count`` of one byte takes four times as long.
    opened = int(np.count_nonzero(np.frombuffer(body, np.uint8) | 0x20 == ord("{")))
    if opened <= MAX_JSON_DEPTH:
        return opened
    encoding = json.detect_encoding(body)
    if encoding not in ("utf-8", "utf-8-sig"):
        body = body.decode(encoding, "replace").encode()
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(unescaped.split(b'"')[::2])
    brackets = np.frombuffer(outside.translate(None, _NOT_BRACKETS), np.uint8)
    # "[" and "{" are odd, "]" and "}" odd as well: bit 2 tells them apart (5B 7B, 5D 7D).
    steps = np.where(brackets & 4, -1, 1)
    return int(np.cumsum(steps).max(initial=0))

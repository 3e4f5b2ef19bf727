"""HTTP's small print: which headers pass, and errors in OpenAI's shape. Pure."""

from __future__ import annotations

import msgspec
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from driftgate.errors import DriftgateError
from driftgate.gateway.sessions import TRAJECTORY_HEADER, minted_key

__all__ = ["SUPPORTED", "answer_headers", "error_body", "error_response", "request_headers"]

SUPPORTED = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "the same behind /t/{trajectory}",
    "/api/…",
    "/healthz",
    "/readyz",
    "/metrics",
)

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""RFC 9110 7.6.1: they belong to one connection."""

NOT_SENT = HOP_BY_HOP | {
    "host",
    "content-length",
    "content-encoding",  # aiohttp has decoded the body
    "accept-encoding",  # identity is asked for: a compressed answer could not be read
    "expect",
    "cookie",
    TRAJECTORY_HEADER,
}

NOT_RETURNED = HOP_BY_HOP | {"content-length"}

RETRY_AFTER_S = 2
"""Told with a 503: storage is given as long before a call is refused, so a busy one is free by
then."""

_TYPES = {400: "invalid_request_error", 404: "not_found_error", 502: "upstream_error"}


def request_headers(headers: CIMultiDictProxy[str], upstream_key: str | None) -> CIMultiDict[str]:
    """The agent's headers as the engine gets them. A minted key never leaves the gateway."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    out = CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in NOT_SENT and name.lower() not in named
    )
    if upstream_key is not None:
        out["Authorization"] = f"Bearer {upstream_key}"
    elif minted_key(headers) is not None:
        del out["Authorization"]
    out["Accept-Encoding"] = "identity"
    return out


def answer_headers(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """The engine's headers as the agent gets them."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in NOT_RETURNED and name.lower() not in named
    )


def error_body(status: int, message: str, *, code: str | None = None) -> bytes:
    """An error as OpenAI's clients read it."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error = {"message": message, "type": kind, "param": None, "code": code or status}
    return msgspec.json.encode({"error": error})


def error_response(error: DriftgateError) -> web.Response:
    """The answer to an agent for one of our errors."""
    return web.Response(
        status=error.status,
        headers={"Retry-After": str(RETRY_AFTER_S)} if error.status == 503 else None,
        body=error_body(error.status, f"driftgate: {error}"),
        content_type="application/json",
    )

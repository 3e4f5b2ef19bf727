"""HTTP's small print: which headers pass, and errors in OpenAI's shape. Pure."""

from __future__ import annotations

import msgspec
from multidict import CIMultiDict, CIMultiDictProxy

from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.keys import minted_keys
from driftgate.gateway.sessions import TRAJECTORY_HEADER

__all__ = [
    "RETRY_AFTER_S",
    "SUPPORTED",
    "answer_headers",
    "error_body",
    "is_model",
    "request_headers",
    "retry_count",
    "without_key",
]

SUPPORTED = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/responses",
    "GET /v1/responses/{response}",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
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

CREDENTIALS = frozenset({"authorization", "x-api-key"})
"""What may hold one of the gateway's keys, or stand beside the engine's."""

NOT_RETURNED = HOP_BY_HOP | {"content-length"}

RETRY_AFTER_S = 2
"""Told with a 503: storage is given as long before a call is refused, so a busy one is free by
then."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    502: "upstream_error",
}


def request_headers(headers: CIMultiDictProxy[str], config: GatewayConfig) -> CIMultiDict[str]:
    """The agent's headers as the engine gets them. The gateway's own keys never leave it."""
    dropped = NOT_SENT | _named_by_connection(headers)
    if config.asks_for_keys or config.upstream_key is not None or minted_keys(headers):
        dropped |= CREDENTIALS
    out = CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in dropped
    )
    if config.upstream_key is not None:
        out["Authorization"] = f"Bearer {config.upstream_key}"
    out["Accept-Encoding"] = "identity"
    return out


def retry_count(headers: CIMultiDictProxy[str]) -> int:
    """How often an OpenAI SDK has tried this call already."""
    value = headers.get("x-stainless-retry-count", "0")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 4 else 0


def without_key(said: bytes, key: str | None) -> bytes:
    """What an engine said, should it repeat the key that it was given: some do, in a 401."""
    return said.replace(key.encode(), b"***") if key else said


def is_model(name: str) -> bool:
    """``name``, decoded once, can be a model's: nothing in it leads out of ``/v1/models/``,
    whatever decodes it again or cleans it up behind us."""
    return name.isprintable() and not any(part in name for part in ("..", "\\", "%", ";", "//"))


def answer_headers(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """The engine's headers as the agent gets them."""
    dropped = NOT_RETURNED | _named_by_connection(headers)
    return CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in dropped
    )


def _named_by_connection(headers: CIMultiDictProxy[str]) -> frozenset[str]:
    """Further headers that belong to one connection: any line of ``Connection`` can name them."""
    lines = headers.getall("Connection", ())
    return frozenset(name.strip().lower() for line in lines for name in line.split(","))


def error_body(status: int, message: str, *, code: str | None = None) -> bytes:
    """An error as OpenAI's clients read it."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error = {"message": message, "type": kind, "param": None, "code": code or status}
    return msgspec.json.encode({"error": error})


def reason_phrase(said: str | None) -> str | None:
    """The words behind an engine's status; None, which stands for the usual ones, where they
    cannot be sent."""
    return said if said is not None and said.isascii() and said.isprintable() else None

"""What a user can set about the gateway. Few knobs: everything else is a named constant where it is
used."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from driftgate.gateway.keys import DIGEST, Keys, TrajectoryKeys, is_loopback
from driftgate.gateway.redact import check_path, redacted
from driftgate.logs import LogFormat
from driftgate.trace import LogprobsMode

__all__ = ["GatewayConfig", "StreamingRoutes"]

KEYS = ("call_keys", "read_keys", "admin_keys")
SECRETS = ("upstream_key", "signing_key", *KEYS)

MIN_SIGNING_CHARS = 32
"""As hexadecimal digits they are 128 bits."""

ROUTES = ("/v1", "/v1/chat/completions", "/v1/completions")
"""Ends of addresses that were meant for clients."""

StreamingRoutes = Literal["auto", "plugin", "synthesise", "off"]


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The gateway's settings, checked once when they are made (``ValueError``)."""

    upstream: str = ""
    """Base URL of the engine without ``/v1``, e.g. ``http://host:8000``."""
    upstreams: list[str] = []
    """Further engines, or all of them. A trajectory stays with one, whose prefix cache knows it."""
    host: str = "127.0.0.1"
    """Address to listen on; any other than loopback needs keys."""
    port: int = 8787
    """Port to listen on; 0 takes a free one."""
    store: Path = Path("driftgate-store")
    """Directory of the store; made when it is not there."""
    durability: Literal["group", "strict"] = "group"
    """``group``: an answer ends when the operating system has its traces, some milliseconds; a kill
    of the process loses none, and the machine's stop what a sync had not reached, 50 ms and two
    syncs at most. ``strict``: an answer ends when its traces are on disk."""
    on_capture_failure: Literal["serve", "refuse"] = "serve"
    """What a call meets when it cannot be recorded: ``serve`` answers it, counts the loss and marks
    the trajectory; ``refuse`` answers 503."""
    streaming_routes: StreamingRoutes = "auto"
    """How routed experts of streamed answers are got. ``plugin``: from the extra chunk of
    driftgate's engine plugin. ``synthesise``: the engine is asked without streaming and the stream
    is written here. ``off``: not at all. ``auto``: the first of these that the engine can do and
    needs."""
    continuation: Literal["rendered", "exact"] = "rendered"
    """What stands in a prompt for earlier answers of a run. ``rendered``: what the engine's
    template makes of the messages, as without driftgate. ``exact``: the ids that were sampled, so
    that each prompt begins with all tokens of the call before it (docs/tree.md)."""
    logprobs_mode: LogprobsMode = "unknown"
    """Declare which logprobs the engine returns where the probe cannot tell (METRICS 4)."""
    weight_version: str = "unknown"
    """Version of the policy that the engine serves, written into every trace."""
    engine_settings: dict[str, str] = {}
    """Further facts that change the engine's numbers (dtype, quantisation, kv dtype, attention
    backend, parallel sizes); they become part of its fingerprint."""
    upstream_key: str | None = None
    """Sent to the engine as bearer token in place of the agent's; never logged or stored."""
    call_keys: list[str] = []
    """Digests (``sha256:…``, by ``driftgate key``) of keys that may call models. As soon as a key
    of any kind is set, everything but health needs one."""
    read_keys: list[str] = []
    """The same for reading traces, drift and metrics."""
    admin_keys: list[str] = []
    """The same for everything: what the others open, minting trajectories' keys, rewards."""
    signing_key: str | None = None
    """Signs the keys that ``POST /api/trajectories`` mints. Gateways with the same one accept each
    other's, also after a restart; without it keys end with the process. A new one ends them all."""
    tls_cert: Path | None = None
    """PEM file with the certificate chain to listen with TLS."""
    tls_key: Path | None = None
    """PEM file with its private key; None: it is in ``tls_cert``."""
    redact: list[str] = []
    """Fields of requests that are not stored, like ``user``, ``metadata.email`` or
    ``messages.*.name``. The engine still gets them, and the token ids still hold every prompt."""
    log_format: LogFormat = "text"
    """``json``: one object a line on stderr, for a collector."""
    max_request_bytes: int = 64 << 20
    """A longer request body is refused with 413; room for images in base64."""
    max_answer_bytes: int = 1 << 30
    """Of one answer: a longer JSON answer is refused with 502; a longer stream is forwarded in full
    and kept no further."""

    def __post_init__(self) -> None:
        if not self.urls:
            raise ValueError("give the engine's base URL as upstream, or several as upstreams")
        for url in self.urls:
            _check_upstream(url)
        if len(set(self.urls)) < len(self.urls):
            raise ValueError("an upstream is given twice")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port} is not between 0 and 65535")
        if self.upstream_key is not None and not _is_token(self.upstream_key):
            raise ValueError("upstream_key holds spaces, control or non-ASCII characters, or none")
        if self.tls_key is not None and self.tls_cert is None:
            raise ValueError("tls_key needs tls_cert beside it")
        for path in self.redact:
            check_path(path)
        self._check_keys()
        if self.max_request_bytes <= 0 or self.max_answer_bytes <= 0:
            raise ValueError("max_request_bytes and max_answer_bytes must be positive")

    def _check_keys(self) -> None:
        for name in KEYS:
            if not all(map(DIGEST.fullmatch, getattr(self, name))):
                raise ValueError(
                    f"{name} holds something else than digests like sha256:0123… (not shown here); "
                    "`driftgate key` prints a new key with its digest"
                )
        if self.signing_key is not None and len(self.signing_key) < MIN_SIGNING_CHARS:
            raise ValueError(f"signing_key has less than {MIN_SIGNING_CHARS} characters")
        if not is_loopback(self.host) and not self.asks_for_keys:
            raise ValueError(
                f"host {self.host!r} can be reached from other machines, and anybody there could "
                "call the engine and read every trace: set keys (`driftgate key` makes them; "
                "DRIFTGATE_CALL_KEY, DRIFTGATE_READ_KEY and DRIFTGATE_ADMIN_KEY hold them), or "
                "listen on 127.0.0.1"
            )

    @property
    def urls(self) -> list[str]:
        """Every engine, without a slash at the end."""
        return [url.rstrip("/") for url in (self.upstream, *self.upstreams) if url]

    @property
    def asks_for_keys(self) -> bool:
        """Requests need a key."""
        return any(getattr(self, name) for name in KEYS)

    def keys(self) -> Keys:
        """What checks them."""
        return Keys(
            call=self.call_keys,
            read=self.read_keys,
            admin=self.admin_keys,
            trajectories=TrajectoryKeys(self.signing_key),
        )

    def redacted(self, body: bytes) -> bytes:
        """A request's body as it may be stored."""
        return redacted(body, self.redact) if self.redact else body

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        shown |= {name: "***" for name in SECRETS if shown[name]}
        return f"GatewayConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def _check_upstream(url: str) -> None:
    if "@" in url.partition("://")[2].partition("/")[0]:  # before a message repeats it
        raise ValueError("upstream must not hold credentials: use upstream_key")
    try:
        parts = urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError as error:  # a UnicodeError is one
        raise ValueError(f"upstream {url!r} is not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"upstream {url!r} is not a URL like http://host:8000")
    if port == 0 or parts.netloc.endswith(":"):
        raise ValueError(f"upstream {url!r} names no port behind its colon")
    if not url.isprintable() or " " in url:
        raise ValueError(f"upstream {url!r} holds blanks or control characters")
    if "?" in url or "#" in url:
        raise ValueError(f"upstream {url!r} must be given without a query or fragment")
    if parts.path.rstrip("/").endswith(ROUTES):
        raise ValueError(f"upstream {url!r} must be given without /v1 and what follows it")


def _is_token(text: str) -> bool:
    """``text`` can stand behind ``Bearer`` in a header."""
    return text.isascii() and text.isprintable() and text != "" and " " not in text

"""What a user can set about the gateway. Few knobs: everything else is a named constant where it is
used."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from driftgate.logs import LogFormat
from driftgate.trace import LogprobsMode

__all__ = ["GatewayConfig", "StreamingRoutes"]

StreamingRoutes = Literal["auto", "plugin", "synthesise", "off"]


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The gateway's settings, checked once when they are made (``ValueError``)."""

    upstream: str
    """Base URL of the engine without ``/v1``, e.g. ``http://host:8000``."""
    host: str = "127.0.0.1"
    """Address to listen on; loopback unless you say otherwise, because there is no login on
    ``/v1``."""
    port: int = 8787
    """Port to listen on; 0 takes a free one."""
    store: Path = Path("driftgate-store")
    """Directory of the store; made when it is not there."""
    durability: Literal["group", "strict"] = "group"
    """``group``: records are synced within 50 ms and never delay the agent. ``strict``: the end of
    an answer is withheld until its traces are on disk."""
    on_capture_failure: Literal["serve", "refuse"] = "serve"
    """What a call meets when it cannot be recorded: ``serve`` answers it, counts the loss and marks
    the trajectory; ``refuse`` answers 503."""
    streaming_routes: StreamingRoutes = "auto"
    """How routed experts of streamed answers are got. ``plugin``: from the extra chunk of
    driftgate's engine plugin. ``synthesise``: the engine is asked without streaming and the stream
    is written here. ``off``: not at all. ``auto``: the first of these that the engine can do and
    needs."""
    logprobs_mode: LogprobsMode = "unknown"
    """Declare which logprobs the engine returns where the probe cannot tell (METRICS 4)."""
    weight_version: str = "unknown"
    """Version of the policy that the engine serves, written into every trace."""
    engine_settings: dict[str, str] = {}
    """Further facts that change the engine's numbers (dtype, quantisation, kv dtype, attention
    backend, parallel sizes); they become part of its fingerprint."""
    upstream_key: str | None = None
    """Sent to the engine as bearer token in place of the agent's; never logged or stored."""
    log_format: LogFormat = "text"
    """``json``: one object a line on stderr, for a collector."""
    max_request_bytes: int = 64 << 20
    """A longer request body is refused with 413; room for images in base64."""
    max_answer_bytes: int = 1 << 30
    """Of one answer: a longer JSON answer is refused with 502; a longer stream is forwarded in full
    and kept no further."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.upstream)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"upstream {self.upstream!r} is not a URL like http://host:8000")
        if parts.path.rstrip("/").endswith("/v1"):
            raise ValueError(f"upstream {self.upstream!r} must be given without /v1")
        if parts.username or parts.password:
            raise ValueError("upstream must not hold credentials: use upstream_key")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port} is not between 0 and 65535")
        if self.max_request_bytes <= 0 or self.max_answer_bytes <= 0:
            raise ValueError("max_request_bytes and max_answer_bytes must be positive")

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        shown["upstream_key"] = "***" if self.upstream_key else None
        return f"GatewayConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

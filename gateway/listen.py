"""The gateway's socket: TLS, and limits on connections, headers and time.

Parsing is llhttp's through aiohttp, in its strict mode; what it refuses never becomes a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Callable

from aiohttp import web

from driftgate.errors import DriftgateError
from driftgate.gateway import limits
from driftgate.gateway.config import GatewayConfig

__all__ = ["listening", "raise_file_limit", "tls_context"]

FILES_PER_CONNECTION = 2
"""Its own socket and the engine's."""

OTHER_FILES = 512
"""Segments, the index, threads' pipes."""

log = logging.getLogger("driftgate.gateway")


class _Terse(logging.Filter):
    """Malformed requests in one line, without their bytes: these can hold credentials."""

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.exc_info[0] if record.exc_info else None
        if kind is not None:
            record.msg = f"{record.getMessage()}: {kind.__name__}"
            record.args, record.exc_info, record.exc_text = (), None, None
            record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


http_log = logging.getLogger("driftgate.gateway.http")
http_log.addFilter(_Terse())


class _Refused(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


class _Site(web.BaseSite):
    """A listening address with a limit on connections."""

    def __init__(
        self,
        runner: web.AppRunner,
        config: GatewayConfig,
        refused: Callable[[], None],
        max_connections: int,
        stalled_timeout_s: float,
    ) -> None:
        super().__init__(runner, ssl_context=tls_context(config))
        self._address = config.host, config.port
        self._refused = refused
        self._max_connections = max_connections
        self._stalled_ms = round(stalled_timeout_s * 1000)

    @property
    def name(self) -> str:
        """For aiohttp's messages."""
        return f"{self._address[0]}:{self._address[1]}"

    async def start(self) -> None:
        """Listen. OSError where the address cannot be had."""
        await super().start()
        host, port = self._address
        timeout_s = None if self._ssl_context is None else limits.HANDSHAKE_TIMEOUT_S
        self._server = await asyncio.get_running_loop().create_server(
            self._accept,
            host,
            port,
            ssl=self._ssl_context,
            backlog=self._backlog,
            ssl_handshake_timeout=timeout_s,
        )
        for sock in self._server.sockets:  # connections inherit it; the kernel ends stalled ones
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self._stalled_ms)

    def _accept(self) -> asyncio.Protocol:
        server = self._runner.server
        assert server is not None
        if len(server.connections) >= self._max_connections:
            self._refused()
            return _Refused()
        protocol: asyncio.Protocol = server()
        return protocol


@contextlib.asynccontextmanager
async def listening(
    app: web.Application,
    config: GatewayConfig,
    *,
    shutdown_timeout_s: float,
    refused: Callable[[], None],
    idle_timeout_s: float = limits.IDLE_TIMEOUT_S,
    stalled_timeout_s: float = limits.STALLED_TIMEOUT_S,
    max_connections: int = limits.MAX_CONNECTIONS,
) -> AsyncIterator[str]:
    """Serve ``app`` for the length of the block; gives the base URL. ``refused`` counts connections
    that are one too many."""
    runner = web.AppRunner(
        app,
        handler_cancellation=True,  # a client that leaves frees the engine at once
        shutdown_timeout=shutdown_timeout_s,
        access_log=None,
        logger=http_log,
        keepalive_timeout=idle_timeout_s,
        lingering_time=limits.LINGER_TIMEOUT_S,
        max_line_size=limits.MAX_LINE_BYTES,
        max_field_size=limits.MAX_HEADER_BYTES,
        max_headers=limits.MAX_HEADERS,
    )
    await runner.setup()
    try:
        await _Site(runner, config, refused, max_connections, stalled_timeout_s).start()
        port = runner.addresses[0][1]
        host = f"[{config.host}]" if ":" in config.host else config.host
        yield f"{'http' if config.tls_cert is None else 'https'}://{host}:{port}"
    finally:
        await runner.cleanup()


def tls_context(config: GatewayConfig) -> ssl.SSLContext | None:
    """TLS 1.2 and newer with the configured certificate; None without one. DriftgateError where it
    cannot be used."""
    if config.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except OSError as error:  # ssl.SSLError is one
        raise DriftgateError(
            f"tls_cert {config.tls_cert} with tls_key {config.tls_key} cannot be used: {error}"
        ) from error
    return context


def raise_file_limit() -> None:
    """Let the process open as many files as its connections need, as far as the system allows."""
    wanted = limits.MAX_CONNECTIONS * FILES_PER_CONNECTION + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning("only %d files can be open: raise the limit (ulimit -n) to %d", allowed, wanted)

"""Puts the gateway together: store, engine, routes, shutdown. ``create_app`` for tests, ``run`` to
serve.

Every path that is not named here is a 404 that says what there is; the engine's administration
(``/update_weights``, ``/pause``, ``/collective_rpc``, …) is therefore out of an agent's reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from driftgate.adapters.vllm import Vllm
from driftgate.errors import DriftgateError
from driftgate.gateway import http
from driftgate.gateway.api import ApiContext, add_api_routes
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.metrics import Metrics
from driftgate.gateway.proxy import Proxy
from driftgate.gateway.recorder import Recorder, Sink
from driftgate.gateway.restore import restore
from driftgate.gateway.sessions import Sessions
from driftgate.gateway.tasks import Tasks
from driftgate.gateway.upstream import Upstream
from driftgate.storage import Reader, Writer

__all__ = ["GATEWAY", "Gateway", "create_app", "run", "serve"]

SHUTDOWN_TIMEOUT_S = 30.0
"""Calls under way get this long to end when the gateway is stopped; then they are cut and
marked."""

SWITCH_INTERVAL_S = 0.0005
"""How long the writer thread may keep the interpreter while the event loop waits for it: Python's
5 ms would be a call's whole delay."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger("driftgate.gateway")


class Gateway:
    """The parts of one gateway, and the handlers that belong to none of them."""

    def __init__(self, config: GatewayConfig, sink: Sink | None = None) -> None:
        """Open the store (StorageError); ``sink`` takes the writer's place, for tests."""
        self.config = config
        self._adapter = adapter = Vllm()
        self._writer = Writer(config.store, durability=config.durability) if sink is None else None
        self.sink: Sink = sink or self._writer or _unreachable()
        self.reader = Reader(config.store) if sink is None else None
        self.metrics = Metrics(lambda: self.sink.stats)
        self.sessions = Sessions()
        self.upstream = Upstream(config, adapter, self.metrics)
        self.recorder = Recorder(
            self.sink,
            self.reader,
            self.metrics,
            self.upstream.engine,
            durability=config.durability,
            on_capture_failure=config.on_capture_failure,
            weight_version=config.weight_version,
        )
        self.proxy = Proxy(
            config,
            adapter=adapter,
            sessions=self.sessions,
            recorder=self.recorder,
            reader=self.reader,
            upstream=self.upstream,
            metrics=self.metrics,
        )
        self._tasks = Tasks()

    async def lifetime(self, _app: web.Application) -> AsyncIterator[None]:
        """aiohttp cleanup context: from the first to the last request."""
        await self.proxy.start()
        self._tasks.start("upstream", self.upstream.watch())
        self._tasks.start("restore", self._restore())
        yield
        await self._tasks.close()
        await self.proxy.close()
        lost = self.recorder.finish()
        if self._writer is not None:
            await asyncio.to_thread(self._writer.close)
            stats = self._writer.stats
            log.info(
                "store closed: %d records written, %d refused, %d failed, %d never recorded",
                stats.written_records,
                stats.refused_records,
                stats.failed_records,
                lost,
            )
        if self.reader is not None:
            self.reader.close()

    async def _restore(self) -> None:
        try:
            if self.reader is not None:
                await restore(self.sessions, self.reader, self._adapter.ask_ids)
        finally:
            self.proxy.restored.set()

    async def healthz(self, _request: web.Request) -> web.Response:
        """The process runs."""
        return web.json_response({"status": "ok"})

    async def readyz(self, _request: web.Request) -> web.Response:
        """Calls can be served: the last probe found the engine. 503 says why not."""
        report, error = self.upstream.report, self.upstream.error
        body = {"ready": error is None, "error": error, "engine": report}
        return web.Response(
            status=200 if error is None else 503,
            body=msgspec.json.encode(body),
            content_type="application/json",
        )

    async def render_metrics(self, _request: web.Request) -> web.Response:
        """Prometheus exposition."""
        return web.Response(
            body=self.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )


GATEWAY = web.AppKey("gateway", Gateway)


def create_app(config: GatewayConfig, *, sink: Sink | None = None) -> web.Application:
    """The gateway as an aiohttp application. Serve it with ``handler_cancellation=True``."""
    app = web.Application(middlewares=[_errors], client_max_size=config.max_request_bytes)
    gateway = app[GATEWAY] = Gateway(config, sink)
    app.cleanup_ctx.append(gateway.lifetime)
    for prefix in ("", "/t/{trajectory}"):
        app.router.add_post(
            f"{prefix}/v1/chat/completions", partial(gateway.proxy.call, api="chat")
        )
        app.router.add_post(
            f"{prefix}/v1/completions", partial(gateway.proxy.call, api="completions")
        )
        app.router.add_get(f"{prefix}/v1/models", gateway.proxy.models)
        app.router.add_get(prefix + "/v1/models/{model:.+}", gateway.proxy.models)
    app.router.add_get("/healthz", gateway.healthz)
    app.router.add_get("/readyz", gateway.readyz)
    app.router.add_get("/metrics", gateway.render_metrics)
    if gateway.reader is not None:
        context = ApiContext(
            reader=gateway.reader, submit=gateway.sink.submit, mint=gateway.sessions.mint
        )
        add_api_routes(app, context)
    return app


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost edge of a request: every error is answered as OpenAI's clients read it."""
    try:
        return await handler(request)
    except DriftgateError as error:
        log.warning("%s %s: %s", request.method, request.path, error)
        return http.error_response(error)
    except web.HTTPException as error:
        message = error.reason
        if error.status in (404, 405):
            message = (
                f"driftgate does not serve {request.method} {request.path}; it serves "
                + ", ".join(http.SUPPORTED)
            )
        return _json_error(error.status, message)
    except Exception as error:
        log.exception("%s %s failed", request.method, request.path)
        return _json_error(500, f"{type(error).__name__} inside the gateway")


def _json_error(status: int, message: str) -> web.Response:
    return web.Response(
        status=status, body=http.error_body(status, message), content_type="application/json"
    )


def _unreachable() -> Sink:
    raise AssertionError("a gateway has a sink or a writer")


@contextlib.asynccontextmanager
async def serve(config: GatewayConfig, *, sink: Sink | None = None) -> AsyncIterator[str]:
    """Serve for the length of the block; gives the base URL."""
    runner = web.AppRunner(
        create_app(config, sink=sink),
        handler_cancellation=True,  # a client that leaves frees the engine at once
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        access_log=None,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.host, config.port)
        await site.start()
        port = runner.addresses[0][1]
        host = f"[{config.host}]" if ":" in config.host else config.host
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


def run(config: GatewayConfig, *, started: Callable[[str], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM, under uvloop. ``started`` gets the base URL once it
    listens."""
    import uvloop

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    uvloop.run(_until_stopped(config, started))


async def _until_stopped(config: GatewayConfig, started: Callable[[str], None] | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sign in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sign, stop.set)
    async with serve(config) as url:
        log.info("driftgate listens at %s, the engine is %s", url, config.upstream)
        if started is not None:
            started(url)
        await stop.wait()

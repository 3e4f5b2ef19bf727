"""Puts the gateway together: store, engine, routes, shutdown. ``create_app`` for tests, ``run`` to
serve.

Every path that is not named here is a 404 that says what there is; the engine's administration
(``/update_weights``, ``/pause``, ``/collective_rpc``, …) is therefore out of an agent's reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from functools import partial

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from driftgate.adapters.vllm import Vllm
from driftgate.errors import DriftgateError, StorageError
from driftgate.gateway import http, limits, telemetry
from driftgate.gateway.answers import Answers
from driftgate.gateway.api import ApiContext, add_api_routes
from driftgate.gateway.api_weights import state_of
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.dialects import error_of_path
from driftgate.gateway.drift_metrics import DriftMetrics
from driftgate.gateway.guard import Guard
from driftgate.gateway.listen import listening, raise_file_limit
from driftgate.gateway.metrics import Metrics
from driftgate.gateway.pages import add_pages
from driftgate.gateway.proxy import Proxy
from driftgate.gateway.recorder import STOPPED, Recorder
from driftgate.gateway.restore import restore
from driftgate.gateway.sessions import Sessions
from driftgate.gateway.sink import Sink
from driftgate.gateway.tasks import Calls, Tasks, watch_lag
from driftgate.gateway.upstreams import Upstreams
from driftgate.gateway.wire import error_answer
from driftgate.storage import Neighbours, Reader, Writer
from driftgate.trace import Api

__all__ = ["GATEWAY", "Gateway", "create_app", "run", "serve"]

STOP_WAIT_S = 8.0
"""Calls under way get this long to end when the gateway is stopped; then they are cut and marked.
Docker kills after 10 s, and storage needs a moment behind the calls. A second signal cuts at
once."""

SHUTDOWN_TIMEOUT_S = 0.5
"""For what is no call (questions to the API): aiohttp waits this long, twice."""

QUEUE_BYTES = 1 << 30
"""Answers that wait for storage, none in ordinary times: calls are held back from half of it on,
and the other half takes what was under way then, 110 answers with 4.4 MB of routes."""

SWITCH_INTERVAL_S = 0.0005
"""How long the writer thread may keep the interpreter while the event loop waits for it: Python's
5 ms would be a call's whole delay."""

YOUNG_OBJECTS = 5_000
"""New containers between two looks for cycles among them, about what ten calls make: by then most
are gone, where Python's 700 have each call's looked at while it lasts."""

MAX_LOGGED_PATH = 300
"""Characters; a trajectory's name has up to 200."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger("driftgate.gateway")


class Gateway:
    """The parts of one gateway, and the handlers that belong to none of them."""

    def __init__(self, config: GatewayConfig, sink: Sink | None = None) -> None:
        """Open the store (StorageError); ``sink`` takes the writer's place, for tests."""
        self.config = config
        self._writer = _open_store(config) if sink is None else None
        self.sink: Sink = sink or self._writer or _unreachable()
        self.reader = Reader(config.store) if sink is None else None
        self._neighbours = Neighbours(config.store) if sink is None else None
        self.metrics = Metrics(lambda: self.sink.stats)
        keys = config.keys()
        self.guard = Guard(keys, lambda why: self.metrics.refused.labels(why).inc())
        self.sessions = Sessions(keys.trajectories)
        self.upstreams = Upstreams(config, self.metrics)
        self.recorder = Recorder(
            self.sink,
            self.reader,
            self.metrics,
            durability=config.durability,
            on_capture_failure=config.on_capture_failure,
            queue_bytes=QUEUE_BYTES,
        )
        self.proxy = Proxy(
            config,
            sessions=self.sessions,
            recorder=self.recorder,
            reader=self.reader,
            neighbours=self._neighbours,
            upstreams=self.upstreams,
            metrics=self.metrics,
            spans=telemetry.from_environment(os.environ),
        )
        self.calls = Calls()
        self._tasks = Tasks()

    async def lifetime(self, _app: web.Application) -> AsyncIterator[None]:
        """aiohttp cleanup context: from the first to the last request."""
        await self.proxy.start()
        for upstream in self.upstreams.all:
            self._tasks.start("upstream", upstream.watch())
            self._tasks.start("health", upstream.health.watch())
        metrics = self.metrics
        self._tasks.start("lag", watch_lag(metrics.loop_lag.observe, metrics.tasks.set))
        self._tasks.start("restore", self._restore())
        yield
        await self._tasks.close()
        await self.proxy.close()
        flush = _nothing if self._writer is None else self._writer.flush
        lost = await asyncio.to_thread(self.recorder.finish, flush)
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
        if self._neighbours is not None:
            self._neighbours.close()
        if self.proxy.spans is not None:
            await asyncio.to_thread(self.proxy.spans.close)

    async def _restore(self) -> None:
        try:
            if self.reader is not None:
                await restore(self.sessions, self.reader, Vllm.ask_ids)
        finally:
            self.proxy.restored.set()

    async def call(self, request: web.Request, api: Api) -> web.StreamResponse:
        """One model call; a stop knows of it."""
        with self.calls.running():
            await limits.read_body(request)
            return await self.proxy.call(request, api)

    async def count_tokens(self, request: web.Request) -> web.StreamResponse:
        """Nothing is sampled, so nothing is recorded."""
        await limits.read_body(request)
        return await self.proxy.count_tokens(request)

    async def stop(self, _app: web.Application) -> None:
        """Nothing new is accepted any more: wait for the calls under way, then end them."""
        cut = await self.calls.stop(STOP_WAIT_S, self._blame_the_stop)
        if cut:
            log.warning("%d calls were still under way and have been cut", cut)

    def _blame_the_stop(self) -> None:
        self.recorder.cancel_reason = STOPPED

    async def healthz(self, _request: web.Request) -> web.Response:
        """The process runs."""
        return web.json_response({"status": "ok"})

    async def readyz(self, request: web.Request) -> web.Response:
        """Calls can be served: one engine was found. 503 says why not, to readers."""
        engines = self.upstreams.all
        best = next((u for u in engines if u.available), engines[0])
        error = best.why_away
        body: dict[str, object] = {"ready": error is None}
        if self.guard.may_read(request):
            body |= {
                "error": error,
                "engine": best.report,
                "engines": [state_of(u) for u in engines],
            }
        return web.Response(
            status=200 if error is None else 503,
            body=msgspec.json.encode(body),
            content_type="application/json",
        )

    async def render_metrics(self, _request: web.Request) -> web.Response:
        """Prometheus exposition."""
        return web.Response(
            body=await asyncio.to_thread(self.metrics.render),
            headers={"Content-Type": CONTENT_TYPE_LATEST},
        )


GATEWAY = web.AppKey("gateway", Gateway)

BEGUN: ContextVar[web.StreamResponse | None] = ContextVar("begun", default=None)
"""The response whose headers have been sent, or are about to be. aiohttp serves each request in a
context of its own."""


def create_app(config: GatewayConfig, *, sink: Sink | None = None) -> web.Application:
    """The gateway as an aiohttp application. Serve it with ``handler_cancellation=True``."""
    gateway = Gateway(config, sink)
    app = web.Application(
        middlewares=[_errors, gateway.guard.check], client_max_size=config.max_request_bytes
    )
    app[GATEWAY] = gateway
    app.cleanup_ctx.append(gateway.lifetime)
    for prefix in ("", "/t/{trajectory}"):
        app.router.add_post(f"{prefix}/v1/chat/completions", partial(gateway.call, api="chat"))
        app.router.add_post(f"{prefix}/v1/completions", partial(gateway.call, api="completions"))
        app.router.add_post(f"{prefix}/v1/responses", partial(gateway.call, api="responses"))
        app.router.add_get(prefix + "/v1/responses/{response}", gateway.proxy.response)
        app.router.add_post(f"{prefix}/v1/messages", partial(gateway.call, api="messages"))
        app.router.add_post(f"{prefix}/v1/messages/count_tokens", gateway.count_tokens)
        app.router.add_get(f"{prefix}/v1/models", gateway.proxy.models)
        app.router.add_get(prefix + "/v1/models/{model:.+}", gateway.proxy.models)
    app.router.add_get("/healthz", gateway.healthz)
    app.router.add_get("/readyz", gateway.readyz)
    app.router.add_get("/metrics", gateway.render_metrics)
    if gateway.reader is not None:
        context = ApiContext(
            reader=gateway.reader,
            submit=gateway.sink.submit,
            mint=gateway.sessions.mint,
            upstreams=gateway.upstreams.all,
        )
        feed = add_api_routes(app, context)
        add_pages(app)
        gateway.metrics.count_poll_errors(lambda: feed.poll_errors)
        gateway.metrics.add(DriftMetrics(Answers(gateway.reader)))
    app.on_response_prepare.append(_remember)
    app.on_shutdown.append(gateway.stop)  # after the API's: its followers end at once
    return app


async def _remember(_request: web.Request, response: web.StreamResponse) -> None:
    BEGUN.set(response)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost edge of a request: every error is answered as OpenAI's clients read it.

    A response that has begun cannot be taken back: then its connection is cut, so that nobody takes
    it for whole.
    """
    response = await _answer(request, handler)
    begun = BEGUN.get()
    if begun is None or begun is response:
        return response
    log.warning("%s %s: cut, because it failed after its start", request.method, _path(request))
    if request.transport is not None:
        request.transport.abort()
    return begun


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The handler's response, or an error's."""
    try:
        return await handler(request)
    except DriftgateError as error:
        log.warning("%s %s: %s", request.method, _path(request), error)
        return _error(request, error.status, str(error))
    except web.HTTPException as error:
        message = error.reason
        if error.status in (404, 405):
            there = (
                "/api/openapi.json lists what there is"
                if request.path.startswith("/api/")
                else f"there are {', '.join(http.SUPPORTED)}"
            )
            message = f"there is no {request.method} {_path(request)} here; {there}"
        elif error.status == 408:
            message = f"the request's body took longer than {limits.BODY_TIMEOUT_S:g} s"
        elif error.status == 413:
            limit = request.app[GATEWAY].config.max_request_bytes
            message = (
                f"the request is longer than max_request_bytes ({limit}); send less, or raise it "
                "in the gateway's configuration"
            )
        return _error(request, error.status, message, error.headers.get("Allow"))
    except Exception as error:
        log.exception("%s %s failed", request.method, _path(request))
        return _error(request, 500, f"{type(error).__name__} inside the gateway")


def _error(
    request: web.Request, status: int, message: str, allow: str | None = None
) -> web.Response:
    """As the API's or as OpenAI's clients read it."""
    if request.path.startswith("/api/"):
        response = error_answer(status, message)
    else:
        response = web.Response(
            status=status,
            body=error_of_path(request.path, status, f"driftgate: {message}"),
            content_type="application/json",
        )
    if status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="driftgate"'
    if allow is not None:
        response.headers["Allow"] = allow
    if status in (429, 503):
        response.headers["Retry-After"] = str(http.RETRY_AFTER_S)
    if status in (408, 413):
        response.force_close()  # the rest of the body is not waited for
    return response


def _path(request: web.Request) -> str:
    """The path for a log's line: percent-encoded, so that it cannot begin a line of its own."""
    path: str = request.rel_url.raw_path[:MAX_LOGGED_PATH]
    return path.encode("ascii", "backslashreplace").decode()


def _open_store(config: GatewayConfig) -> Writer:
    try:
        # Other users of the machine do not read prompts, unless somebody made the folder for them.
        config.store.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Writer(config.store, durability=config.durability, queue_bytes=QUEUE_BYTES)
    except OSError as error:
        raise StorageError(
            f"the store {config.store} cannot be opened: {error}; choose another --store"
        ) from error


def _nothing() -> None:
    """A sink of the tests has nothing to flush."""


def _unreachable() -> Sink:
    raise AssertionError("a gateway has a sink or a writer")


@contextlib.asynccontextmanager
async def serve(
    config: GatewayConfig, *, sink: Sink | None = None, hurry: asyncio.Event | None = None
) -> AsyncIterator[str]:
    """Serve for the length of the block; gives the base URL. ``hurry`` ends the wait for calls at
    its end."""
    app = create_app(config, sink=sink)
    gateway = app[GATEWAY]
    if hurry is not None:
        gateway.calls.hurry = hurry
    refused = gateway.metrics.refused.labels("connections").inc
    async with listening(
        app, config, shutdown_timeout_s=SHUTDOWN_TIMEOUT_S, refused=refused
    ) as url:
        yield url


def run(config: GatewayConfig, *, started: Callable[[str], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM, under uvloop; a second one does not wait for calls.

    ``started`` gets the base URL once it listens.
    """
    import uvloop

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    raise_file_limit()
    uvloop.run(_until_stopped(config, started))


async def _until_stopped(config: GatewayConfig, started: Callable[[str], None] | None) -> None:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def signalled() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for sign in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sign, signalled)
    async with serve(config, hurry=hurry) as url:
        _spare_the_collector()
        log.info("driftgate listens at %s, in front of %s", url, ", ".join(config.urls))
        if started is not None:
            started(url)
        await stop.wait()


def _spare_the_collector() -> None:
    """What was made to start is kept for good: a full collection looked at its 70,000 objects
    again, for 30 ms in which no stream moved."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])

"""The only upstream I/O: one client session, through which calls and model lists are forwarded.

Only known model routes exist here; an engine's administration cannot be reached through the
gateway."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import logging
import sqlite3
import time
import uuid
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

from driftgate.adapters.base import EngineAdapter
from driftgate.errors import NotFoundError, RequestError, StorageError, UpstreamError
from driftgate.gateway import http, openai
from driftgate.gateway.breakage import breakage
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.conversation import MAX_SEEN, Seen
from driftgate.gateway.ending import Asked
from driftgate.gateway.exchange import Exchange
from driftgate.gateway.history import History, continues, read_history
from driftgate.gateway.metrics import Metrics
from driftgate.gateway.openai import Api, Fields, Plan
from driftgate.gateway.recent import Recent
from driftgate.gateway.recorder import Recorder
from driftgate.gateway.sessions import Call, Place, Sessions
from driftgate.gateway.telemetry import Spans
from driftgate.gateway.upstream import Upstream
from driftgate.storage import Neighbours, Reader
from driftgate.trace import CallIntent

__all__ = ["Proxy"]

CONNECT_TIMEOUT_S = 10.0
"""An engine's machine that does not accept a connection by then is not there."""

UPSTREAM_KEEP_ALIVE_S = 3.0
"""uvicorn, which serves vLLM, closes idle connections after 5 s; a request sent into that is
lost."""

RESTORE_WAIT_S = 10.0
"""A call that may continue or repeat an earlier one, and does not name its trajectory, waits this
long for the store to be read at the start."""

LARGE_BODY_BYTES = 1 << 20
"""Parsing and hashing 40 MB of images took 230 ms: longer requests are read on a thread."""

READ_BUFFER_BYTES = 1 << 18
"""Routes come in megabytes; with aiohttp's 64 kB the socket is paused and resumed for each."""

log = logging.getLogger("driftgate.gateway")

PATHS: dict[Api, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


class Proxy:
    """Forwards calls. Lives between ``start`` and ``close``."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        adapter: EngineAdapter,
        sessions: Sessions,
        recorder: Recorder,
        reader: Reader | None,
        neighbours: Neighbours | None,
        upstream: Upstream,
        metrics: Metrics,
        spans: Spans | None = None,
    ) -> None:
        self.spans = spans
        self._config = config
        self._base = config.upstream.rstrip("/")
        self._adapter = adapter
        self._sessions = sessions
        self._recorder = recorder
        self._reader = reader
        self._neighbours = neighbours
        self._upstream = upstream
        self._metrics = metrics
        self._session: aiohttp.ClientSession
        self._seen: Recent[bytes, Seen] = Recent(MAX_SEEN)
        self.restored = asyncio.Event()
        """What the store knows of earlier trajectories is in ``sessions``."""

    async def start(self) -> None:
        """Open the client session."""
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            # Generations take minutes, and silent ones are not dead: only connecting has a limit.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=UPSTREAM_KEEP_ALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=READ_BUFFER_BYTES,
            skip_auto_headers=("User-Agent", "Content-Type", "Accept"),
        )

    async def close(self) -> None:
        """Close the engine's connections."""
        await self._session.close()

    async def models(self, request: web.Request) -> web.StreamResponse:
        """``GET /v1/models`` and ``/v1/models/{model}``."""
        if not http.is_model(request.match_info.get("model", "")):
            raise NotFoundError("a model's name is no path")
        path = request.rel_url.raw_path[request.rel_url.raw_path.index("/v1/models") :]
        headers = http.request_headers(request.headers, self._config)
        url = self._engine_url(path, request)
        try:
            async with self._session.get(url, headers=headers, allow_redirects=False) as answer:
                body = http.without_key(await answer.read(), self._config.upstream_key)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._upstream.lost()
            broke = breakage(error)
            raise UpstreamError(f"{broke.what}; {broke.fix}") from error
        return web.Response(
            status=answer.status, body=body, headers=http.answer_headers(answer.headers)
        )

    async def call(self, request: web.Request, api: Api) -> web.StreamResponse:
        """One model call, captured."""
        started_ns = time.time_ns()
        body = await request.read()
        await self._upstream.ready()
        if len(body) > LARGE_BODY_BYTES:
            sent, fields, plan = await asyncio.to_thread(self._prepare, api, body)
        else:
            sent, fields, plan = self._prepare(api, body)
        call, asked = await self._begin(request, body, sent, fields, plan, started_ns)
        exchange = Exchange(
            request,
            asked,
            sessions=self._sessions,
            recorder=self._recorder,
            adapter=self._adapter,
        )
        try:
            with self._metrics.in_flight.track_inprogress():
                await self._open(call, plan, started_ns)
                return await exchange.run()
        except UpstreamError:
            self._upstream.lost()
            raise
        finally:
            self._count(exchange, api, started_ns)
            if call.span is not None:
                call.span.end(
                    exchange.outcome,
                    first_byte_ns=exchange.first_byte_ns,
                    streamed=exchange.streamed,
                    now_ns=time.time_ns(),
                )

    def _prepare(self, api: Api, body: bytes) -> tuple[bytes, Fields, Plan]:
        """What to send. What is not a JSON object goes on as it is: the engine says so itself."""
        try:
            fields = openai.read_request(body)
        except RequestError as error:
            openai.refuse_forbidden(_as_engines_read(body), self._adapter)
            return body, {}, Plan(api=api, uncaptured=str(error))
        rewritten, plan = openai.rewrite(
            api,
            fields,
            self._adapter,
            self._upstream.stream_mode(),
            refusal=self._upstream.refusal,
        )
        return body if rewritten is None else rewritten, fields, plan

    async def _begin(
        self,
        request: web.Request,
        body: bytes,
        sent: bytes,
        fields: Fields,
        plan: Plan,
        started_ns: int,
    ) -> tuple[Call, Asked]:
        """Find the call's trajectory and step."""
        if len(body) > LARGE_BODY_BYTES:
            digest = await asyncio.to_thread(_digest, body)
            seen: Recent[bytes, Seen] = Recent(MAX_SEEN)  # ours belongs to the loop
            history = await asyncio.to_thread(read_history, fields, plan, seen)
        else:
            digest, history = _digest(body), read_history(fields, plan, self._seen)
        retry = _retry_count(request)
        place = self._place(request, fields, history)
        if not place.named and not self.restored.is_set() and (continues(history) or retry):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.restored.wait(), RESTORE_WAIT_S)
            place = self._place(request, fields, history)
        if not self._sessions.is_known(place):
            next_step = await asyncio.to_thread(self._next_step, place.trajectory)
            self._sessions.resume(place.trajectory, next_step)
        call = self._sessions.begin(
            place,
            call_id=f"c-{uuid.uuid4().hex}",
            body_sha256=digest,
            sdk_retry=retry,
            step=await self._shared_step(place, digest, retry),
        )
        if call.place.ambiguous:
            self._metrics.ambiguous.inc()
        url = self._engine_url(PATHS[plan.api], request)
        headers = http.request_headers(request.headers, self._config)
        if self.spans is not None:
            engine = self._upstream.name
            self.spans.begin(call, plan, request.headers, headers, engine, started_ns)
        return call, Asked(
            send=lambda: self._session.post(
                url, data=_payload(sent), headers=headers, allow_redirects=False
            ),
            call=call,
            plan=plan,
            body=self._config.redacted(body),
            history=history,
            started_ns=started_ns,
            expect_routes=self._upstream.has_routes,
            max_answer_bytes=self._config.max_answer_bytes,
            hide_key=lambda said: http.without_key(said, self._config.upstream_key),
        )

    def _engine_url(self, path: str, request: web.Request) -> URL:
        """``path`` at the engine with the agent's query string as it was spelled."""
        query = request.rel_url.raw_query_string
        return URL(f"{self._base}{path}?{query}" if query else self._base + path, encoded=True)

    def _place(self, request: web.Request, fields: Fields, history: History) -> Place:
        return self._sessions.place(
            url=request.match_info.get("trajectory"),
            headers=request.headers,
            metadata=openai.read(fields, "metadata", dict[str, Any]),
            history=history,
        )

    async def _shared_step(self, place: Place, digest: str, retry: int) -> int | None:
        """The call's step where other gateways may serve its trajectory too; None: number it here.

        A trajectory that begins here has a name that nobody else knows yet."""
        if self._neighbours is None or place.attribution == "new" or not self._neighbours.any():
            return None
        step = self._sessions.next_step(place, body_sha256=digest, sdk_retry=retry)
        if step is None:
            return None
        try:
            return await asyncio.to_thread(self._neighbours.next_step, place.trajectory, step)
        except sqlite3.Error as error:
            log.warning("step %d of %s may be taken twice: %s", step, place.trajectory, error)
            return None

    def _next_step(self, trajectory: str) -> int:
        """Behind the steps that the store knows."""
        if self._reader is None:
            return 0
        return max((call.step + 1 for call in self._reader.calls(trajectory)), default=0)

    async def _open(self, call: Call, plan: Plan, started_ns: int) -> None:
        intent = CallIntent(
            call_id=call.call_id,
            trajectory=call.place.trajectory,
            step=call.step,
            attribution=call.place.attribution,
            api=plan.api,
            model=plan.model,
            body_sha256=call.body_sha256,
            retry=call.retry,
            started_ns=started_ns,
        )
        try:
            await self._recorder.open(intent)
        except asyncio.CancelledError:
            self._sessions.failed(call)
            raise
        except StorageError as error:
            self._sessions.failed(call)
            raise StorageError(
                f"the call was not sent to the engine, because it could not be recorded "
                f"(on_capture_failure is refuse): {error}"
            ) from error

    def _count(self, exchange: Exchange, api: Api, started_ns: int) -> None:
        streamed = "true" if exchange.streamed else "false"
        self._metrics.calls.labels(api, streamed, exchange.outcome).inc()
        if exchange.first_byte_ns is not None:
            waited_s = (exchange.first_byte_ns - started_ns) / 1e9
            self._metrics.first_byte.labels(streamed).observe(waited_s)


def _as_engines_read(body: bytes) -> dict[str, Any]:
    """A body as Python's lax parser takes it, with NaN, a byte order mark or UTF-16: what vLLM
    uses. Empty where that fails too: then the engine refuses it."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _payload(body: bytes) -> bytes | io.BytesIO:
    """What aiohttp sends at once, or, where that would hold the loop, piece by piece."""
    return io.BytesIO(body) if len(body) > LARGE_BODY_BYTES else body


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


def _retry_count(request: web.Request) -> int:
    value = request.headers.get("x-stainless-retry-count", "0")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 4 else 0

"""The only upstream I/O: one client session, through which calls and model lists are forwarded.

Only known model routes exist here; an engine's administration cannot be reached through the
gateway."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import aiohttp
from aiohttp import web
from yarl import URL

from driftgate.errors import NotFoundError, RequestError, StorageError, UpstreamError
from driftgate.gateway import http, openai
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.conversation import MAX_SEEN, Seen
from driftgate.gateway.ending import Asked, words
from driftgate.gateway.exchange import Exchange
from driftgate.gateway.history import History, continues, read_history
from driftgate.gateway.metrics import Metrics
from driftgate.gateway.model_list import united
from driftgate.gateway.openai import Api, Fields, Plan
from driftgate.gateway.recent import Recent
from driftgate.gateway.recorder import Recorder
from driftgate.gateway.served import Served
from driftgate.gateway.sessions import Call, Place, Sessions
from driftgate.gateway.telemetry import Spans
from driftgate.gateway.upstream import Upstream
from driftgate.gateway.upstreams import Upstreams
from driftgate.storage import Reader
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

T = TypeVar("T")

PATHS: dict[Api, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


class Proxy:
    """Forwards calls. Lives between ``start`` and ``close``."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        sessions: Sessions,
        recorder: Recorder,
        reader: Reader | None,
        upstreams: Upstreams,
        metrics: Metrics,
        spans: Spans | None = None,
    ) -> None:
        self.spans = spans
        self._config = config
        self._sessions = sessions
        self._recorder = recorder
        self._reader = reader
        self._upstreams = upstreams
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
        named = request.match_info.get("model")
        asked = [u for u in self._upstreams.all if u.available] or self._upstreams.all
        if named is not None:
            asked = [u for u in asked if u.serves(named)] or asked
        if named is not None or len(asked) == 1:
            return await self._get(asked[0], path, request)
        tried = await asyncio.gather(
            *(self._get(u, path, request) for u in asked), return_exceptions=True
        )
        answers = [answer for answer in tried if isinstance(answer, web.Response)]
        if len(answers) < 2:
            return answers[0] if answers else await self._get(asked[0], path, request)
        lists = [a.body for a in answers if a.status == 200 and isinstance(a.body, bytes)]
        return web.Response(body=united(lists), content_type="application/json")

    async def _get(self, upstream: Upstream, path: str, request: web.Request) -> web.Response:
        headers = http.request_headers(request.headers, self._config)
        url = _engine_url(upstream.url, path, request)
        try:
            async with self._session.get(url, headers=headers, allow_redirects=False) as answer:
                body = http.without_key(await answer.read(), self._config.upstream_key)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            upstream.lost()
            raise UpstreamError(
                f"the engine at {upstream.url} did not answer: {words(error)}"
            ) from error
        return web.Response(
            status=answer.status, body=body, headers=http.answer_headers(answer.headers)
        )

    async def call(self, request: web.Request, api: Api) -> web.StreamResponse:
        """One model call, captured."""
        started_ns = time.time_ns()
        body = await request.read()
        read = _aside(body, partial(_read, api, body, None if _is_large(body) else self._seen))
        digest, fields, history, unread = await read
        place = await self._placed(request, fields, history)
        model = openai.read(fields, "model", str) or ""
        upstream = await self._upstreams.choose(place.trajectory, model)
        sent, plan = await _aside(body, partial(self._write, api, body, fields, unread, upstream))
        call = self._sessions.begin(
            place,
            call_id=f"c-{uuid.uuid4().hex}",
            body_sha256=digest,
            sdk_retry=_retry_count(request),
        )
        if call.place.ambiguous:
            self._metrics.ambiguous.inc()
        headers = http.request_headers(request.headers, self._config)
        if self.spans is not None:
            engine = upstream.name, upstream.url
            self.spans.begin(call, plan, request.headers, headers, *engine, started_ns)
        served = Served(upstream)

        async def post(base: str) -> aiohttp.ClientResponse:
            url = _engine_url(base, PATHS[api], request)
            return await self._session.post(
                url, data=_payload(sent), headers=headers, allow_redirects=False
            )

        asked = Asked(
            send=lambda: self._upstreams.send(served, place.trajectory, model, post),
            served=served,
            call=call,
            plan=plan,
            body=self._config.redacted(body),
            history=history,
            started_ns=started_ns,
            expect_routes=upstream.has_routes,
            max_answer_bytes=self._config.max_answer_bytes,
            hide_key=lambda said: http.without_key(said, self._config.upstream_key),
        )
        return await self._serve(request, asked)

    async def _serve(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        exchange = Exchange(
            request,
            asked,
            sessions=self._sessions,
            recorder=self._recorder,
            adapter=asked.served.upstream.adapter,
        )
        try:
            with self._metrics.in_flight.track_inprogress():
                await self._open(asked.call, asked.plan, asked.started_ns)
                return await exchange.run()
        except UpstreamError:
            asked.served.upstream.lost()
            raise
        finally:
            self._count(exchange, asked.plan.api, asked.started_ns)
            if asked.call.span is not None:
                asked.call.span.end(
                    exchange.outcome,
                    first_byte_ns=exchange.first_byte_ns,
                    streamed=exchange.streamed,
                    now_ns=time.time_ns(),
                )

    def _write(
        self, api: Api, body: bytes, fields: Fields, unread: str | None, upstream: Upstream
    ) -> tuple[bytes, Plan]:
        """What to send. What is not a JSON object goes on as it is: the engine says so itself."""
        if unread is not None:
            openai.refuse_forbidden(_as_engines_read(body), upstream.adapter)
            return body, Plan(api=api, uncaptured=unread)
        rewritten, plan = openai.rewrite(
            api, fields, upstream.adapter, upstream.stream_mode(), refusal=upstream.refusal
        )
        return body if rewritten is None else rewritten, plan

    async def _placed(self, request: web.Request, fields: Fields, history: History) -> Place:
        """The call's trajectory, once all that could be it is known."""
        place = self._place(request, fields, history)
        open_ = not place.named and not self.restored.is_set()
        if open_ and (continues(history) or _retry_count(request)):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.restored.wait(), RESTORE_WAIT_S)
            place = self._place(request, fields, history)
        if not self._sessions.is_known(place):
            next_step = await asyncio.to_thread(self._next_step, place.trajectory)
            self._sessions.resume(place.trajectory, next_step)
        return place

    def _place(self, request: web.Request, fields: Fields, history: History) -> Place:
        return self._sessions.place(
            url=request.match_info.get("trajectory"),
            headers=request.headers,
            metadata=openai.read(fields, "metadata", dict[str, Any]),
            history=history,
        )

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


class _Read(NamedTuple):
    """A request's body, before it is known where it goes."""

    digest: str
    fields: Fields
    history: History
    unread: str | None
    """Why it is no JSON object."""


def _read(api: Api, body: bytes, known: Recent[bytes, Seen] | None) -> _Read:
    """``known`` belongs to the event loop; None on a thread."""
    digest, fields, unread = hashlib.sha256(body).hexdigest()[:16], Fields(), None
    try:
        fields = openai.read_request(body)
    except RequestError as error:
        unread = str(error)
    return _Read(digest, fields, read_history(fields, Plan(api=api), known), unread)


async def _aside(body: bytes, work: Callable[[], T]) -> T:
    """``work()``, on a thread where its body is large."""
    return await asyncio.to_thread(work) if _is_large(body) else work()


def _is_large(body: bytes) -> bool:
    return len(body) > LARGE_BODY_BYTES


def _engine_url(base: str, path: str, request: web.Request) -> URL:
    """``path`` at the engine with the agent's query string as it was spelled."""
    query = request.rel_url.raw_query_string
    return URL(f"{base}{path}?{query}" if query else base + path, encoded=True)


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


def _retry_count(request: web.Request) -> int:
    value = request.headers.get("x-stainless-retry-count", "0")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 4 else 0

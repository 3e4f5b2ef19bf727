"""The only upstream I/O: one client session, through which calls and model lists are forwarded.

Only known model routes exist here; an engine's administration cannot be reached through the
gateway."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import aiohttp
import msgspec
from aiohttp import web
from yarl import URL

from driftgate.errors import NotFoundError, RequestError, StorageError, UpstreamError
from driftgate.gateway import anthropic, anthropic_answer, dialects, http, openai
from driftgate.gateway.breakage import breakage
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.conversation import MAX_SEEN, Seen
from driftgate.gateway.dialect import Dialect
from driftgate.gateway.earlier import Earlier, kept_of
from driftgate.gateway.ending import Asked
from driftgate.gateway.exact import Exact
from driftgate.gateway.exchange import Exchange
from driftgate.gateway.history import continues
from driftgate.gateway.metrics import Metrics
from driftgate.gateway.model_list import united
from driftgate.gateway.openai import Api, Plan
from driftgate.gateway.outcomes import intent_of
from driftgate.gateway.post import KEEP_ALIVE_S, EngineAnswer, Poster
from driftgate.gateway.reading import (
    Read,
    Stored,
    adapted,
    read_own,
    storable,
    translate,
    with_system_first,
    write,
)
from driftgate.gateway.recent import Recent
from driftgate.gateway.recorder import Recorder
from driftgate.gateway.responses_answer import response_id
from driftgate.gateway.served import Served
from driftgate.gateway.sessions import Call, Place, Sessions
from driftgate.gateway.steps import Steps
from driftgate.gateway.telemetry import Spans
from driftgate.gateway.upstream import Upstream
from driftgate.gateway.upstreams import Entry, Upstreams
from driftgate.storage import Neighbours, Reader
from driftgate.trace import Api as AgentApi

__all__ = ["Proxy"]

CONNECT_TIMEOUT_S = 10.0
"""An engine's machine that does not accept a connection by then is not there."""

RESTORE_WAIT_S = 10.0
"""A call that may continue or repeat an earlier one, and does not name its trajectory, waits this
long for the store to be read at the start. A named one asks for what the store has of its own."""

LARGE_BODY_BYTES = 1 << 20
"""Parsing and hashing 40 MB of images took 230 ms: longer requests are read on a thread."""

T = TypeVar("T")

log = logging.getLogger("driftgate.gateway")

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
        neighbours: Neighbours | None,
        upstreams: Upstreams,
        metrics: Metrics,
        spans: Spans | None = None,
    ) -> None:
        self.spans = spans
        self._config = config
        self._sessions = sessions
        self._recorder = recorder
        self._upstreams = upstreams
        refuses = config.on_capture_failure == "refuse"
        self._steps = Steps(sessions, reader, neighbours, metrics, refuses=refuses)
        self._metrics = metrics
        self._session: aiohttp.ClientSession
        self._poster: Poster
        self._earlier = Earlier(reader, config.redact)
        exact = config.continuation == "exact"
        self._exact = Exact(reader, lambda: self._session) if exact else None
        self._seen: Recent[bytes, Seen] = Recent(MAX_SEEN)
        self.restored = asyncio.Event()
        """What the store knows of earlier trajectories is in ``sessions``."""

    async def start(self) -> None:
        """Open the client session."""
        # Generations take minutes, and silent ones are not dead: only connecting has a limit.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        self._poster = Poster(connector, timeout)
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            timeout=timeout,
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Content-Type", "Accept"),
        )

    async def close(self) -> None:
        """Close the engine's connections."""
        self._poster.close()
        await self._session.close()

    async def models(self, request: web.Request) -> web.StreamResponse:
        """``GET /v1/models`` and ``/v1/models/{model}``."""
        if not http.is_model(request.match_info.get("model", "")):
            raise NotFoundError("a model's name is no path")
        path = request.rel_url.raw_path[request.rel_url.raw_path.index("/v1/models") :]
        named = request.match_info.get("model")
        asked = self._that_serve(named)
        if named is not None or len(asked) == 1:
            return await self._get(asked[0], path, request)
        tried = await asyncio.gather(
            *(self._get(u, path, request) for u in asked), return_exceptions=True
        )
        answers = [answer for answer in tried if isinstance(answer, web.Response)]
        if len(answers) < 2:
            return answers[0] if answers else await self._get(asked[0], path, request)
        lists = [a.body for a in answers if a.status == 200 and isinstance(a.body, bytes)]
        if not lists:
            return answers[0]
        return web.Response(body=united(lists), content_type="application/json")

    async def _get(self, upstream: Upstream, path: str, request: web.Request) -> web.Response:
        headers = http.request_headers(request.headers, self._config)
        url = URL(upstream.url + _target(path, request), encoded=True)
        try:
            async with self._session.get(url, headers=headers, allow_redirects=False) as answer:
                body = http.without_key(await answer.read(), self._config.upstream_key)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            upstream.lost()
            broke = breakage(error)
            raise UpstreamError(f"{broke.what}; {broke.fix}") from error
        reason = http.reason_phrase(answer.reason)
        headers = http.answer_headers(answer.headers)
        return web.Response(status=answer.status, reason=reason, body=body, headers=headers)

    def _that_serve(self, model: str | None) -> Sequence[Upstream]:
        """Engines to ask what is no model call; all where no model is named."""
        found = [u for u in self._upstreams.all if u.available] or self._upstreams.all
        if model is not None:
            found = [u for u in found if u.serves(model)] or found
        return found

    async def response(self, request: web.Request) -> web.StreamResponse:
        """``GET /v1/responses/{response}``: a response as it was given."""
        only = self._sessions.owner(request.headers)
        kept = await self._earlier.find(request.match_info["response"], only=only)
        return web.Response(body=kept.body, content_type="application/json")

    async def count_tokens(self, request: web.Request) -> web.StreamResponse:
        """``POST /v1/messages/count_tokens``: the prompt's tokens, as the engine renders it."""
        body = await request.read()
        fields = await _aside(body, partial(_to_count, body))
        upstream = self._that_serve(openai.read(fields, "model", str))[0]
        if upstream.system_first:
            fields = await _aside(body, partial(with_system_first, fields))
        sent = msgspec.json.encode(fields)
        url = URL(f"{upstream.url}/tokenize", encoded=True)
        headers = http.request_headers(request.headers, self._config)
        try:
            async with self._session.post(
                url, data=sent, headers=headers, allow_redirects=False
            ) as answer:
                told = http.without_key(await answer.read(), self._config.upstream_key)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            upstream.lost()
            broke = breakage(error)
            raise UpstreamError(f"{broke.what}; {broke.fix}") from error
        return web.Response(
            status=answer.status,
            body=anthropic_answer.counted(answer.status, told),
            content_type="application/json",
        )

    async def call(self, request: web.Request, api: AgentApi) -> web.StreamResponse:
        """One model call, captured."""
        with self._upstreams.entry() as entry:
            return await self._call(request, api, entry)

    async def _call(self, request: web.Request, api: AgentApi, entry: Entry) -> web.StreamResponse:
        started_ns = time.time_ns()
        body = await request.read()
        read = await self._read(request, api, body)
        model = openai.read(read.fields, "model", str) or ""
        headers = http.request_headers(request.headers, self._config)
        place, onward = None, None
        try:
            place = await self._placed(request, read)
            upstream = await self._upstreams.choose(place.trajectory, model, entry)
            read = await _aside(body, partial(adapted, api, read, upstream))
            sent, plan = await _aside(body, partial(write, api, body, read, upstream))
            stored = await _aside(body, partial(storable, body, self._config))
            if self._exact is not None:
                aside = partial(_aside, body)
                onward = await self._exact.onward(
                    read.fields, plan, place, upstream, headers, aside
                )
            step = await self._shared_step(place, request, read)
        except asyncio.CancelledError:
            place = place or await self._steps.resumed(self._place(request, read))
            left = self._begin(place, request, read, await self._shared_step(place, request, read))
            self._sessions.failed(left)
            self._recorder.left(intent_of(left, api, model, started_ns))
            raise
        except UpstreamError:
            if place is not None:  # what is asked again is this call, and no other with its body
                step = await self._shared_step(place, request, read)
                self._sessions.failed(self._begin(place, request, read, step))
            raise
        call = self._begin(place, request, read, step)
        if call.place.ambiguous:
            self._metrics.ambiguous.inc()
        if self.spans is not None:
            engine = upstream.name, upstream.url
            self.spans.begin(call, plan, request.headers, headers, *engine, started_ns)
        served = Served(upstream)
        target = _target(PATHS[plan.api], request if plan.translated is None else None)

        async def post(base: str) -> EngineAnswer:
            ask = partial(self._poster.post, base, target, headers)
            return await (ask(sent) if onward is None else onward.ask(ask, sent, served.upstream))

        asked = Asked(
            send=lambda: self._upstreams.send(served, entry, place.trajectory, model, post),
            served=served,
            call=call,
            plan=plan,
            body=stored.body,
            dialect=self._dialect(call, plan, read, stored),
            history=read.history,
            onward=onward,
            started_ns=started_ns,
            expect_routes=upstream.has_routes,
            max_answer_bytes=self._config.max_answer_bytes,
            hide_key=lambda said: http.without_key(said, self._config.upstream_key),
        )
        return await self._serve(request, asked)

    def _begin(self, place: Place, request: web.Request, read: Read, step: int | None) -> Call:
        return self._sessions.begin(
            place,
            call_id=f"c-{secrets.token_hex(16)}",
            body_sha256=read.digest,
            sdk_retry=http.retry_count(request.headers),
            step=step,
        )

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
                await self._open(asked, exchange)
                return await exchange.run()
        except UpstreamError:
            asked.served.upstream.lost()
            raise
        finally:
            self._count(exchange, asked.plan.spoken, asked.started_ns)
            if asked.call.span is not None:
                asked.call.span.end(
                    exchange.outcome,
                    first_byte_ns=exchange.first_byte_ns,
                    streamed=exchange.streamed,
                    now_ns=time.time_ns(),
                )

    async def _read(self, request: web.Request, api: AgentApi, body: bytes) -> Read:
        """The request as the engine's API has it. RequestError where another API's cannot be."""
        known = None if _is_large(body) else self._seen
        if api == "chat" or api == "completions":
            return await _aside(body, partial(read_own, api, body, known))
        fields = await _aside(body, partial(openai.read_request, body))
        earlier, previous = list[Any](), None
        if api == "responses" and (named := dialects.previous_of(fields)) is not None:
            only = self._sessions.owner(request.headers)
            try:
                earlier = await self._earlier.conversation(named, only=only)
                previous = (await self._earlier.find(named, only=only)).trajectory
            except NotFoundError as error:
                raise RequestError(f"previous_response_id: {error}") from error
        read = await _aside(body, partial(translate, api, body, fields, earlier, known))
        return read._replace(previous=previous)

    def _dialect(self, call: Call, plan: Plan, read: Read, stored: Stored) -> Dialect | None:
        if plan.translated is None:
            return None

        def remember(body: bytes) -> None:
            kept = kept_of(read.agents, call.place.trajectory, body)
            if kept is not None:
                self._earlier.remember(response_id(call.call_id), kept)

        return dialects.dialect(plan.translated, read.agents, call.call_id, remember, stored.fields)

    async def _placed(self, request: web.Request, read: Read) -> Place:
        """The call's trajectory, once all that could be it is known."""
        place = self._place(request, read)
        open_ = not place.named and not self.restored.is_set()
        if open_ and (continues(read.history) or http.retry_count(request.headers)):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.restored.wait(), RESTORE_WAIT_S)
            place = self._place(request, read)
        return await self._steps.resumed(place)

    def _place(self, request: web.Request, read: Read) -> Place:
        return self._sessions.place(
            url=request.match_info.get("trajectory"),
            headers=request.headers,
            metadata=openai.read(read.fields, "metadata", dict[str, Any]),
            history=read.history,
            previous=read.previous,
        )

    async def _shared_step(self, place: Place, request: web.Request, read: Read) -> int | None:
        return await self._steps.shared(
            place, body_sha256=read.digest, sdk_retry=http.retry_count(request.headers)
        )

    async def _open(self, asked: Asked, exchange: Exchange) -> None:
        call, plan = asked.call, asked.plan
        try:
            await self._recorder.open(intent_of(call, plan.spoken, plan.model, asked.started_ns))
        except asyncio.CancelledError:
            self._sessions.failed(call)
            exchange.unsent("cancelled")
            raise
        except StorageError as error:
            self._sessions.failed(call)
            exchange.unsent("not_recorded")
            raise StorageError(
                f"the call was not sent to the engine, because it could not be recorded "
                f"(on_capture_failure is refuse): {error}"
            ) from error

    def _count(self, exchange: Exchange, api: AgentApi, started_ns: int) -> None:
        streamed = "true" if exchange.streamed else "false"
        self._metrics.child(self._metrics.calls, api, streamed, exchange.outcome).inc()
        if exchange.first_byte_ns is not None:
            waited_s = (exchange.first_byte_ns - started_ns) / 1e9
            self._metrics.child(self._metrics.first_byte, streamed).observe(waited_s)


async def _aside(body: bytes, work: Callable[[], T]) -> T:
    """``work()``, on a thread where its body is large."""
    return await asyncio.to_thread(work) if _is_large(body) else work()


def _to_count(body: bytes) -> openai.Fields:
    """The engine's request for an agent's ``count_tokens``."""
    return anthropic.count_request(body, openai.read_request(body))


def _is_large(body: bytes) -> bool:
    return len(body) > LARGE_BODY_BYTES


def _target(path: str, request: web.Request | None) -> str:
    """``path`` with the agent's query string as it was spelled."""
    query = "" if request is None else request.rel_url.raw_query_string
    return f"{path}?{query}" if query else path

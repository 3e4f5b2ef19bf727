"""One model call, from the agent's request to the recorded answer: the steps of the protocol.

Bytes are forwarded as they come and kept; folding them into traces happens on the writer thread. An
answer is made known to attribution before its end is sent, because the agent's next call may come
at once. A stream that the engine cuts reaches the agent cut, never as a clean end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import aiohttp
from aiohttp import web

from driftgate.adapters.base import EngineAdapter
from driftgate.errors import DriftgateError, StorageError, UpstreamError
from driftgate.gateway import http, sse, synthesis
from driftgate.gateway.capture import Folded, fold_answer, fold_stream
from driftgate.gateway.conversation import Turn
from driftgate.gateway.history import History, turns_of_answer, turns_of_stream
from driftgate.gateway.openai import Plan, Stripped, strip_answer, strip_event
from driftgate.gateway.pieces import Pieces
from driftgate.gateway.prompts import End
from driftgate.gateway.recorder import CLIENT_LEFT, Answer, Recorder
from driftgate.gateway.sessions import Call, Sessions
from driftgate.gateway.tasks import beside

__all__ = ["Asked", "Exchange", "Outcome"]

KEEP_ALIVE_S = 10.0
"""Silence after which a written stream sends a comment: below the idle limits of common proxies.
Headers are held until then, so that an engine's early error keeps its status."""

ERROR_EVENT = b'data: {"error"'
"""How vLLM reports a failure inside a stream; a clean ``[DONE]`` follows."""

SAID_CHARS = 300
"""Of an engine's error, in an outcome."""

Ask: TypeAlias = Callable[[], AbstractAsyncContextManager[aiohttp.ClientResponse]]
Outcome: TypeAlias = Literal[
    "answered", "engine_error", "unreachable", "cut", "cancelled", "not_recorded"
]
Fetched: TypeAlias = tuple[int, Mapping[str, str], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One call, ready to be sent."""

    send: Ask
    """Sends the request to the engine."""
    call: Call
    plan: Plan
    body: bytes
    """The agent's."""
    history: History
    started_ns: int
    expect_routes: bool | None
    max_answer_bytes: int
    hide_key: Callable[[bytes], bytes]
    """Takes the engine's key out of an error that repeats it."""


class Exchange:
    """Serves one call; ``run`` is used once."""

    def __init__(
        self,
        request: web.Request,
        asked: Asked,
        *,
        sessions: Sessions,
        recorder: Recorder,
        adapter: EngineAdapter,
    ) -> None:
        self.outcome: Outcome = "answered"
        self.first_byte_ns: int | None = None
        self.streamed = asked.plan.stream
        self._request = request
        self._asked = asked
        self._sessions = sessions
        self._recorder = recorder
        self._adapter = adapter
        self._events: list[bytes] = []
        self._kept_bytes = 0
        self._recorded = False
        self._known = False
        self._released = False
        """The end of the answer is on its way to the agent: what breaks now is no failed try."""

    async def run(self) -> web.StreamResponse:
        """Ask the engine and answer the agent.

        UpstreamError or StorageError where the agent must get an error and nothing was sent yet.
        """
        try:
            if self._asked.plan.mode == "synthesise":
                return await self._synthesise()
            async with self._asked.send() as answer:
                return await self._forward(answer)
        except asyncio.CancelledError:
            self._fail("cancelled", self._recorder.cancel_reason)
            raise
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._fail("unreachable", f"the engine did not answer: {_words(error)}")
            raise UpstreamError(
                f"the engine did not answer: {_words(error)}; check that it runs, and that the "
                "gateway's upstream is its address"
            ) from error
        except DriftgateError as error:
            self._fail("not_recorded" if isinstance(error, StorageError) else "cut", str(error))
            raise

    # An answer in one piece.

    async def _forward(self, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        encoded = answer.headers.get("Content-Encoding", "identity") != "identity"
        if answer.status == 200 and not encoded:
            if answer.content_type == "text/event-stream":
                return await self._stream(answer)
            return await self._json(answer)
        raw = await self._read(answer)
        if answer.status == 200:
            why = "the engine compressed its answer although identity was asked for"
            self._recorder.failed(self._asked.call, "capture_failed", why)
            self._recorded = True
        else:
            self._fail("engine_error", _said(raw), answer.status)
        return web.Response(
            status=answer.status, body=raw, headers=http.answer_headers(answer.headers)
        )

    async def _json(self, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        raw = await self._read(answer)
        self.streamed = False
        # On the loop at any size: the parser holds the GIL, a thread would only add its switch.
        body, messages, pieces = strip_answer(raw, self._asked.plan)
        self._make_known(turns_of_answer(self._asked.history, self._asked.plan, raw, messages))
        response = web.Response(body=body, headers=http.answer_headers(answer.headers))
        fold = self._fold_answer(pieces or raw, "json")
        if self._recorder.strict:
            await self._recorder.closed(self._record(fold, len(raw)))
        delivered = False
        self._released = True
        try:
            await response.prepare(self._request)
            self._first_byte()
            await response.write_eof()
            delivered = True
        except ConnectionError:
            pass
        finally:  # whole as the answer is, it is kept also when the agent does not wait for it
            self._record(fold, len(raw), delivered=delivered)
        return response

    async def _read(self, answer: aiohttp.ClientResponse) -> bytes:
        """The whole body. UpstreamError where it is cut or too long."""
        parts, size = [], 0
        async for chunk in _chunks(answer):
            parts.append(chunk)
            size += len(chunk)
            if size > self._asked.max_answer_bytes:
                limit = self._asked.max_answer_bytes
                raise UpstreamError(
                    f"the engine's answer is longer than max_answer_bytes ({limit}); raise it"
                )
        whole = b"".join(parts)
        return whole if answer.status == 200 else self._asked.hide_key(whole)

    # A stream.

    async def _stream(self, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        response = web.StreamResponse(headers=http.answer_headers(answer.headers))
        self.streamed = True
        splitter = sse.Splitter()
        end: str | None = None
        try:
            await response.prepare(self._request)
            async for chunk in _chunks(answer):
                await self._pass_events(response, splitter.feed(chunk))
            if rest := splitter.rest():
                await self._write(response, rest)
            await self._before_end()
            await response.write_eof()
        except asyncio.CancelledError:
            self._end_stream(self._recorder.cancel_reason, left=True)
            raise
        except ConnectionError:  # of the agent: the engine's is an UpstreamError
            end = CLIENT_LEFT
        except (UpstreamError, StorageError) as error:
            end = str(error)
            self._abort()
        self._end_stream(end, left=end == CLIENT_LEFT)
        return response

    async def _pass_events(self, response: web.StreamResponse, events: list[bytes]) -> None:
        """Forward what is the agent's; the end only when the answer may end."""
        out: list[bytes] = []
        for event in events:
            self._keep(event)
            if sse.event_data(event) == sse.DONE:
                await self._write(response, b"".join(out))
                out.clear()
                await self._before_end()
            if (stripped := strip_event(event, self._asked.plan)) is not None:
                out.append(stripped)
        await self._write(response, b"".join(out))

    async def _before_end(self) -> None:
        """All of the answer is here: make it known and, in ``strict``, durable. Once."""
        if self._known:
            return
        self._make_known(turns_of_stream(self._asked.history, self._asked.plan, self._events))
        if self._recorder.strict:
            await self._recorder.closed(self._record_stream(None))
        self._released = True

    def _keep(self, event: bytes) -> None:
        """Keep the event for the fold, up to the limit; then only count."""
        if event.startswith(ERROR_EVENT):
            self._sessions.failed(self._asked.call)
            self.outcome = "engine_error"
        self._kept_bytes += len(event)
        if self._kept_bytes <= self._asked.max_answer_bytes:
            self._events.append(event)
        else:
            self._events.clear()

    def _end_stream(self, end: str | None, *, left: bool) -> None:
        if end is not None:
            if not self._released:
                self._sessions.failed(self._asked.call)
            self.outcome = "cancelled" if left else "cut"
        self._record_stream(end, delivered=not left)

    def _record_stream(self, end: str | None, *, delivered: bool = True) -> Future[None] | None:
        limit = self._asked.max_answer_bytes
        if self._kept_bytes > limit and not self._recorded:
            self._recorded = True
            why = f"the stream is longer than max_answer_bytes ({limit}); raise it"
            self._recorder.failed(self._asked.call, "capture_failed", why)
            return None
        # After a whole answer a client that leaves has only missed the end of the transfer.
        cut = None if self._known else end
        fold = partial(
            fold_stream,
            self._events,
            self._asked.plan,
            self._adapter,
            expect_routes=self._asked.expect_routes,
            end=cut,
        )
        return self._record(fold, self._kept_bytes, delivered=delivered)

    # A stream that the engine is not asked for.

    async def _synthesise(self) -> web.StreamResponse:
        """Ask for JSON and write the stream; comments keep the connection alive meanwhile."""
        response: web.StreamResponse | None = None
        async with beside("synthesise", self._fetch()) as fetching:
            while not (await asyncio.wait({fetching}, timeout=KEEP_ALIVE_S))[0]:
                response = response or await self._begin_stream()
                await self._write(response, synthesis.KEEP_ALIVE)
            try:
                status, headers, raw = fetching.result()
                stripped = strip_answer(raw, self._asked.plan)
                events = (
                    synthesis.stream_of(stripped.body, self._asked.plan) if status == 200 else []
                )
            except (aiohttp.ClientError, TimeoutError, OSError, UpstreamError) as error:
                if response is None:
                    raise
                self._fail("cut", _words(error))
                self._abort()
                return response
        if status != 200:
            return await self._synthesise_error(response, status, headers, raw)
        response = response or await self._begin_stream()
        return await self._write_stream(response, raw, stripped, events)

    async def _synthesise_error(
        self,
        response: web.StreamResponse | None,
        status: int,
        headers: Mapping[str, str],
        raw: bytes,
    ) -> web.StreamResponse:
        self._fail("engine_error", _said(raw), status)
        if response is None:
            return web.Response(status=status, body=raw, headers=headers)
        await self._write(response, synthesis.error_event(raw) + synthesis.DONE_EVENT)
        return response

    async def _write_stream(
        self, response: web.StreamResponse, raw: bytes, stripped: Stripped, events: list[bytes]
    ) -> web.StreamResponse:
        _, messages, pieces = stripped
        fold = self._fold_answer(pieces or raw, "synthesised")
        delivered = True
        try:
            await self._write(response, b"".join(events))
            self._make_known(turns_of_answer(self._asked.history, self._asked.plan, raw, messages))
            if self._recorder.strict:
                await self._recorder.closed(self._record(fold, len(raw)))
            self._released = True
            await self._write(response, synthesis.DONE_EVENT)
            await response.write_eof()
        except ConnectionError:
            delivered = False
        except StorageError:
            self._abort()
        self._record(fold, len(raw), delivered=delivered)
        return response

    async def _fetch(self) -> Fetched:
        async with self._asked.send() as answer:
            return answer.status, http.answer_headers(answer.headers), await self._read(answer)

    async def _begin_stream(self) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(self._request)
        return response

    # What all of them do.

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        if data:
            self._first_byte()
            await response.write(data)

    def _first_byte(self) -> None:
        self.first_byte_ns = self.first_byte_ns or time.time_ns()

    def _abort(self) -> None:
        """Cut the agent's connection, so that what it got cannot be taken for a whole answer."""
        if self._request.transport is not None:
            self._request.transport.abort()

    def _make_known(self, turns: Iterable[Turn | End]) -> None:
        self._known = True
        self._sessions.answered(self._asked.call, turns)

    def _fold_answer(
        self, answer: bytes | Pieces, via: Literal["json", "synthesised"]
    ) -> Callable[[], Folded]:
        return partial(
            fold_answer,
            answer,
            self._asked.plan,
            self._adapter,
            expect_routes=self._asked.expect_routes,
            via=via,
        )

    def _record(
        self, fold: Callable[[], Folded], size_bytes: int, *, delivered: bool = True
    ) -> Future[None] | None:
        """Hand the answer to storage; does nothing the second time."""
        if self._recorded:
            return None
        self._recorded = True
        answer = Answer(
            fold=fold,
            size_bytes=size_bytes + len(self._asked.body),
            request=self._asked.body,
            started_ns=self._asked.started_ns,
            first_byte_ns=self.first_byte_ns,
            ended_ns=time.time_ns(),
            delivered=delivered,
            streamed=self.streamed,
            cancelled=self.outcome == "cancelled",
        )
        return self._recorder.close(self._asked.call, self._asked.plan, answer)

    def _fail(self, outcome: Outcome, reason: str, http_status: int | None = None) -> None:
        self.outcome = outcome
        if not self._released:
            self._sessions.failed(self._asked.call)
        if not self._recorded:
            self._recorded = True
            status: Literal["cancelled", "failed"] = (
                "cancelled" if outcome == "cancelled" else "failed"
            )
            self._recorder.failed(self._asked.call, status, reason, http_status=http_status)


async def _chunks(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The body as it comes. UpstreamError where the engine breaks it off."""
    try:
        async for chunk in answer.content.iter_any():
            yield chunk
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise UpstreamError(f"the engine broke off its answer: {_words(error)}") from error


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _said(raw: bytes) -> str:
    return f"the engine answered: {raw[:SAID_CHARS].decode(errors='replace')}"

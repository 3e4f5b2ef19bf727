"""A stream that the engine is not asked for: its JSON answer is fetched and written as one.

Comments keep the connection alive meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from functools import partial

import aiohttp
from aiohttp import web

from driftgate.adapters.base import EngineAdapter
from driftgate.errors import StorageError, UpstreamError
from driftgate.gateway import http, synthesis
from driftgate.gateway.breakage import breakage
from driftgate.gateway.capture import fold_answer
from driftgate.gateway.ending import Asked, Ending, Fetched, read_whole, said
from driftgate.gateway.history import turns_of_answer
from driftgate.gateway.openai import Stripped, strip_answer
from driftgate.gateway.recorder import CLIENT_LEFT
from driftgate.gateway.tasks import beside

__all__ = ["KEEP_ALIVE_S", "Written"]

KEEP_ALIVE_S = 10.0
"""Silence after which a comment is sent: below the idle limits of common proxies. Headers are held
until then, so that an engine's early error keeps its status."""


class _AgentGone(Exception):
    """The agent's connection ended while its stream was written."""

    def __init__(self, response: web.StreamResponse) -> None:
        super().__init__(CLIENT_LEFT)
        self.response = response


class Written:
    """Serves one call; ``run`` is used once."""

    def __init__(
        self, request: web.Request, asked: Asked, end: Ending, adapter: EngineAdapter
    ) -> None:
        self._request = request
        self._asked = asked
        self._end = end
        self._adapter = adapter
        self._teller = asked.dialect.teller if asked.dialect is not None else None
        if self._teller is not None:
            self._teller.whole = True

    async def run(self) -> web.StreamResponse:
        """Ask for JSON and write the stream. Errors as in ``Exchange.run``."""
        try:
            return await self._run()
        except _AgentGone as gone:
            self._end.fail("cancelled", CLIENT_LEFT)
            return gone.response

    async def _run(self) -> web.StreamResponse:
        response: web.StreamResponse | None = None
        async with beside("synthesise", self._fetch()) as fetching:
            while not (await asyncio.wait({fetching}, timeout=KEEP_ALIVE_S))[0]:
                response = response or await self._begin()
                await self._write(response, synthesis.KEEP_ALIVE)
            try:
                status, headers, raw = fetching.result()
                stripped = strip_answer(raw, self._asked.plan) if status == 200 else None
                events = self._events(raw, stripped) if stripped is not None else []
            except (aiohttp.ClientError, TimeoutError, OSError, UpstreamError) as error:
                if response is None:
                    raise
                why = str(error) if isinstance(error, UpstreamError) else breakage(error).what
                self._end.fail("cut", why)
                self._end.abort()
                return response
        if stripped is None:
            return await self._error(response, status, headers, raw)
        return await self._answer(response, raw, stripped, events)

    def _events(self, raw: bytes, stripped: Stripped) -> list[bytes]:
        """The answer's events but for the last ones."""
        if self._teller is None:
            return synthesis.stream_of(stripped.body, self._asked.plan)
        return self._told(synthesis.stream_of(raw, self._asked.plan))

    def _told(self, events: list[bytes]) -> list[bytes]:
        """Chat events in the agent's API."""
        if self._teller is None:
            return events
        return [told for event in events for told in self._teller.take(event)]

    async def _fetch(self) -> Fetched:
        async with self._asked.send() as answer:
            raw = await read_whole(answer, self._asked)
            self._asked.served.came()
            return answer.status, http.answer_headers(answer.headers), raw

    async def _answer(
        self,
        response: web.StreamResponse | None,
        raw: bytes,
        stripped: Stripped,
        events: list[bytes],
    ) -> web.StreamResponse:
        asked = self._asked
        turns = turns_of_answer(asked.history, asked.plan, raw, stripped.messages)
        if asked.onward is not None:
            asked.onward.answered(asked.call.call_id, raw, stripped.messages, stripped.pieces)
        fold = partial(
            fold_answer,
            stripped.pieces or raw,
            asked.plan,
            self._adapter,
            expect_routes=asked.expect_routes,
            via="synthesised",
        )
        last = [synthesis.DONE_EVENT]
        if self._teller is not None:
            last = self._teller.end()
            self._end.response = self._teller.body()
            if self._teller.not_whole:
                self._end.engine_failed()
        try:
            response = response or await self._begin()
            await self._write(response, b"".join(events))
            await self._end.before_end(turns, fold, len(raw))
            await self._write(response, b"".join(last))
            self._end.sent = True
            with _to_the_agent(response):
                await response.write_eof()
        except _AgentGone as gone:
            return gone.response
        except StorageError:
            self._end.abort()
        finally:  # whole as the answer is, it is kept also when the agent does not wait for it
            self._end.over(fold, len(raw), delivered=self._end.sent)
        assert response is not None
        return response

    async def _error(
        self,
        response: web.StreamResponse | None,
        status: int,
        headers: MutableMapping[str, str],
        raw: bytes,
    ) -> web.StreamResponse:
        self._end.fail("engine_error", said(raw), status)
        dialect = self._asked.dialect
        if response is None:
            if dialect is not None:
                raw = dialect.engine_error(status, raw)
                headers["Content-Type"] = "application/json"
            return web.Response(status=status, body=raw, headers=headers)
        events = self._told([synthesis.error_event(raw)])
        last = [synthesis.DONE_EVENT] if self._teller is None else self._teller.end()
        with suppress(_AgentGone):
            await self._write(response, b"".join([*events, *last]))
        return response

    async def _begin(self) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        with _to_the_agent(response):
            await response.prepare(self._request)
        return response

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        self._end.first_byte()
        with _to_the_agent(response):
            await response.write(data)


@contextmanager
def _to_the_agent(response: web.StreamResponse) -> Iterator[None]:
    """What breaks in here is not the engine."""
    try:
        yield
    except ConnectionError as error:
        raise _AgentGone(response) from error

"""One model call, from the agent's request to the recorded answer: the steps of the protocol.

Bytes are forwarded as they come; folding them into traces happens on the writer thread. An answer
is made known to attribution before its end is sent, because the agent's next call may come at once.
A stream that the engine cuts reaches the agent cut, never as a clean end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import aiohttp
from aiohttp import web

from driftgate.adapters.base import EngineAdapter
from driftgate.errors import DriftgateError, StorageError, UpstreamError
from driftgate.gateway import http, sse
from driftgate.gateway.breakage import breakage
from driftgate.gateway.capture import Folded, fold_answer, fold_stream
from driftgate.gateway.dialect import NOT_WHOLE_STATUS
from driftgate.gateway.ending import Asked, Ending, Outcome, chunks, read_whole, said
from driftgate.gateway.history import turns_of_answer, turns_of_stream
from driftgate.gateway.openai import strip_answer
from driftgate.gateway.post import EngineAnswer
from driftgate.gateway.recorder import CLIENT_LEFT, Recorder
from driftgate.gateway.sessions import Sessions
from driftgate.gateway.tape import Tape
from driftgate.gateway.written import Written

__all__ = ["Exchange"]


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
        self._request = request
        self._asked = asked
        self._recorder = recorder
        self._adapter = adapter
        self._end = Ending(request, asked, sessions=sessions, recorder=recorder)
        self._tape = Tape(asked.plan, limit_bytes=asked.max_answer_bytes)
        self._teller = asked.dialect.teller if asked.dialect is not None else None

        self._last: list[bytes] = []
        """A teller's events for the end of the answer, which wait for its record."""

    @property
    def outcome(self) -> Outcome:
        """What became of the call, for the metrics."""
        return self._end.outcome

    @property
    def first_byte_ns(self) -> int | None:
        """When the agent got the first byte of an answer; None where it got none."""
        return self._end.first_byte_ns

    @property
    def streamed(self) -> bool:
        """The answer was a stream, or an error in place of one."""
        return self._end.streamed

    async def run(self) -> web.StreamResponse:
        """Ask the engine and answer the agent.

        UpstreamError or StorageError where the agent must get an error and nothing was sent yet.
        """
        try:
            if self._asked.plan.mode == "synthesise":
                written = Written(self._request, self._asked, self._end, self._adapter)
                return await written.run()
            async with self._asked.send() as answer:
                return await self._forward(answer)
        except asyncio.CancelledError:
            self._end.fail("cancelled", self._recorder.cancel_reason)
            raise
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            broke = breakage(error)
            self._end.fail("cut" if broke.reached else "unreachable", broke.what)
            raise UpstreamError(f"{broke.what}; {broke.fix}") from error
        except DriftgateError as error:
            storage = isinstance(error, StorageError)
            self._end.fail("not_recorded" if storage else "cut", str(error))
            raise
        except Exception as error:  # a bug: the call must not stay open in the store for that
            self._end.fail("not_recorded", f"{type(error).__name__} inside the gateway")
            raise

    def unsent(self, outcome: Outcome) -> None:
        """The call ends before the engine was asked, and is recorded as far as it can be."""
        self._end.outcome = outcome

    # An answer in one piece.

    async def _forward(self, answer: EngineAnswer) -> web.StreamResponse:
        encoded = answer.headers.get("Content-Encoding", "identity") != "identity"
        if answer.status == 200 and not encoded:
            if answer.content_type == "text/event-stream":
                return await self._stream(answer)
            return await self._json(answer)
        raw = await read_whole(answer, self._asked)
        headers = http.answer_headers(answer.headers)
        if answer.status == 200:
            why = "the engine compressed its answer although identity was asked for"
            if self._teller is not None:
                raise UpstreamError(why)
            self._end.unkept(why)
        else:
            self._end.fail("engine_error", said(raw), answer.status)
            if self._asked.dialect is not None:
                raw = self._asked.dialect.engine_error(answer.status, raw)
                headers["Content-Type"] = "application/json"
        reason = http.reason_phrase(answer.reason)
        return web.Response(status=answer.status, reason=reason, body=raw, headers=headers)

    async def _json(self, answer: EngineAnswer) -> web.StreamResponse:
        asked, end = self._asked, self._end
        raw = await read_whole(answer, self._asked)
        end.streamed = False
        # On the loop at any size: the parser holds the GIL, a thread would only add its switch.
        body, messages, pieces = strip_answer(raw, asked.plan)
        turns = turns_of_answer(asked.history, asked.plan, raw, messages)
        if asked.onward is not None:
            asked.onward.answered(asked.call.call_id, raw, messages, pieces)
        if self._teller is not None:
            body = end.response = self._teller.answer(body)
        fold = partial(
            fold_answer, pieces or raw, asked.plan, self._adapter, expect_routes=asked.expect_routes
        )
        size = len(raw)
        del raw, pieces  # what the fold does not need is not kept while the agent reads
        if self._teller is not None and self._teller.not_whole:
            end.engine_failed()
            end.over(fold, size, delivered=False)
            return self._not_whole()
        response = web.Response(body=body, headers=http.answer_headers(answer.headers))
        delivered = False
        try:
            await end.before_end(turns, fold, size)
            await response.prepare(self._request)
            end.first_byte()
            await response.write_eof()
            delivered = True
        except ConnectionError:
            pass
        finally:  # whole as the answer is, it is kept also when the agent does not wait for it
            end.over(fold, size, delivered=delivered)
        return response

    def _not_whole(self) -> web.Response:
        """The error that the agent gets for an answer that the engine ended early."""
        assert self._asked.dialect is not None
        assert self._teller is not None
        return web.Response(
            status=NOT_WHOLE_STATUS,
            body=self._asked.dialect.error(NOT_WHOLE_STATUS, self._teller.error or ""),
            content_type="application/json",
            headers={"Retry-After": str(http.RETRY_AFTER_S)},
        )

    # A stream.

    async def _stream(self, answer: EngineAnswer) -> web.StreamResponse:
        response = web.StreamResponse(headers=http.answer_headers(answer.headers))
        self._end.streamed = True
        splitter = sse.Splitter()
        end: str | None = None
        try:
            await response.prepare(self._request)
            async for chunk in chunks(answer):
                self._asked.served.passing(self._tape)
                await self._pass_events(response, splitter.feed(chunk))
            if rest := splitter.rest():
                await self._pass_events(response, [rest])
            await self._before_end()
            await response.write_eof()
        except asyncio.CancelledError:
            self._end_stream(self._recorder.cancel_reason, left=True)
            raise
        except ConnectionError:  # of the agent: the engine's is an UpstreamError
            end = CLIENT_LEFT
        except (UpstreamError, StorageError) as error:
            end = str(error)
            self._end.abort()
        self._end_stream(end, left=end == CLIENT_LEFT)
        return response

    async def _pass_events(self, response: web.StreamResponse, events: list[bytes]) -> None:
        """Forward what is the agent's; the end only when the answer may end."""
        out: list[bytes] = []
        tape = self._tape
        for event in events:
            if b'"error"' in event:
                event = self._asked.hide_key(event)
            passed = tape.take(event)
            if tape.error is not None:
                self._end.engine_failed()
            if tape.done and not self._end.known:
                await self._write(response, out)
                out.clear()
                await self._before_end()
            if passed is not None:
                out += self._told(event, passed)
        await self._write(response, out)
        self._end.sent = tape.done

    def _told(self, event: bytes, passed: bytes) -> list[bytes]:
        """An event as the agent's API has it. A teller reads what the engine sent: it counts the
        prompt's ids, and shows no more than was asked for."""
        if self._teller is None:
            return [passed]
        last, self._last = self._last, []
        return last if self._tape.done else self._teller.take(event)

    async def _write(self, response: web.StreamResponse, events: list[bytes]) -> None:
        if events:
            self._end.first_byte()
            await response.write(b"".join(events))

    async def _before_end(self) -> None:
        """All of the answer is here: make it known and have it recorded. Once."""
        if self._end.known:
            return
        turns = turns_of_stream(self._asked.history, self._tape)
        if self._asked.onward is not None:
            self._asked.onward.streamed(self._asked.call.call_id, self._tape)
        if self._teller is not None:
            self._last = self._teller.end() if self._tape.done else []
            self._end.response = self._teller.body()
            if self._teller.not_whole:
                self._end.engine_failed()
        if self._tape.over:
            self._end.known = self._end.released = True
            self._end_stream(None, left=False)
        else:
            await self._end.before_end(turns, self._fold(None), self._tape.size_bytes)

    def _end_stream(self, end: str | None, *, left: bool) -> None:
        if self._teller is not None:
            self._end.response = self._teller.body()
        if left and self._end.sent:  # at [DONE], as SDKs do, and not at the end of the transfer
            end, left = None, False
        if end is not None:
            self._end.failed_try()
            self._end.outcome = "cancelled" if left else "cut"
        if self._tape.over:
            limit = self._asked.max_answer_bytes
            self._end.unkept(f"the stream is longer than max_answer_bytes ({limit}); raise it")
            return
        # After a whole answer a client that leaves has only missed the end of the transfer.
        fold = self._fold(None if self._end.known else end)
        self._end.over(fold, self._tape.size_bytes, delivered=not left)

    def _fold(self, end: str | None) -> Callable[[], Folded]:
        return partial(
            fold_stream,
            self._tape,
            self._adapter,
            expect_routes=self._asked.expect_routes,
            end=end,
        )

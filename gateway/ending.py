"""How one call ends: made known to attribution, recorded, and only then told to its agent. Once.

The ways to serve a call (JSON, a stream, a stream that the gateway writes) differ in what they send
and share this."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, MutableMapping
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import aiohttp
from aiohttp import web

from driftgate.errors import StorageError, UpstreamError
from driftgate.gateway.breakage import broken_body
from driftgate.gateway.capture import Folded
from driftgate.gateway.conversation import Turn
from driftgate.gateway.dialect import Dialect
from driftgate.gateway.history import History
from driftgate.gateway.onward import Onward
from driftgate.gateway.openai import Plan
from driftgate.gateway.post import EngineAnswer
from driftgate.gateway.prompts import End
from driftgate.gateway.recorder import Answer, Recorded, Recorder
from driftgate.gateway.served import Served
from driftgate.gateway.sessions import Call, Sessions

__all__ = ["Asked", "Ending", "Fetched", "Outcome", "chunks", "read_whole", "said"]

SAID_CHARS = 300
"""Of an engine's error, in an outcome."""

UNDELIVERED = "the answer was recorded before its end was sent, and then could not be delivered"

Ask: TypeAlias = Callable[[], AbstractAsyncContextManager[EngineAnswer]]
Outcome: TypeAlias = Literal[
    "answered", "engine_error", "unreachable", "cut", "cancelled", "not_recorded"
]
Fetched: TypeAlias = tuple[int, MutableMapping[str, str], bytes]
"""Status, headers and body of an answer in one piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One call, ready to be sent."""

    send: Ask
    """Sends the request to the engine."""
    served: Served
    """Which one that is."""
    call: Call
    plan: Plan
    body: bytes
    """The agent's."""
    dialect: Dialect | None
    """How the agent is answered, where that is not as the engine answers."""
    history: History
    onward: Onward | None
    """Where exact continuation is asked for."""
    started_ns: int
    expect_routes: bool | None
    max_answer_bytes: int
    hide_key: Callable[[bytes], bytes]
    """Takes the engine's key out of an error that repeats it."""


class Ending:
    """What becomes of one call."""

    def __init__(
        self, request: web.Request, asked: Asked, *, sessions: Sessions, recorder: Recorder
    ) -> None:
        self.outcome: Outcome = "answered"
        self.first_byte_ns: int | None = None
        self.streamed = asked.plan.stream
        self.known = False
        """All of the answer has come."""
        self.released = False
        """The end of the answer is on its way to the agent: what breaks now is no failed try."""
        self.sent = False
        """The end of the answer was written to the agent: that it leaves now says nothing."""
        self.response: bytes | None = None
        """What the agent got, in its own API, as far as it has come."""
        self._request = request
        self._asked = asked
        self._sessions = sessions
        self._recorder = recorder
        self._recorded = False
        self._promised = False
        """It was recorded as delivered and is yet to be sent."""
        self._claimed_bytes = 0

    async def before_end(
        self, turns: Iterable[Turn | End], fold: Callable[[], Folded], size_bytes: int
    ) -> None:
        """All of the answer is here and its end may be sent next: it is known, and storage has it.
        StorageError where failures refuse the call."""
        self.known = True
        self._sessions.answered(self._asked.call, turns)
        await self._asked.served.confirm()
        self._remember()
        self._claimed_bytes = await self._recorder.claim(size_bytes + len(self._asked.body))
        self._promised = True
        try:
            await self._recorder.closed(self._record(fold, size_bytes, delivered=True))
        except StorageError:
            self._promised = False
            raise
        self.released = True

    def _remember(self) -> None:
        dialect = self._asked.dialect
        if dialect is None or dialect.remember is None or self.response is None:
            return
        if not self._asked.call.failed:
            dialect.remember(self.response)

    def over(self, fold: Callable[[], Folded], size_bytes: int, *, delivered: bool) -> None:
        """The answer has been sent, or as much of it as could be."""
        if not self._recorded:
            self._record(fold, size_bytes, delivered=delivered)
        elif not delivered:
            self._take_back()
        self._promised = False

    def unkept(self, why: str) -> None:
        """The answer cannot be recorded."""
        if not self._recorded:
            self._recorded = True
            self._release()
            self._recorder.failed(self._asked.call, "capture_failed", why)

    def fail(self, outcome: Outcome, reason: str, http_status: int | None = None) -> None:
        """There is no answer to record, or it did not reach the agent."""
        if self._recorded and self.sent:
            return  # it is over: only the rest of the transfer broke
        self.outcome = outcome
        self.failed_try()
        if self._recorded:
            self._take_back()
            return
        self._recorded = True
        self._release()
        status: Literal["cancelled", "failed"] = "cancelled" if outcome == "cancelled" else "failed"
        self._recorder.failed(self._asked.call, status, reason, http_status=http_status)

    def failed_try(self) -> None:
        """The agent may ask the same again."""
        if not self.released:
            self._sessions.failed(self._asked.call)

    def engine_failed(self) -> None:
        """The engine said in its answer that it is none: the agent may ask again."""
        if self.outcome == "answered":
            self.outcome = "engine_error"
            self.failed_try()

    def first_byte(self) -> None:
        """The first byte of the answer is about to be sent, or was."""
        self.first_byte_ns = self.first_byte_ns or time.time_ns()

    def abort(self) -> None:
        """Cut the agent's connection, so that what it got cannot be taken for a whole answer."""
        if self._request.transport is not None:
            self._request.transport.abort()

    def _take_back(self) -> None:
        """Say of a promised answer that it was not delivered."""
        if self._promised:
            self._promised = False
            self._recorder.failed(self._asked.call, "cancelled", UNDELIVERED)

    def _record(
        self, fold: Callable[[], Folded], size_bytes: int, *, delivered: bool
    ) -> Recorded | None:
        self._recorded = True
        self._release()
        self._asked.served.recorded()
        response, dialect = self.response, self._asked.dialect
        if response is not None and dialect is not None:
            response = dialect.teller.stored_body(response)
        now_ns = time.time_ns()
        answer = Answer(
            fold=fold,
            size_bytes=size_bytes + len(self._asked.body) + len(response or b""),
            request=self._asked.body,
            response=response,
            started_ns=self._asked.started_ns,
            first_byte_ns=self.first_byte_ns or (now_ns if self._promised else None),
            ended_ns=now_ns,
            delivered=delivered,
            streamed=self.streamed,
            cancelled=self.outcome == "cancelled",
            served=self._asked.served,
            onward=self._asked.onward,
        )
        return self._recorder.close(self._asked.call, self._asked.plan, answer)

    def _release(self) -> None:
        self._recorder.release(self._claimed_bytes)
        self._claimed_bytes = 0


async def chunks(answer: EngineAnswer) -> AsyncIterator[bytes]:
    """The body as it comes. UpstreamError where the engine breaks it off."""
    try:
        with _ends_with_its_connection(answer):
            async for chunk in answer.content.iter_any():
                yield chunk
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise UpstreamError(f"the engine broke off its answer: {broken_body(error)}") from error


@contextmanager
def _ends_with_its_connection(answer: EngineAnswer) -> Iterator[None]:
    """aiohttp 3.14 closes the connection at a chunk that is none and leaves the body's reader
    waiting for ever."""
    body = answer.content

    def gone(closed: asyncio.Future[None] | None) -> None:
        if closed is not None and not closed.cancelled():
            closed.exception()  # of the connection; the body's is what matters
        if not body.is_eof() and body.exception() is None:
            why = "its connection ended in the middle of the body, or carried what is no HTTP"
            body.set_exception(aiohttp.ClientPayloadError(why))

    if body.is_eof():
        yield  # it is here as a whole
    elif (closed := answer.closed) is None:
        gone(None)  # it has ended already
        yield
    else:
        closed.add_done_callback(gone)
        try:
            yield
        finally:
            closed.remove_done_callback(gone)  # the connection lives on, and would keep the body


async def read_whole(answer: EngineAnswer, asked: Asked) -> bytes:
    """The whole body; an error without the engine's key. UpstreamError where it is cut or too
    long."""
    parts, size = [], 0
    limit_bytes = asked.max_answer_bytes
    async for chunk in chunks(answer):
        parts.append(chunk)
        size += len(chunk)
        if size > limit_bytes:
            raise UpstreamError(
                f"the engine's answer is longer than max_answer_bytes ({limit_bytes}); raise it"
            )
    whole = b"".join(parts)
    return whole if answer.status == 200 else asked.hide_key(whole)


def said(raw: bytes) -> str:
    """What an engine's error answer says, for an outcome."""
    return f"the engine answered: {raw[:SAID_CHARS].decode(errors='replace')}"

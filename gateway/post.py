"""Posts a call to its engine over kept connections, with aiohttp's connector and parser and without
the rest of its client.

For each request aiohttp's client builds a URL, a request, a session's middlewares, timers and a
response; with it a call's way to the engine takes twice the time that it takes here. A model call
needs none of it: one method, no redirects, no cookies, no limit on how long a generation takes.
Connecting (addresses, TLS, its errors) and reading (framing, its errors) stay aiohttp's. Never
sends a request twice."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict, deque
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import HttpProcessingError, RawResponseMessage, StreamWriter
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from driftgate.gateway.tasks import beside

__all__ = ["KEEP_ALIVE_S", "EngineAnswer", "Poster"]

KEEP_ALIVE_S = 3.0
"""uvicorn, which serves vLLM, closes idle connections after 5 s; a request sent into that is
lost."""

READ_BUFFER_BYTES = 1 << 18
"""Routes come in megabytes; with aiohttp's 64 kB the socket is paused and resumed for each."""

LARGE_BYTES = 1 << 20
"""A longer body is written piece by piece, as the engine takes it."""

PIECE_BYTES = 1 << 16

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_NO_HEADERS = CIMultiDict[str]()


class EngineAnswer:
    """An engine's answer, its body yet to come. Leaving the ``async with`` block gives the
    connection back, or closes it where the body has not come to its end."""

    def __init__(
        self,
        line: _Line,
        message: RawResponseMessage,
        content: aiohttp.StreamReader,
    ) -> None:
        self.status = message.code
        self.reason = message.reason
        self.headers = message.headers
        self.content = content
        self._line: _Line | None = line

    @property
    def content_type(self) -> str:
        """Without its parameters."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    @property
    def closed(self) -> asyncio.Future[None] | None:
        """Resolves when the connection ends; None where it has ended."""
        return None if self._line is None else self._line.protocol.closed

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        line, self._line = self._line, None
        if line is not None:
            line.give_back()


class _Line:
    """One connection, in use by one call at a time."""

    def __init__(
        self,
        connection: aiohttp.connector.Connection,
        idle: deque[_Line],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        assert connection.protocol is not None, "it is new"
        self.protocol: ResponseHandler = connection.protocol
        self._connection = connection
        self._idle = idle
        self._loop = loop
        self._since = 0.0
        """When it was given back."""
        if (closed := self.protocol.closed) is not None:
            closed.add_done_callback(_seen)

    @property
    def usable(self) -> bool:
        """A request may be sent over it."""
        kept = self._loop.time() - self._since <= KEEP_ALIVE_S
        return kept and self.protocol.is_connected() and not self.protocol.should_close

    def give_back(self) -> None:
        """For the next call, where the answer is over; else close it."""
        self._since = self._loop.time()
        if self.usable:
            self._idle.append(self)
        else:
            self.close()

    def close(self) -> None:
        """End it; idempotent."""
        self._connection.close()


class Poster:
    """All connections for calls. Lives on the event loop."""

    def __init__(self, connector: aiohttp.BaseConnector, timeout: aiohttp.ClientTimeout) -> None:
        """``connector`` makes the connections, within ``timeout``; who gives it closes it."""
        self._connector = connector
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._idle: defaultdict[URL, deque[_Line]] = defaultdict(deque)
        self._bases: dict[str, URL] = {}

    def close(self) -> None:
        """Close every connection that no call uses."""
        for idle in self._idle.values():
            while idle:
                idle.pop().close()

    async def post(
        self, base: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> EngineAnswer:
        """The engine's answer to ``body`` at ``base`` + ``target``, which is spelled as it is sent.

        aiohttp.ClientError, TimeoutError or OSError where there is none.
        """
        url = self._bases.get(base)
        if url is None:
            url = self._bases[base] = URL(base, encoded=True)
        head = _head(url, target, headers, len(body))
        line = self._kept(url) or await self._connect(url)
        try:
            protocol = line.protocol
            protocol.set_response_params(
                read_until_eof=True, auto_decompress=False, read_bufsize=READ_BUFFER_BYTES
            )
            transport = protocol.transport
            if transport is None:
                raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")
            if len(body) <= LARGE_BYTES:
                transport.write(head + body)
                message, content = await _first(protocol)
            else:
                async with beside("post", _write(protocol, self._loop, head, body)) as writing:
                    message, content = await _first(protocol)
                    if not writing.done():
                        protocol.force_close()  # the rest of the body is not sent
        except HttpProcessingError as error:
            line.close()
            info = aiohttp.RequestInfo(url, "POST", CIMultiDictProxy(_NO_HEADERS), url)
            raise aiohttp.ClientResponseError(
                info, (), status=error.code, message=error.message, headers=error.headers
            ) from error
        except BaseException:
            line.close()
            raise
        return EngineAnswer(line, message, content)

    def _kept(self, url: URL) -> _Line | None:
        """The connection that was used last; those that have been idle for too long are closed."""
        idle = self._idle[url]
        while idle and not idle[0].usable:
            idle.popleft().close()
        while idle:
            line = idle.pop()
            if line.usable:
                return line
            line.close()
        return None

    async def _connect(self, url: URL) -> _Line:
        request = aiohttp.ClientRequest("POST", url, loop=self._loop)
        connection = await self._connector.connect(request, traces=[], timeout=self._timeout)
        return _Line(connection, self._idle[url], self._loop)


def _seen(closed: asyncio.Future[None]) -> None:
    """An idle connection that the engine resets is nobody's error, and none for the log."""
    if not closed.cancelled():
        closed.exception()


async def _first(protocol: ResponseHandler) -> tuple[RawResponseMessage, aiohttp.StreamReader]:
    """The head of the answer, and its body; what comes before it (100, 103) is passed over."""
    while True:
        message, content = await protocol.read()
        if not 100 <= message.code <= 199 or message.code == 101:
            return message, content


async def _write(
    protocol: ResponseHandler, loop: asyncio.AbstractEventLoop, head: bytes, body: bytes
) -> None:
    """Write beside the reading: an engine may refuse a body before it has taken all of it."""
    writer, view = StreamWriter(protocol, loop), memoryview(body)
    try:
        await writer.write(head)
        for at in range(0, len(body), PIECE_BYTES):
            await writer.write(view[at : at + PIECE_BYTES])
    except ConnectionError:
        pass  # the reader is told of it as well


def _head(url: URL, target: str, headers: Mapping[str, str], length: int) -> bytes:
    lines = [
        f"POST {url.raw_path.rstrip('/')}{target} HTTP/1.1",
        f"Host: {url.host_port_subcomponent}",
        *(f"{name}: {value}" for name, value in headers.items()),
        f"Content-Length: {length}",
    ]
    if any(map(_CONTROL.search, lines)):
        raise ValueError("a header holds a control character")
    return "\r\n".join([*lines, "", ""]).encode(errors="surrogateescape")

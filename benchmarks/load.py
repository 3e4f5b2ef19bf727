"""A closed loop of keep-alive connections that costs little: raw protocols under uvloop.

Each connection plays episodes: it sends a step, waits for the whole answer, sends the next step,
and starts a new trajectory after the last. Only the framing of answers is read. An answer that is
not 200, or a connection that ends, stops the run with what was seen: nothing is skipped.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import urlsplit

import uvloop

from benchmarks.payloads import CREATED, FIRST_NONCE, Canned, Episode, since_us

__all__ = ["Agents", "Delays", "Rate", "call", "delays_us", "drive", "paced"]

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CREATED_FIELD = re.compile(rb'"created":(\d{10})')
STAMP_BYTES = len('"created":1234567890')
LAST_CHUNK = b"\r\n0\r\n\r\n"
SPREAD_S = 5.0
"""Streams do not start, and so do not end, all at once."""
STALL_TIMEOUT_S = 90.0
"""For the last answers of a run: 256 answers of 4.4 MB through a slow proxy need half a minute."""


@dataclass(frozen=True, slots=True)
class Rate:
    """What a closed loop achieved."""

    in_window: int
    """Answers that were whole within the window."""
    window_s: float
    answered: int
    """All answers, those before and after the window too."""
    started: float
    """``time.monotonic()`` when the first request was sent."""

    @property
    def per_second(self) -> float:
        """Answers a second within the window."""
        return self.in_window / self.window_s


class Delays(Protocol):
    """Takes how late each event is, in us."""

    def append(self, late_us: int, /) -> None:
        """One event."""


class Agents:
    """Request bodies of endless trajectories, each numbered once in this process."""

    def __init__(self, episode: Episode, *, stream: bool, host: str = "127.0.0.1") -> None:
        self._steps = []
        for step in range(episode.shape.steps):
            body = episode.request(step, stream=stream)
            head = (
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: %b\r\naccept: application/json\r\n"
                b"content-type: application/json\r\nauthorization: Bearer none\r\n"
                b"user-agent: OpenAI/Python 2.0.0\r\nx-stainless-retry-count: 0\r\n"
                b"content-length: %d\r\n\r\n"
            ) % (host.encode(), len(body))
            self._steps.append(Canned(head + body.template))
        self._numbers = itertools.count(FIRST_NONCE + 1)

    def one(self) -> Iterator[list[bytes]]:
        """The requests of one agent after another, without end."""
        while True:
            nonce = b"%d" % next(self._numbers)
            for step in self._steps:
                yield step.fill(nonce)


@dataclass(slots=True)
class _Run:
    """State that all connections of a run share."""

    finished: asyncio.Future[None]
    open: int
    stopping: bool = False
    answered: int = 0
    calls_left: int | None = None
    """Stop after so many requests were sent; None: when told."""
    delays_us: Delays | None = None
    """Collects how late every event is, if not None."""
    pace_us: int = 0
    """Of a stream's events (``benchmarks.standin``)."""

    def fail(self, error: Exception) -> None:
        """End the run with ``error``."""
        if not self.finished.done():
            self.finished.set_exception(error)

    def may_send(self) -> bool:
        """Whether one more request may go out; counts it."""
        if self.stopping or self.calls_left == 0:
            return False
        if self.calls_left is not None:
            self.calls_left -= 1
        return True

    def leave(self) -> None:
        """A connection has nothing more to do."""
        self.open -= 1
        if self.open == 0 and not self.finished.done():
            self.finished.set_result(None)


class _Client(asyncio.Protocol):
    """One agent on one connection."""

    transport: asyncio.Transport

    def __init__(self, run: _Run, requests: Iterator[list[bytes]], delay_s: float) -> None:
        self._run = run
        self._requests = requests
        self._delay_s = delay_s
        self._head = b""
        self._left = 0
        """Bytes of the body still to come; -1: until the last chunk; 0: no answer is due."""
        self._tail = b""
        self._unread = b""
        self._events = 0
        """Of the answer that comes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        asyncio.get_running_loop().call_later(self._delay_s, self._send)

    def connection_lost(self, exc: Exception | None) -> None:
        self._run.fail(ConnectionError(f"the server closed a connection ({exc})"))

    def data_received(self, data: bytes) -> None:
        if self._run.delays_us is not None:
            self._look(data, self._run.delays_us)
        if self._left == 0:
            data = self._read_head(data)
            if self._left == 0:
                return
        if self._left > 0:
            self._left -= len(data)
            if self._left == 0:
                self._done()
        else:
            self._tail = (self._tail + data[-len(LAST_CHUNK) :])[-len(LAST_CHUNK) :]
            if self._tail == LAST_CHUNK:
                self._done()

    def _look(self, data: bytes, delays_us: Delays) -> None:
        """Every event has one stamp; one that is split over two reads is whole with the second."""
        data, end = self._unread + data, 0
        for found in CREATED_FIELD.finditer(data):
            end, stamped = found.end(), int(found.group(1))
            if stamped != CREATED:
                late_us = since_us(stamped) - self._events * self._run.pace_us
                delays_us.append(max(0, late_us))  # the stand-in's loop counts milliseconds
                self._events += 1
        self._unread = data[max(end, len(data) - STAMP_BYTES) :]

    def _read_head(self, data: bytes) -> bytes:
        """Take the head of an answer off; returns what follows it."""
        self._head += data
        head, found, body = self._head.partition(b"\r\n\r\n")
        if not found:
            return b""
        self._head = b""
        status = head.split(b" ", 2)[1]
        if status != b"200":
            self._run.fail(ConnectionError(f"answered {(head + body)[:600]!r}"))
        length = LENGTH.search(head)
        self._left = int(length.group(1)) if length else -1
        return body

    def _send(self) -> None:
        if not self._run.may_send():
            self._run.leave()
            return
        self._tail = self._unread = b""
        self._events = 0
        self.transport.writelines(next(self._requests))

    def _done(self) -> None:
        run = self._run
        run.answered += 1
        self._left = 0
        self._send()


class _Loop:
    """The connections of one run, opened and closed."""

    def __init__(self, url: str | Sequence[str], agents: Agents, connections: int) -> None:
        """Several addresses get their share of the connections each."""
        self._addresses = [urlsplit(one) for one in ([url] if isinstance(url, str) else url)]
        self._agents = agents
        self._count = connections
        self._clients: list[_Client] = []
        self.run = _Run(asyncio.get_running_loop().create_future(), connections)

    async def open(self, spread_s: float = 0.0) -> None:
        """Connect all; agent ``i`` sends its first request ``i / n`` of ``spread_s`` later."""
        loop = asyncio.get_running_loop()
        for number in range(self._count):
            client = _Client(self.run, self._agents.one(), spread_s * number / self._count)
            self._clients.append(client)
            address = self._addresses[number % len(self._addresses)]
            await loop.create_connection(
                lambda made=client: made,  # type: ignore[misc]
                address.hostname or "",
                address.port or 80,
            )

    async def go_on(self, seconds: float) -> None:
        """Let it run; raises at once what a connection raised."""
        await asyncio.wait([self.run.finished], timeout=seconds)
        if self.run.finished.done():
            self.run.finished.result()

    async def finish(self) -> None:
        """Send nothing more and wait for the answers that are due."""
        self.run.stopping = True
        async with asyncio.timeout(STALL_TIMEOUT_S):
            await self.run.finished
        for client in self._clients:
            client.transport.close()


def drive(
    agents: Agents, url: str | Sequence[str], connections: int, *, warm_s: float, window_s: float
) -> Rate:
    """Requests as fast as they are answered, for a fixed time. Raises ``ConnectionError``."""

    async def play() -> Rate:
        loop, started = _Loop(url, agents, connections), time.monotonic()
        await loop.open()
        await loop.go_on(warm_s)
        before, opened = loop.run.answered, time.perf_counter()
        await loop.go_on(window_s)
        after, elapsed_s = loop.run.answered, time.perf_counter() - opened
        await loop.finish()
        return Rate(after - before, elapsed_s, loop.run.answered, started)

    return uvloop.run(play())


def call(agents: Agents, url: str, connections: int, *, calls: int) -> None:
    """Exactly ``calls`` answered requests. Raises ``ConnectionError``."""

    async def play() -> None:
        loop = _Loop(url, agents, connections)
        loop.run.calls_left = calls
        await loop.open()
        await loop.run.finished
        await loop.finish()
        assert loop.run.answered == calls

    uvloop.run(play())


def paced(
    agents: Agents,
    urls: Sequence[str],
    streams: int,
    *,
    pace_ms: float,
    seconds: float,
    seen: Delays,
    spread_s: float = SPREAD_S,
) -> int:
    """``streams`` parallel paced streams, one answer after the other; how many answers. ``seen``
    gets how late events are, in us."""

    async def play() -> int:
        loop = _Loop(urls, agents, streams)
        loop.run.delays_us, loop.run.pace_us = seen, round(pace_ms * 1000)
        await loop.open(spread_s)
        await loop.go_on(seconds)
        await loop.finish()
        return loop.run.answered

    return uvloop.run(play())


def delays_us(
    agents: Agents, url: str, streams: int, *, pace_ms: float, spread_s: float
) -> list[int]:
    """How late every event of ``streams`` parallel paced streams is, in us; one answer each."""

    async def play() -> list[int]:
        loop = _Loop(url, agents, streams)
        loop.run.calls_left = streams
        delays: list[int] = []
        loop.run.delays_us, loop.run.pace_us = delays, round(pace_ms * 1000)
        await loop.open(spread_s)
        await loop.run.finished
        await loop.finish()
        return delays

    return uvloop.run(play())

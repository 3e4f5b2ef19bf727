"""An engine stand-in that costs next to nothing: canned answers written straight into the socket.

    python -m benchmarks.standin --port N --shape typical [--pace-ms 20]

It picks the answer by two fields of the body (the step and the trajectory's number) and parses
nothing else. With ``--pace-ms`` a stream's events are sent one by one. ``created`` is the same in
all of them, as vLLM's is, and a stamp of the time at which the first was due: event k is due k
paces later, so that a reader on this machine can tell every delay.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import msgspec
import uvloop

from benchmarks.payloads import (
    CREATED,
    FIRST_NONCE,
    MODEL,
    SEED_FIELD,
    SHAPES,
    STEP_BASE,
    STEP_FIELD,
    Canned,
    Episode,
    stamp,
)

TICK_S = 0.001
"""What the loop's own timers count in."""

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CREATED_FIELD = b'"created":%d' % CREATED

JSON_HEAD = (
    b"HTTP/1.1 %b\r\nserver: uvicorn\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n"
)
SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
LAST_CHUNK = b"0\r\n\r\n"

FILES: dict[bytes, bytes] = {
    b"/health": b"",
    b"/version": b'{"version":"0.29.0"}',
    b"/v1/models": msgspec.json.encode(
        {
            "object": "list",
            "data": [
                {
                    "id": MODEL,
                    "object": "model",
                    "created": CREATED,
                    "owned_by": "vllm",
                    "root": "/models/bench",
                    "parent": None,
                    "max_model_len": 40_960,
                    "permission": [],
                }
            ],
        }
    ),
}


class Answers:
    """Every answer of an episode, ready to send."""

    def __init__(self, episode: Episode) -> None:
        self.json, self.sse = [], []
        self.ends: list[list[int]] = []
        """Of each event of a stream, head included: slots have fixed widths."""
        for step in range(episode.shape.steps):
            answer = episode.answer(step)
            self.json.append(Canned(JSON_HEAD % (b"200 OK", len(answer)) + answer.template))
            events = [_chunk(event.template) for event in episode.events(step)]
            self.sse.append(Canned(SSE_HEAD + b"".join(events) + LAST_CHUNK))
            self.ends.append(
                list(itertools.accumulate(map(len, events), initial=len(SSE_HEAD)))[1:]
            )
        self._calls = itertools.count(1 << 60)

    def call_id(self) -> bytes:
        """16 hex digits that no other answer of this process has."""
        return b"%016x" % next(self._calls)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass(slots=True)
class Stream:
    """A paced answer under way."""

    transport: asyncio.Transport
    body: memoryview
    ends: Iterator[int]
    due: float
    """When the next event is to be sent."""
    sent: int = 0

    def send(self) -> bool:
        """The next event; False after the last one, or where nobody reads."""
        end = next(self.ends, len(self.body))
        self.transport.write(self.body[self.sent : end])
        self.sent = end
        return end < len(self.body) and not self.transport.is_closing()


class Pacer:
    """Sends the events of all streams that are due, with one timer for a thousand streams."""

    def __init__(self, pace_s: float) -> None:
        self._pace_s = pace_s
        self._loop = asyncio.get_running_loop()
        self._due: dict[int, list[Stream]] = {}
        """By tick."""
        self._next = 0
        """Tick that is looked at next; 0: none, nothing is under way."""

    def start(self, transport: asyncio.Transport, body: bytes, ends: Iterator[int]) -> None:
        """The first event at once, each of the others a pace after the one before."""
        now = self._loop.time()
        stream = Stream(transport, memoryview(body), ends, now)
        if stream.send():
            self._put(stream)
        if self._due and not self._next:
            self._next = int(now / TICK_S) + 1
            self._loop.call_at(self._next * TICK_S, self._tick)

    def _put(self, stream: Stream) -> None:
        stream.due += self._pace_s
        self._due.setdefault(int(stream.due / TICK_S) + 1, []).append(stream)

    def _tick(self) -> None:
        now = self._loop.time()
        while self._next * TICK_S <= now:
            for stream in self._due.pop(self._next, ()):
                if stream.send():
                    self._put(stream)
            self._next += 1
        if self._due:
            self._loop.call_at(self._next * TICK_S, self._tick)
        else:
            self._next = 0


class Engine(asyncio.Protocol):
    """One keep-alive connection; requests are answered in order, one at a time."""

    transport: asyncio.Transport

    def __init__(self, answers: Answers, pacer: Pacer | None) -> None:
        self._answers = answers
        self._pacer = pacer
        self._buffer = bytearray()
        self._wanted = 0
        """Bytes of the request that is arriving, head included; 0: the head is not whole yet."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._wanted:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            length = LENGTH.search(self._buffer, 0, end + 2)
            self._wanted = end + 4 + (int(length.group(1)) if length else 0)
        if len(self._buffer) >= self._wanted:
            request = bytes(self._buffer[: self._wanted])
            del self._buffer[: self._wanted]
            self._wanted = 0
            self._answer(request)

    def _answer(self, request: bytes) -> None:
        if request.startswith(b"GET"):
            body = FILES.get(request.split(b" ", 2)[1])
            status = b"404 Not Found" if body is None else b"200 OK"
            body = body or b""
            self.transport.write(JSON_HEAD % (status, len(body)) + body)
            return
        answers = self._answers
        nonce = _field(request, SEED_FIELD, 8) or b"%d" % FIRST_NONCE
        step = int(_field(request, STEP_FIELD, 4) or STEP_BASE) % STEP_BASE % len(answers.json)
        call = answers.call_id()
        if _value(request, b'"stream":', 4) != b"true":
            self.transport.writelines(answers.json[step].fill(nonce, call))
        elif self._pacer is None:
            self.transport.write(b"".join(answers.sse[step].fill(nonce, call)))
        else:
            body = b"".join(answers.sse[step].fill(nonce, call))
            body = body.replace(CREATED_FIELD, b'"created":%d' % stamp())
            self._pacer.start(self.transport, body, iter(answers.ends[step]))


def _value(request: bytes, name: bytes, length: int) -> bytes | None:
    """``length`` bytes of the last field ``name``; None where there is none."""
    at = request.rfind(name)
    return None if at < 0 else request[at + len(name) :][: length + 1].strip()[:length]


def _field(request: bytes, name: bytes, digits: int) -> bytes | None:
    value = _value(request, name, digits)
    return value if value is not None and value.isdigit() else None


async def serve(port: int, answers: Answers, pace_s: float | None) -> None:
    """Answer until the process is ended. ``pace_s``: between the events of a stream; None: all at
    once."""
    loop, pacer = asyncio.get_running_loop(), None if pace_s is None else Pacer(pace_s)
    server = await loop.create_server(
        lambda: Engine(answers, pacer), "127.0.0.1", port, backlog=1024
    )
    await server.serve_forever()


def main() -> None:
    """Entry point of the child process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--pace-ms", type=float)
    options = parser.parse_args()
    pace_s = None if options.pace_ms is None else options.pace_ms / 1000
    answers = Answers(Episode(SHAPES[options.shape]))
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(options.port, answers, pace_s))


if __name__ == "__main__":
    main()

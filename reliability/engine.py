"""The engine's place: an HTTP server that sends exactly the bytes of a script, and may then break.

A call names its script in the first word of its first message and itself in the second. A script is
a function from an answer to its parts: bytes to send, seconds to wait, or an end.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from reliability.answers import MODEL, Said, Spell, plain_text, say

__all__ = ["SSE_HEAD", "End", "Engine", "Script", "chunked", "json_head", "serve_engine", "well"]

PROBE = "probe"
TICK_S = 0.01
"""Between two looks at whether the client is still there."""


class End(enum.Enum):
    """How a script breaks off."""

    RESET = "reset"
    CLOSE = "close"
    HANG = "hang"


Script: TypeAlias = Callable[[Said, bool], Iterator[bytes | float | End]]
"""Gets the answer and whether a stream was asked for."""

SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def json_head(length: int, more: bytes = b"") -> bytes:
    """The head of a JSON answer."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n"
    return head % (more, length)


def chunked(*parts: bytes, end: bool = True) -> bytes:
    """One HTTP chunk for each part."""
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in parts) + (b"0\r\n\r\n" if end else b"")


def well(said: Said, stream: bool) -> Iterator[bytes | float | End]:
    """Nothing breaks."""
    if stream:
        yield SSE_HEAD + chunked(*said.events())
    else:
        body = said.chat()
        yield json_head(len(body)) + body


@dataclass(slots=True)
class Engine:
    """What came, what was sent, who left. Belongs to the event loop."""

    scripts: Mapping[str, Script]
    spell: Spell = plain_text
    url: str = ""
    came: list[str] = field(default_factory=list)
    """Names of calls, in order of arrival; one that came twice stands here twice."""
    whole: set[str] = field(default_factory=set)
    """Calls whose script came to its end without breaking off."""
    left: dict[str, float] = field(default_factory=dict)
    """``time.monotonic()`` at which a client went away while its script ran."""
    open: int = 0
    """Connections now."""

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One keep-alive connection."""
        self.open += 1
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; False where the connection has ended."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        body = await reader.readexactly(int(length or 0))
        if head.startswith(b"GET"):
            writer.write(_file(head.split(b" ", 2)[1]))
            return True
        asked = json.loads(body)
        if "messages" not in asked:  # the gateway's look at its numbers: this engine has none
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return True
        script, _, name = str(asked["messages"][0]["content"]).partition(" ")
        if script not in self.scripts:
            script, name = "well", PROBE
        self.came.append(name)
        said = say(name, asked=bool(asked.get("return_token_ids")), spell=self.spell)
        return await self._play(script, said, bool(asked.get("stream")), reader, writer)

    async def _play(
        self,
        script: str,
        said: Said,
        stream: bool,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        for part in self.scripts[script](said, stream):
            if isinstance(part, bytes):
                writer.write(part)
                try:
                    await writer.drain()
                except ConnectionError:
                    self.left.setdefault(said.name, time.monotonic())
                    raise
            elif not await self._wait(part, said.name, reader):
                return False
            elif part is End.RESET:
                sock: socket.socket = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
                return False
            elif part is End.CLOSE:
                return False
        self.whole.add(said.name)
        return True

    async def _wait(self, part: float | End, name: str, reader: asyncio.StreamReader) -> bool:
        """Wait as long as ``part`` says; False where the client went away meanwhile."""
        seconds = {End.HANG: float("inf")}.get(part, 0.0) if isinstance(part, End) else part
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            if reader.at_eof() or reader.exception() is not None:
                self.left.setdefault(name, now)
                return False
            await asyncio.sleep(min(TICK_S, until - now))
        return True


def _file(path: bytes) -> bytes:
    models = {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 40960}]}
    found = {b"/version": {"version": "0.29.0"}, b"/v1/models": models}.get(path, {})
    body = json.dumps(found).encode()
    return json_head(len(body)) + body


@contextlib.asynccontextmanager
async def serve_engine(
    scripts: Mapping[str, Script], spell: Spell = plain_text
) -> AsyncIterator[Engine]:
    """Listen on loopback for the length of the block."""
    engine = Engine({"well": well, **scripts}, spell)
    server = await asyncio.start_server(engine.connected, "127.0.0.1", 0, backlog=1024)
    engine.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield engine
    finally:
        server.close()

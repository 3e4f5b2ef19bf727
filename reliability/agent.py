"""An agent made of a socket and h11: it sees every byte, and how a connection ends."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote, urlsplit

import h11

__all__ = ["Seen", "ask", "get", "path_of"]

Ended = Literal["whole", "cut", "silent", "refused"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What an agent saw of one call."""

    status: int | None
    """None: no head came."""
    body: bytes
    ended: Ended
    ended_at: float
    """``time.monotonic()``"""
    headers: dict[str, str]

    @property
    def words(self) -> str:
        """For a table."""
        if self.status is None:
            return {"refused": "refused", "silent": "silence"}.get(self.ended, "reset")
        return f"{self.status}" + ("" if self.ended == "whole" else f", {self.ended}")

    @property
    def answered(self) -> bool:
        """The end of an answer came."""
        return self.status == 200 and self.ended == "whole"


def path_of(trajectory: str | None = None) -> str:
    """Of a chat call, in a trajectory."""
    prefix = "" if trajectory is None else f"/t/{quote(trajectory, safe='')}"
    return f"{prefix}/v1/chat/completions"


async def ask(
    url: str,
    body: bytes,
    *,
    path: str = "/v1/chat/completions",
    headers: dict[str, str] | None = None,
    patience_s: float = 30.0,
    leave_after: int | None = None,
) -> Seen:
    """One call on a connection of its own. ``leave_after``: go away after so many bytes."""
    sent = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    return await _exchange(url, "POST", path, sent, body, patience_s, leave_after)


async def get(url: str, path: str, *, patience_s: float = 30.0) -> Seen:
    """One GET."""
    return await _exchange(url, "GET", path, {}, b"", patience_s, None)


async def _exchange(
    url: str,
    method: str,
    path: str,
    headers: dict[str, str],
    body: bytes,
    patience_s: float,
    leave_after: int | None,
) -> Seen:
    address = urlsplit(url)
    connection = h11.Connection(h11.CLIENT)
    line = [("host", address.netloc), *headers.items()]
    request = h11.Request(method=method, target=path, headers=line)
    data = connection.send(request) or b""
    data += (connection.send(h11.Data(data=body)) or b"") if body else b""
    data += connection.send(h11.EndOfMessage()) or b""
    reading = _Reading(connection, leave_after)
    ended: Ended = "cut"
    try:
        async with asyncio.timeout(patience_s):
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            try:
                writer.write(data)
                ended = await reading.run(reader)
            finally:
                writer.transport.abort()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except TimeoutError:
        ended = "silent"
    except ConnectionRefusedError:
        ended = "refused"
    except (OSError, h11.RemoteProtocolError):
        ended = "cut"
    return Seen(reading.status, reading.body, ended, time.monotonic(), reading.headers)


class _Reading:
    """The answer so far."""

    def __init__(self, connection: h11.Connection, leave_after: int | None) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self._parts: list[bytes] = []
        self._connection = connection
        self._leave_after = leave_after

    @property
    def body(self) -> bytes:
        return b"".join(self._parts)

    async def run(self, reader: asyncio.StreamReader) -> Ended:
        while True:
            event = self._connection.next_event()
            if event is h11.NEED_DATA:
                self._connection.receive_data(await reader.read(1 << 16))
            elif isinstance(event, h11.Response):
                self.status = event.status_code
                self.headers = {k.decode(): v.decode() for k, v in event.headers}
            elif isinstance(event, h11.Data):
                self._parts.append(bytes(event.data))
                if self._leave_after is not None and len(self.body) >= self._leave_after:
                    return "cut"
            elif isinstance(event, h11.EndOfMessage):
                return "whole"
            else:
                return "cut"

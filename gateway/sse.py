"""Splits a stream of server-sent events into its events, byte for byte. Pure.

An event keeps its own bytes, terminator included, so what is not changed is forwarded as it came.
The result does not depend on how the bytes were cut into chunks, also inside a character or a line
end."""

from __future__ import annotations

import re

from driftgate.errors import UpstreamError

__all__ = ["DONE", "MAX_EVENT_BYTES", "Splitter", "event_data", "replace_data"]

MAX_EVENT_BYTES = 256 << 20
"""The routes chunk of 128k tokens, 94 layers, top-8 is 130 MB in base64; nothing else comes
near."""

DONE = b"[DONE]"
"""Data of the event that ends an OpenAI stream."""

_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
"""An empty line ends an event. Atomic groups: ``\\r\\n`` is one line end, never two."""

_TAIL = 3
"""Bytes of an unfinished terminator that a chunk can end in."""

_LINE = re.compile(rb"\r\n|\n|\r")


class Splitter:
    """Feed it chunks, get whole events. One per stream."""

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._buffer = bytearray()
        """The start of an unfinished event."""
        self._has_returns = False
        """A carriage return came: then a search for one kind of line end is not enough."""
        self._max_event_bytes = max_event_bytes

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that ``chunk`` completes, in order. UpstreamError for an event over the
        limit."""
        if len(chunk) > 2 and chunk.find(b"\n\n") == len(chunk) - 2 and self._is_between(chunk):
            return [chunk]  # one event, as engines send them
        self._has_returns = self._has_returns or b"\r" in chunk
        find = self._any_end if self._has_returns else _usual_end
        events: list[bytes] = []
        if self._buffer:
            searched = len(self._buffer)
            self._buffer += chunk
            end = find(self._buffer, max(0, searched - _TAIL))
            if end < 0:
                self._check()
                return events
            with memoryview(self._buffer) as whole:
                events.append(bytes(whole[:end]))
                chunk = bytes(whole[end:])
        start = 0
        while (end := find(chunk, start)) >= 0:
            events.append(chunk[start:end])
            start = end
        self._buffer = bytearray(chunk[start:])
        self._check()
        return events

    def rest(self) -> bytes:
        """What came after the last whole event; empty at a clean end."""
        return bytes(self._buffer)

    def _is_between(self, chunk: bytes) -> bool:
        """Nothing is unfinished, and all line ends are line feeds."""
        return not (self._buffer or self._has_returns or b"\r" in chunk)

    def _check(self) -> None:
        if len(self._buffer) > self._max_event_bytes:
            raise UpstreamError(
                f"the engine's stream holds an event of more than {self._max_event_bytes} bytes"
            )

    @staticmethod
    def _any_end(data: bytes | bytearray, start: int) -> int:
        found = _END.search(data, start)
        if found is None or (found.end() == len(data) and data[-1] == 0x0D):
            return -1  # a line feed that belongs to a last carriage return may still come
        return found.end()


def _usual_end(data: bytes | bytearray, start: int) -> int:
    """Where the next event ends, if all line ends are line feeds; -1 where it is not here yet."""
    at = data.find(b"\n\n", start)
    return at + 2 if at >= 0 else -1


def event_data(event: bytes) -> bytes | None:
    """The event's data, its lines joined by ``\\n``; None for a comment or an event without
    data."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2:
        return event[6:-2]  # the usual form: one line, \n\n
    lines = [_value(line) for line in _LINE.split(event) if line.split(b":", 1)[0] == b"data"]
    return b"\n".join(lines) if lines else None


def replace_data(event: bytes, data: bytes) -> bytes:
    """``event`` with other data on one line; its other fields and comments stay, and so does a
    missing end."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2:
        return b"".join([b"data: ", data, b"\n\n"])
    others = [line for line in _LINE.split(event) if line and line.split(b":", 1)[0] != b"data"]
    ends = _LINE.findall(event, len(event.rstrip(b"\r\n")))
    return b"\n".join([*others, b"data: " + data]) + b"\n" * len(ends)


def _value(line: bytes) -> bytes:
    return line.partition(b":")[2].removeprefix(b" ")

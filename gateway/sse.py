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
        self._searched = 0
        self._max_event_bytes = max_event_bytes

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that ``chunk`` completes, in order. UpstreamError for an event over the
        limit."""
        buffer = self._buffer
        buffer += chunk
        events = []
        start = 0
        for end in _END.finditer(buffer, max(0, self._searched - _TAIL)):
            if end.end() == len(buffer) and buffer[-1] == 0x0D:
                break  # a line feed that belongs to this carriage return may still come
            events.append(bytes(buffer[start : end.end()]))
            start = end.end()
        del buffer[:start]
        self._searched = len(buffer)
        if len(buffer) > self._max_event_bytes:
            raise UpstreamError(
                f"the engine's stream holds an event of more than {self._max_event_bytes} bytes"
            )
        return events

    def rest(self) -> bytes:
        """What came after the last whole event; empty at a clean end."""
        return bytes(self._buffer)


def event_data(event: bytes) -> bytes | None:
    """The event's data, its lines joined by ``\\n``; None for a comment or an event without
    data."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2:
        return event[6:-2]  # the usual form: one line, \n\n
    lines = [_value(line) for line in _LINE.split(event) if line.split(b":", 1)[0] == b"data"]
    return b"\n".join(lines) if lines else None


def replace_data(event: bytes, data: bytes) -> bytes:
    """``event`` with other data on one line; its other fields and comments stay."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2:
        return b"data: " + data + b"\n\n"
    others = [line for line in _LINE.split(event) if line and line.split(b":", 1)[0] != b"data"]
    return b"\n".join([*others, b"data: " + data, b"", b""])


def _value(line: bytes) -> bytes:
    return line.partition(b":")[2].removeprefix(b" ")

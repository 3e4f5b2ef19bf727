"""Takes fields that nobody should store out of a request. Pure.

A path names fields from the top, with dots between; ``*`` is every element of a list. What is not
named keeps its spelling.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

import msgspec
from msgspec import Raw

from driftgate.errors import UNREADABLE

__all__ = ["REDACTED", "check_path", "redacted"]

Path: TypeAlias = Sequence[str]

REDACTED = b'"[redacted]"'
"""JSON in place of a value."""

_PATH = re.compile(r"[^.]+(\.[^.]+)*")


def check_path(path: str) -> str:
    """``path`` if it is one, else ValueError."""
    if _PATH.fullmatch(path) is None:
        raise ValueError(
            f"redact: {path!r} is no path like `user`, `metadata.email` or `messages.*.name`"
        )
    return path


def redacted(body: bytes, paths: Sequence[str]) -> bytes:
    """``body`` with the value at each of ``paths`` replaced; all of it where it is no JSON."""
    for path in paths:
        try:
            body = _replaced(body, path.split("."))
        except UNREADABLE:
            return REDACTED
    return body


def _replaced(value: bytes, path: Path) -> bytes:
    if not path:
        return value if value == b"null" else REDACTED
    first, *rest = path
    head = value.lstrip()[:1]
    if head == b"[" and first == "*":
        items = msgspec.json.decode(value, type=list[Raw])
        return msgspec.json.encode([Raw(_replaced(bytes(item), rest)) for item in items])
    if head != b"{":
        msgspec.json.decode(value)
        return value
    fields = msgspec.json.decode(value, type=dict[str, Raw])
    if first in fields:
        fields[first] = Raw(_replaced(bytes(fields[first]), rest))
    elif first == "*":
        fields = {name: Raw(_replaced(bytes(item), rest)) for name, item in fields.items()}
    return msgspec.json.encode(fields)

"""Stored bodies as JSON.

A body is stored as it came, and engines parse more than JSON: NaN, a byte order mark, UTF-16. What
is put into a document of ours must be JSON, or the whole document is none.
"""

from __future__ import annotations

import json

import msgspec

__all__ = ["body_of", "json_of"]


class _Binary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A body that is no text."""

    base64: bytes


def json_of(body: bytes) -> msgspec.Raw:
    """A stored body on one line, numbers spelled as they were; ``null`` where none was stored.

    What is no strict JSON is a string with its text, and what is no text ``{"base64": ...}``.
    """
    if not body:
        return msgspec.Raw(b"null")
    try:
        text = body.decode(json.detect_encoding(body))
    except UnicodeDecodeError:
        return msgspec.Raw(msgspec.json.encode(_Binary(body)))
    try:
        return msgspec.Raw(msgspec.json.format(text.encode(), indent=-1))
    except (msgspec.DecodeError, RecursionError):
        return msgspec.Raw(msgspec.json.encode(text))


def body_of(raw: msgspec.Raw) -> bytes:
    """The body that ``json_of`` gave this for: equal JSON, or equal text."""
    data = bytes(raw)
    if data == b"null":
        return b""
    if data.startswith(b'"'):
        return msgspec.json.decode(data, type=str).encode()
    try:
        return msgspec.json.decode(data, type=_Binary).base64
    except msgspec.DecodeError:
        return data

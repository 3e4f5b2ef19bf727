"""Top-level fields of a request, as JSON or as values. Pure."""

from __future__ import annotations

import math
from typing import Any, TypeAlias, TypeVar

import msgspec
from msgspec import Raw

from driftgate.errors import UNREADABLE

__all__ = ["Fields", "is_absent", "read", "read_lax"]

Fields: TypeAlias = dict[str, Raw]

T = TypeVar("T")

_TRUTH_NUMBERS = {b"true": Raw(b"1"), b"false": Raw(b"0")}


def read(fields: Fields, name: str, type_: type[T]) -> T | None:
    """A field as ``type_``; None where it is absent, null or something else."""
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw, type=type_)
    except UNREADABLE:
        return None


def read_lax(raw: Raw, type_: Any) -> Any:
    """A value as the engines' parser (pydantic) takes it: "0.25", 50.0, "7" and true are numbers,
    "true" and 1 are truth values. None for what cannot be read."""
    if type_ is not bool and bytes(raw) in _TRUTH_NUMBERS:
        raw = _TRUTH_NUMBERS[bytes(raw)]
    try:
        value = msgspec.json.decode(raw, type=type_, strict=False)
    except UNREADABLE:
        return None
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_absent(fields: Fields, name: str) -> bool:
    """Not sent, or null."""
    return bytes(fields.get(name, b"null")) == b"null"

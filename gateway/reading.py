"""What a JSON decoder raises for an engine's or an agent's bytes: one name for all of it."""

from __future__ import annotations

import msgspec

__all__ = ["UNREADABLE"]

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Bad JSON or wrong types, text that is not UTF-8, and arrays nested too deep: msgspec says each in
its own way."""

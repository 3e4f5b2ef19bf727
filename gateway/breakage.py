"""What broke between the gateway and the engine, in words for the agent and the store. Pure.

aiohttp's own words quote the bytes that it could not read, which are the engine's answer and
nobody's business in a log: here an error is named by its kind.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import aiohttp

__all__ = ["Breakage", "breakage", "broken_body"]

_KIND = re.compile(r"[\w ,-]+(?=:)")
"""The kind of a parser's error: what stands before the bytes that it quotes."""

_COUNTS = re.compile(r"received \d+ of \d+ bytes")

REACH = "check that it runs, and that the gateway's upstream is its address"
CRASH = "it may have crashed or been restarted; its log says more"
FOREIGN = "it may be broken, or be no engine; `curl -i` at its address shows what it says"


class Breakage(NamedTuple):
    """What happened, and what to do about it."""

    what: str
    fix: str
    reached: bool
    """There was a connection."""


def breakage(error: aiohttp.ClientError | OSError) -> Breakage:
    """Before the answer's body. ``TimeoutError`` is an OSError."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return Breakage(f"the engine could not be reached: {error}", REACH, reached=False)
    if isinstance(error, TimeoutError):
        return Breakage("the engine did not accept a connection in time", REACH, reached=False)
    if isinstance(error, aiohttp.ServerDisconnectedError):
        begun = not isinstance(error.message, str)
        where = "in the middle of its answer's headers" if begun else "without an answer"
        return Breakage(f"the engine closed the connection {where}", CRASH, reached=True)
    if isinstance(error, OSError):
        why = error.strerror or type(error).__name__
        what = f"the connection to the engine broke before its answer: {why}"
        return Breakage(what, CRASH, reached=True)
    kind = _KIND.match(error.message) if isinstance(error, aiohttp.ClientResponseError) else None
    named = f"{type(error).__name__}: {kind.group().strip()}" if kind else type(error).__name__
    return Breakage(f"the engine's answer is no valid HTTP ({named})", FOREIGN, reached=True)


def broken_body(error: aiohttp.ClientError | OSError) -> str:
    """In the middle of the answer's body."""
    cause = error.__cause__
    if isinstance(cause, aiohttp.http_exceptions.ContentLengthError):
        counts = _COUNTS.findall(str(cause))
        return f"its connection ended before its content-length ({', '.join(counts)})"
    if isinstance(cause, aiohttp.http_exceptions.TransferEncodingError):
        return "its connection ended before the last chunk, or a chunk was none"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if cause is not None:
        return f"its body is no valid HTTP ({type(cause).__name__})"
    return str(error) or type(error).__name__

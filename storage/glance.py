"""Cheap looks at a store: one answer's text without the records it is built on, and what is new.

Everything here reads one record, or rows that an index leads to; the whole of a trace is
``storage.load``'s job.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

import msgspec

from driftgate.errors import NotFoundError
from driftgate.storage.load import load_payload
from driftgate.storage.records import Kind, decode_trace
from driftgate.trace import I32, TraceMeta

__all__ = ["Activity", "AnswerText", "read_activity", "read_text"]

RECENT_CALLS = 5000
"""Newest calls looked at for rates: 80 a second over a minute; beyond it the window gets shorter,
not the rate wrong."""


_RECENT = (
    "SELECT trajectory, started_ns, (SELECT COALESCE(SUM(response_len), 0) FROM traces t "
    "WHERE t.call_id = c.call_id) FROM calls c ORDER BY started_ns DESC LIMIT ?"
)
_WITH_GAPS = (
    "SELECT COUNT(DISTINCT trajectory) FROM calls WHERE gap AND NOT "
    "(captured = 0 AND status IS NULL)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerText:
    """What the sampled tokens say; fields as in ``trace.Trace``."""

    meta: TraceMeta
    prompt_len: int | None
    """P; None where the engine gave no prompt ids."""
    token_bytes: bytes
    token_offsets: I32 | None
    """[R + 1] byte offsets into ``token_bytes``."""


class Activity(msgspec.Struct, frozen=True, kw_only=True):
    """What happened lately, and what waits."""

    window_s: float
    """What the rates are over: as asked, or less where ``RECENT_CALLS`` began within less."""
    calls: int
    """Begun within the window."""
    response_tokens: int
    """Of their traces."""
    running: int
    """Trajectories of these calls, and those with an open call that is not stale."""
    open_calls: int
    stale_calls: int
    """Open, and begun before ``stale_before_ns``."""
    with_gaps: int
    """Trajectories with a call that ended without all it should have given."""
    waiting: int
    """Scorable traces without a drift score."""
    oldest_waiting_ns: int | None
    last_call_ns: int | None


def read_text(connection: sqlite3.Connection, root: Path, trace_id: str) -> AnswerText:
    """The text of one answer from its own record alone. NotFoundError, FormatError."""
    row = connection.execute(
        "SELECT segment, offset FROM traces WHERE trace_id = ?", (trace_id,)
    ).fetchone()
    if row is None:
        raise NotFoundError(f"no trace {trace_id!r} in {root}")
    stored = decode_trace(load_payload(root, row[0], row[1], Kind.TRACE))
    return AnswerText(
        meta=stored.head.meta,
        prompt_len=stored.head.prompt_len,
        token_bytes=stored.token_bytes,
        token_offsets=stored.token_offsets,
    )


def read_activity(
    connection: sqlite3.Connection, *, now_ns: int, window_s: float, stale_s: float
) -> Activity:
    """Rates over the last ``window_s`` seconds; an open call older than ``stale_s`` is stale."""
    since, stale = now_ns - int(window_s * 1e9), now_ns - int(stale_s * 1e9)
    recent = connection.execute(_RECENT, (RECENT_CALLS,)).fetchall()
    started = [row[1] for row in recent]
    if len(recent) == RECENT_CALLS and min(started) > since:
        since = min(started)
    lately = [row for row in recent if row[1] >= since]
    open_calls = connection.execute(
        "SELECT trajectory, started_ns FROM calls WHERE captured = 0 AND status IS NULL"
    ).fetchall()
    live = {trajectory for trajectory, start in open_calls if start >= stale}
    waiting, oldest = connection.execute(
        "SELECT COUNT(*), MIN(started_ns) FROM traces WHERE scorable AND NOT scored"
    ).fetchone()
    (with_gaps,) = connection.execute(_WITH_GAPS).fetchone()
    return Activity(
        window_s=max((now_ns - since) / 1e9, 1e-3),
        calls=len(lately),
        response_tokens=sum(row[2] for row in lately),
        running=len(live | {row[0] for row in lately}),
        open_calls=sum(start >= stale for _, start in open_calls),
        stale_calls=sum(start < stale for _, start in open_calls),
        with_gaps=with_gaps,
        waiting=waiting,
        oldest_waiting_ns=oldest,
        last_call_ns=max(started, default=None),
    )

"""Records into the index: the only writes into its derived tables.

Inserting does not depend on the order of segments, so a rebuild gives the same content. Callers
hold a ``transaction``.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Literal

import msgspec

from driftgate.codes import PASSING
from driftgate.storage.delta import TraceHead
from driftgate.storage.index import OWNER_GONE
from driftgate.storage.records import ScoreHead
from driftgate.storage.segments import series_of
from driftgate.trace import CallIntent, CallOutcome, Reward, ScoreMeta

__all__ = [
    "SCORE_KEY",
    "Place",
    "add_intent",
    "add_outcome",
    "add_reward",
    "add_score",
    "add_small",
    "add_trace",
    "has_score",
    "indexed_bytes",
    "is_passing",
    "mark_baseless",
    "next_seq",
    "score_key",
    "set_indexed",
]


SCORE_KEY = "trace_id = ? AND engine = ? AND trainer = ? AND kind = ?"
"""In SQL, of what `score_key` gives."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record lies."""

    segment: str
    offset: int
    size_bytes: int


def indexed_bytes(connection: sqlite3.Connection, segment: str) -> int:
    """How far a segment is in the index; 0 where nothing of it is."""
    row = connection.execute(
        "SELECT indexed_bytes FROM segments WHERE name = ?", (segment,)
    ).fetchone()
    return int(row[0]) if row else 0


def set_indexed(connection: sqlite3.Connection, segment: str, end: int) -> None:
    """Say that a segment is in the index up to ``end``."""
    connection.execute(
        "INSERT INTO segments VALUES (?, ?) "
        "ON CONFLICT (name) DO UPDATE SET indexed_bytes = excluded.indexed_bytes",
        (segment, end),
    )


def add_intent(connection: sqlite3.Connection, intent: CallIntent, segment: str) -> None:
    """A call is about to be made; ``segment`` holds the record, and says whose call it is."""
    # What a trace said of the call before stays. No gap changes: a call starts as one.
    connection.execute(
        "INSERT INTO calls (call_id, trajectory, step, model, retry, started_ns, intent, segment) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (call_id) "
        "DO UPDATE SET intent = excluded.intent, segment = excluded.segment",
        (
            intent.call_id,
            intent.trajectory,
            intent.step,
            intent.model,
            intent.retry,
            intent.started_ns,
            _json(intent),
            segment,
        ),
    )
    _touch_trajectory(connection, intent.trajectory, intent.started_ns, intent.started_ns)
    _add_early_outcome(connection, intent.call_id)


def add_outcome(connection: sqlite3.Connection, outcome: CallOutcome) -> None:
    """A call ended without all its traces. Its intent comes later where storage took it late."""
    told = connection.execute(
        "SELECT outcome FROM calls WHERE call_id = ?", (outcome.call_id,)
    ).fetchone()
    inferred = outcome.reason == OWNER_GONE
    if told is None:
        how = "IGNORE" if inferred else "REPLACE"
        connection.execute(
            f"INSERT OR {how} INTO early_outcomes VALUES (?, ?)", (outcome.call_id, _json(outcome))
        )
        return
    if inferred and told[0] is not None:
        return  # what is inferred yields to what was said, whichever came first
    connection.execute(
        "UPDATE calls SET outcome = ?, status = ? WHERE call_id = ?",
        (_json(outcome), outcome.status, outcome.call_id),
    )
    connection.execute(
        "UPDATE trajectories SET ended_ns = MAX(ended_ns, ?) "
        "WHERE trajectory = (SELECT trajectory FROM calls WHERE call_id = ?)",
        (outcome.ended_ns, outcome.call_id),
    )
    _settle(connection, outcome.call_id)


def add_trace(
    connection: sqlite3.Connection,
    head: TraceHead,
    place: Place,
    *,
    has_logprobs: bool,
    has_routes: bool,
) -> None:
    """A trace is in a segment. Of two records with its id the one that its writer wrote later
    counts (FORMAT.md)."""
    meta = head.meta
    scorable = bool(head.prompt_len and head.response_len and has_logprobs)
    added = connection.execute(
        "INSERT INTO traces VALUES (?,?,?,?,?,?,?,?,?,?,0,?, EXISTS"
        "(SELECT 1 FROM scores WHERE trace_id = ? AND kind = 'drift'),?,?,?,?,?,?,?,?,?,?,?) "
        "ON CONFLICT (trace_id) DO NOTHING",
        (
            meta.trace_id,
            meta.call_id,
            meta.trajectory,
            meta.step,
            meta.choice,
            meta.model,
            meta.engine.digest,
            meta.started_ns,
            meta.retry,
            int(meta.status != "complete" or bool(meta.missing)),
            int(scorable),
            meta.trace_id,
            head.prompt_len,
            head.response_len,
            int(has_routes),
            head.twin_key,
            head.prompt_key,
            head.delta.base if head.delta else None,
            head.depth,
            place.segment,
            place.offset,
            place.size_bytes,
            _json(meta),
        ),
    )
    if not added.rowcount and _is_later(connection, meta.trace_id, place):
        connection.execute(
            "UPDATE traces SET base = ?, depth = ?, segment = ?, offset = ?, size_bytes = ? "
            "WHERE trace_id = ?",
            (
                head.delta.base if head.delta else None,
                head.depth,
                place.segment,
                place.offset,
                place.size_bytes,
                meta.trace_id,
            ),
        )
    connection.execute(
        "INSERT INTO calls "
        "(call_id, trajectory, step, model, retry, started_ns, choices, captured, flawed) "
        "SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, COUNT(*), SUM(flawed OR baseless) "
        "FROM traces WHERE call_id = ?1 "
        "ON CONFLICT (call_id) DO UPDATE SET choices = MAX(choices, excluded.choices), "
        "captured = excluded.captured, flawed = excluded.flawed",
        (
            meta.call_id,
            meta.trajectory,
            meta.step,
            meta.model,
            meta.retry,
            meta.started_ns,
            meta.sampling.n,
        ),
    )
    _touch_trajectory(connection, meta.trajectory, meta.started_ns, meta.ended_ns)
    _add_early_outcome(connection, meta.call_id)
    _settle(connection, meta.call_id)


_LOST = (
    "WITH RECURSIVE lost (trace_id) AS ("
    "  SELECT trace_id FROM traces WHERE base NOT IN (SELECT trace_id FROM traces) "
    "  UNION SELECT t.trace_id FROM traces t JOIN lost ON t.base = lost.trace_id)"
)
"""Traces that nobody can read: one that they are built on is not there."""


def mark_baseless(connection: sqlite3.Connection) -> None:
    """Say of each trace whether all that it is built on is there; its call is a gap where not."""
    changed = connection.execute(
        f"{_LOST} UPDATE traces SET baseless = NOT baseless "
        "WHERE baseless <> (trace_id IN (SELECT trace_id FROM lost)) RETURNING call_id"
    ).fetchall()
    for (call_id,) in set(changed):
        connection.execute(
            "UPDATE calls SET flawed = "
            "(SELECT SUM(flawed OR baseless) FROM traces WHERE call_id = ?1) WHERE call_id = ?1",
            (call_id,),
        )
        _settle(connection, call_id)


def next_seq(connection: sqlite3.Connection) -> int:
    """The number of the next score, above all that were ever given; stable only inside a
    ``transaction``."""
    given = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'scores'").fetchone()
    return int(given[0]) + 1 if given else 1


def score_key(head: ScoreHead) -> tuple[str, str, str, str]:
    """What stands once in the index: (trace id, engine, trainer, kind)."""
    meta = head.meta
    return meta.trace_id, meta.engine.digest, meta.trainer.digest, meta.kind


def has_score(connection: sqlite3.Connection, head: ScoreHead) -> bool:
    """Whether the index has a score for this (trace, engine, trainer, kind) that stands."""
    row = connection.execute(
        f"SELECT passing FROM scores WHERE {SCORE_KEY}", score_key(head)
    ).fetchone()
    return row is not None and not row[0]


def add_score(
    connection: sqlite3.Connection, head: ScoreHead, place: Place
) -> Literal["added", "duplicate", "seq_taken"]:
    """A score is in a segment. Of two with one key the higher ``seq`` counts (FORMAT.md)."""
    old = _seq_of_key(connection, head)
    if old is not None and old >= head.seq:
        return "duplicate"
    if connection.execute("SELECT 1 FROM scores WHERE seq = ?", (head.seq,)).fetchone():
        return "seq_taken"
    if old is not None:
        connection.execute("DELETE FROM scores WHERE seq = ?", (old,))
    meta = head.meta
    connection.execute(
        "INSERT INTO scores VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
        (
            head.seq,
            meta.trace_id,
            meta.trajectory,
            meta.kind,
            meta.engine.digest,
            meta.trainer.digest,
            meta.model,
            place.segment,
            place.offset,
            place.size_bytes,
            int(is_passing(meta)),
            _json(meta),
        ),
    )
    if meta.kind == "drift":
        connection.execute("UPDATE traces SET scored = 1 WHERE trace_id = ?", (meta.trace_id,))
    return "added"


def is_passing(meta: ScoreMeta) -> bool:
    """A refusal that a later score may take the place of."""
    return meta.bucket is None and any(r.code in PASSING for r in meta.comparable.reasons)


def add_reward(connection: sqlite3.Connection, reward: Reward) -> None:
    """A trajectory got a reward; the one given last counts."""
    connection.execute(
        "INSERT INTO rewards VALUES (?, ?, ?) ON CONFLICT (trajectory) DO UPDATE "
        "SET given_ns = excluded.given_ns, reward = excluded.reward "
        "WHERE excluded.given_ns >= given_ns",
        (reward.trajectory, reward.given_ns, _json(reward)),
    )


def add_small(
    connection: sqlite3.Connection, record: CallIntent | CallOutcome | Reward, segment: str
) -> None:
    """A record that is only JSON, in ``segment``."""
    if isinstance(record, CallIntent):
        add_intent(connection, record, segment)
    elif isinstance(record, CallOutcome):
        add_outcome(connection, record)
    else:
        add_reward(connection, record)


def _json(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()


def _seq_of_key(connection: sqlite3.Connection, head: ScoreHead) -> int | None:
    row = connection.execute(
        f"SELECT seq FROM scores WHERE {SCORE_KEY}", score_key(head)
    ).fetchone()
    return int(row[0]) if row else None


def _add_early_outcome(connection: sqlite3.Connection, call_id: str) -> None:
    """The call is known now: so is how it ended, where that was written first."""
    row = connection.execute(
        "DELETE FROM early_outcomes WHERE call_id = ? RETURNING outcome", (call_id,)
    ).fetchone()
    if row is not None:
        add_outcome(connection, msgspec.json.decode(row[0], type=CallOutcome))


def _is_later(connection: sqlite3.Connection, trace_id: str, place: Place) -> bool:
    """Whether the writer of a trace's record in the index wrote the one at ``place`` after it."""
    (segment, offset) = connection.execute(
        "SELECT segment, offset FROM traces WHERE trace_id = ?", (trace_id,)
    ).fetchone()
    if series_of(segment) != series_of(place.segment):
        return False
    return (place.segment, place.offset) > (segment, offset)


def _touch_trajectory(
    connection: sqlite3.Connection, trajectory: str, started_ns: int, ended_ns: int
) -> None:
    connection.execute(
        "INSERT INTO trajectories VALUES (?, ?, ?) ON CONFLICT (trajectory) DO UPDATE SET "
        "started_ns = MIN(started_ns, excluded.started_ns), "
        "ended_ns = MAX(ended_ns, excluded.ended_ns)",
        (trajectory, started_ns, ended_ns),
    )


def _settle(connection: sqlite3.Connection, call_id: str) -> None:
    """Recompute which calls of this call's step are gaps; one repeated well is none."""
    connection.execute(
        "UPDATE calls SET gap = NOT whole AND NOT ("
        "coalesce(status, '') IN ('failed', 'cancelled') AND EXISTS ("
        "  SELECT 1 FROM calls other WHERE other.trajectory = calls.trajectory "
        "  AND other.step = calls.step AND other.whole)) "
        "WHERE (trajectory, step) = (SELECT trajectory, step FROM calls WHERE call_id = ?)",
        (call_id,),
    )

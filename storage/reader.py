"""What is in a store: a read-only view for any process and any thread.

Sees what writers have indexed. Row queries use the index only; ``trace`` and ``score`` read
segments.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from driftgate.errors import NotFoundError
from driftgate.storage.cells import Cells
from driftgate.storage.glance import Activity, AnswerText, read_activity, read_text
from driftgate.storage.index import Connections
from driftgate.storage.load import TraceCache, load_payload, load_trace
from driftgate.storage.queries import (
    CALL_SUMS,
    CALLS,
    COUNTS,
    GROUP,
    HAS_GAP,
    IS_SCORED,
    NOT_A_FLOOR,
    PROMPT_KEY,
    TRACE_SUMS,
    TRACES,
    TWINS,
    WINDOW,
)
from driftgate.storage.records import Kind, decode_score
from driftgate.storage.rows import CallRow, CellRow, Counts, ScoreRow, TraceRow, TrajectoryRow
from driftgate.trace import CallIntent, CallOutcome, Reward, Score, ScoreMeta, Trace, TraceMeta

__all__ = ["Reader"]

CACHE_BYTES = 64 << 20
"""Decoded traces kept: reading the steps of a trajectory in order then decodes each record once."""

MAX_PAGE = 10_000
"""Rows of one answer, whatever the caller asks for."""

GROUP_WINDOW = 512
"""Trajectories on either side among which a prompt group is looked for: a batch of 64 prompts with
16 samples each."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """What a reader keeps of one index: a rebuilt one may tell other traces and scores."""

    file: int
    traces: TraceCache = field(default_factory=lambda: TraceCache(CACHE_BYTES))
    cells: Cells = field(default_factory=Cells)


class Reader:
    """Read-only view of the store at ``root``. StorageError where there is none."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._connections = Connections(root)
        self._lock = threading.Lock()
        self._kept = _Kept(file=-1)

    def close(self) -> None:
        """Close the connections of all threads."""
        self._connections.close()

    def trace(self, trace_id: str) -> Trace:
        """A whole trace; its arrays are read-only (copy what you change). NotFoundError."""
        with self._connections.reading() as connection:
            trace = load_trace(connection, self._root, trace_id, self._keeps().traces).trace
        status = self._one("SELECT status FROM calls WHERE call_id = ?", trace.meta.call_id)
        meta = _as_delivered(trace.meta, status[0] if status else None)
        return trace if meta is trace.meta else replace(trace, meta=meta)

    def answer_text(self, trace_id: str) -> AnswerText:
        """What an answer says, from its own record alone: cheap where ``trace`` reads its whole
        chain. NotFoundError."""
        with self._connections.reading() as connection:
            return read_text(connection, self._root, trace_id)

    def activity(self, *, now_ns: int, window_s: float, stale_s: float) -> Activity:
        """What happened within the last ``window_s`` seconds, and what waits to be scored."""
        with self._connections.reading() as connection:
            return read_activity(connection, now_ns=now_ns, window_s=window_s, stale_s=stale_s)

    def score(self, trace_id: str, trainer: str | None = None, *, kind: str = "drift") -> Score:
        """The score of a trace by the trainer of that digest (None: the latest). NotFoundError."""
        row = self._one(
            "SELECT segment, offset FROM scores WHERE trace_id = ?1 AND kind = ?3 "
            "AND (?2 IS NULL OR trainer = ?2) ORDER BY seq DESC LIMIT 1",
            trace_id,
            trainer,
            kind,
        )
        if row is None:
            by = f" by trainer {trainer!r}" if trainer else ""
            raise NotFoundError(f"no {kind} score of trace {trace_id!r}{by}")
        return decode_score(load_payload(self._root, row[0], row[1], Kind.SCORE))[1]

    def trajectories(
        self,
        *,
        limit: int = 50,
        before: str | None = None,
        model: str | None = None,
        complete: bool | None = None,
        scored: bool | None = None,
    ) -> list[TrajectoryRow]:
        """Newest first. ``before``: id of the last row of the previous page; NotFoundError if
        unknown.

        ``scored``: whether every scorable trace (and at least one) has a drift score.
        """
        where, values = ["TRUE"], list[Any]()
        if before is not None:
            (started,) = self._known(before)
            where.append("(started_ns, t.trajectory) < (?, ?)")
            values += [started, before]
        if model is not None:
            where.append(
                "EXISTS (SELECT 1 FROM calls c WHERE c.trajectory = t.trajectory AND c.model = ?)"
            )
            values.append(model)
        if complete is not None:
            where.append(("NOT " if complete else "") + HAS_GAP)
        if scored is not None:
            where.append(IS_SCORED if scored else f"NOT ({IS_SCORED})")
        rows = self._all(
            f"SELECT trajectory FROM trajectories t WHERE {' AND '.join(where)} "
            "ORDER BY started_ns DESC, trajectory DESC LIMIT ?",
            *values,
            min(limit, MAX_PAGE),
        )
        return [self.trajectory(row[0]) for row in rows]

    def trajectory(self, trajectory: str) -> TrajectoryRow:
        """One trajectory with its coverage. NotFoundError."""
        started_ns, ended_ns = self._known(trajectory, "started_ns, ended_ns")
        calls = self._one(CALL_SUMS, trajectory)
        traces = self._one(TRACE_SUMS, trajectory)
        assert calls is not None
        assert traces is not None
        steps, missing, open_calls, failed_calls, gap_calls = calls
        captured, scorable, scored = traces
        models = self._all(
            "SELECT DISTINCT model FROM calls WHERE trajectory = ? ORDER BY 1", trajectory
        )
        reward = self.reward(trajectory)
        return TrajectoryRow(
            trajectory=trajectory,
            steps=steps,
            choices=captured + missing,
            complete=not gap_calls,
            captured=captured,
            scorable=scorable,
            scored=scored,
            missing=missing,
            open_calls=open_calls,
            failed_calls=failed_calls,
            models=[row[0] for row in models],
            started_ns=started_ns,
            ended_ns=ended_ns,
            reward=reward.value if reward else None,
            gaps=self._gaps(trajectory) if gap_calls else [],
        )

    def calls(self, trajectory: str) -> list[CallRow]:
        """Every call of a trajectory in order of step and time; empty where it is unknown."""
        rows = self._all(
            CALLS + "WHERE trajectory = ? ORDER BY step, retry, started_ns", trajectory
        )
        return [_call_row(row) for row in rows]

    def open_calls(self) -> list[CallRow]:
        """Calls with neither a trace nor an outcome: running, or lost in a crash."""
        where = "WHERE captured = 0 AND status IS NULL ORDER BY started_ns"
        return [_call_row(row) for row in self._all(CALLS + where)]

    def traces(self, trajectory: str, step: int | None = None) -> list[TraceRow]:
        """Traces of a trajectory (of one step of it), in order of step, time and choice."""
        rows = self._all(
            TRACES + "WHERE trajectory = ?1 AND (?2 IS NULL OR step = ?2) "
            "ORDER BY step, started_ns, choice",
            trajectory,
            step,
        )
        return [_trace_row(row) for row in rows]

    def scores(
        self,
        trajectory: str | None = None,
        *,
        after: int = 0,
        limit: int = 1000,
        kind: str | None = None,
    ) -> list[ScoreRow]:
        """Scores with ``seq > after`` in order; none ever appears below a number already seen."""
        of = "trajectory = ? AND " if trajectory is not None else ""
        rows = self._all(
            f"SELECT seq, meta FROM scores WHERE {of} seq > ? AND (? IS NULL OR kind = ?) "
            "ORDER BY seq LIMIT ?",
            *([trajectory] if trajectory is not None else []),
            after,
            kind,
            kind,
            min(limit, MAX_PAGE),
        )
        return [ScoreRow(seq=seq, meta=_decode(meta, ScoreMeta)) for seq, meta in rows]

    def last_seq(self) -> int:
        """``seq`` of the newest score; 0 where there is none."""
        row = self._one("SELECT COALESCE(MAX(seq), 0) FROM scores")
        assert row is not None
        return int(row[0])

    def cells(self) -> list[CellRow]:
        """One row per (engine, trainer, model, kind); folds only scores that are new."""
        with self._connections.reading() as connection:
            return self._keeps().cells.rows(connection)

    def twins(self, *, unscored: bool = False, limit: int = 1000) -> list[tuple[str, str]]:
        """Pairs of scorable traces, earlier first, that a deterministic engine had to answer alike.

        Same prompt ids, sampling with seed, choice, model and engine; different calls, no retries.
        Of three, the first and second and the second and third. ``unscored``: without those whose
        second trace has a noise-floor score.
        """
        rows = self._all(
            f"{TWINS} {NOT_A_FLOOR if unscored else ''} ORDER BY started_ns LIMIT ?",
            min(limit, MAX_PAGE),
        )
        return [(first, second) for first, second in rows]

    def prompt_group(self, trajectory: str) -> list[str]:
        """Trajectories whose first step has the same model and prompt ids, oldest first.

        Itself among them; empty where its own first prompt is not stored. Looked for among the
        `GROUP_WINDOW` trajectories that started before it and as many after it: the samples of one
        prompt are asked for together. By the index alone. NotFoundError.
        """
        (started,) = self._known(trajectory)
        own = self._one(PROMPT_KEY, trajectory)
        if own is None:
            return []
        earliest, latest = self._one(WINDOW, started, GROUP_WINDOW) or (started, started)
        rows = self._all(GROUP, own[0], own[1], earliest, latest, GROUP_WINDOW)
        return list(
            dict.fromkeys(name for name, _ in sorted(rows, key=lambda row: (row[1], row[0])))
        )

    def answers_of(self, engine: str, model: str, *, limit: int) -> list[str]:
        """Ids of an engine's newest scored traces, by its digest, oldest first."""
        rows = self._all(
            "SELECT trace_id FROM traces WHERE engine = ? AND model = ? AND scorable AND scored "
            "AND retry = 0 ORDER BY started_ns DESC, trace_id LIMIT ?",
            engine,
            model,
            min(limit, MAX_PAGE),
        )
        return [trace_id for (trace_id,) in reversed(rows)]

    def reward(self, trajectory: str) -> Reward | None:
        """The reward given last."""
        row = self._one("SELECT reward FROM rewards WHERE trajectory = ?", trajectory)
        return _decode(row[0], Reward) if row else None

    def counts(self) -> Counts:
        """Of the whole store."""
        row = self._one(COUNTS)
        assert row is not None
        return Counts(**dict(zip(Counts.__struct_fields__, row, strict=True)))

    def _keeps(self) -> _Kept:
        """What was read of the index that this thread's connection is to."""
        with self._lock:
            if self._kept.file != self._connections.file:
                self._kept = _Kept(file=self._connections.file)
            return self._kept

    def _known(self, trajectory: str, columns: str = "started_ns") -> tuple[Any, ...]:
        row = self._one(f"SELECT {columns} FROM trajectories WHERE trajectory = ?", trajectory)
        if row is None:
            raise NotFoundError(f"no trajectory {trajectory!r}")
        return row

    def _gaps(self, trajectory: str) -> list[str]:
        """In words, what keeps a trajectory from being complete."""
        gaps = list[str]()
        gap_calls = CALLS + "WHERE trajectory = ? AND gap ORDER BY step, retry, started_ns"
        for row in self._all(gap_calls, trajectory):
            call = _call_row(row)
            if call.state == "open":
                gaps.append(f"step {call.step}: call {call.call_id} has not ended")
            elif call.outcome is not None:
                gaps.append(f"step {call.step}: {call.state}: {call.outcome.reason}")
            elif call.captured < call.choices:
                gaps.append(f"step {call.step}: {call.captured} of {call.choices} choices captured")
        for row in self._all(
            TRACES + "WHERE trajectory = ? AND flawed ORDER BY step, started_ns, choice",
            trajectory,
        ):
            meta = _trace_row(row).meta
            what = meta.missing or ["the answer did not end"]
            gaps += [f"step {meta.step} choice {meta.choice}: {text}" for text in what]
        for step, choice, base in self._all(
            "SELECT step, choice, base FROM traces WHERE trajectory = ? AND baseless "
            "ORDER BY step, choice",
            trajectory,
        ):
            gaps.append(f"step {step} choice {choice}: it is built on {base}, which is lost")
        return gaps

    def _one(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        return next(iter(self._all(sql, *values)), None)

    def _all(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._connections.reading() as connection:
            return connection.execute(sql, values).fetchall()


def _decode(text: str, type_: type[T]) -> T:
    return msgspec.json.decode(text, type=type_)


def _call_row(row: tuple[Any, ...]) -> CallRow:
    call_id, trajectory, step, model, retry, state, intent, outcome, choices, captured, started = (
        row
    )
    return CallRow(
        call_id=call_id,
        trajectory=trajectory,
        step=step,
        model=model,
        retry=retry,
        state=state,
        intent=_decode(intent, CallIntent) if intent else None,
        outcome=_decode(outcome, CallOutcome) if outcome else None,
        choices=choices,
        captured=captured,
        started_ns=started,
    )


def _as_delivered(meta: TraceMeta, call_status: str | None) -> TraceMeta:
    """With what its call's outcome says: an answer that was recorded as delivered (``strict``) and
    then could not be sent is taken back by an outcome ``cancelled``."""
    if call_status != "cancelled" or meta.delivery == "uncertain":
        return meta
    return msgspec.structs.replace(meta, delivery="uncertain")


def _trace_row(row: tuple[Any, ...]) -> TraceRow:
    meta, prompt_len, response_len, has_routes, scorable, scored, twin_key, base, size, status = row
    return TraceRow(
        meta=_as_delivered(_decode(meta, TraceMeta), status),
        prompt_len=prompt_len,
        response_len=response_len,
        has_routes=bool(has_routes),
        scorable=bool(scorable),
        scored=bool(scored),
        twin_key=twin_key,
        base=base,
        size_bytes=size,
    )

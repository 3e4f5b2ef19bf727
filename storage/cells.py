"""Scores folded per cell, each score once: the cached sums behind ``Reader.cells``."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from typing import TypeAlias

import msgspec

from driftgate.mismatch import Bucket, Worst
from driftgate.pool import Findings, Judged, Pools, larger, merged
from driftgate.storage.inserts import is_passing
from driftgate.storage.rows import CellRow
from driftgate.trace import Engine, ScoreMeta

__all__ = ["CellFold", "CellKey", "Cells"]

CellKey: TypeAlias = tuple[str, str, str, str]
"""Engine digest, trainer digest, model, kind."""


class CellFold:
    """Running sums of one cell, in order of ``seq``; ``first``: any of its scores, not folded."""

    def __init__(self, first: ScoreMeta) -> None:
        self._names = first
        self._bucket: Bucket | None = None
        self._worst: Worst | None = None
        self._comparable: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._trajectories: set[str] = set()
        self._n_seqs = 0
        self._last_seq = 0
        self._pools = Pools()
        self._judged: Judged | None = None

    def fold(self, meta: ScoreMeta, seq: int = 0) -> None:
        """Add one score."""
        self._last_seq, self._judged = seq, None
        self._comparable[meta.comparable.verdict] += 1
        self._reasons.update({reason.code for reason in meta.comparable.reasons})
        self._trajectories.add(meta.trajectory)
        self._pools.add(meta)
        self._worst = larger(self._worst, meta.worst)
        if meta.bucket is not None:
            self._n_seqs += 1
            self._bucket = merged(self._bucket, meta.bucket)

    def row(self, captured: int, wider: Findings | None = None) -> CellRow:
        """The cell as it stands. ``wider``: see `Pools.judge`."""
        if self._judged is None or wider is not None:
            engine = self._names.engine if self._names.kind == "drift" else None
            self._judged = self._pools.judge(engine if isinstance(engine, Engine) else None, wider)
        judged = self._judged
        return CellRow(
            engine=self._names.engine,
            trainer=self._names.trainer,
            model=self._names.model,
            kind=self._names.kind,
            verdict=judged.verdict,
            findings=judged.findings,
            bucket=self._bucket,
            comparable_bucket=judged.bucket,
            router=judged.router,
            replay=judged.replay,
            by_lag=judged.by_lag,
            comparable=dict(self._comparable),
            reasons=dict(self._reasons),
            worst=judged.worst or self._worst,
            n_seqs=self._n_seqs,
            scored=self._comparable.total(),
            captured=captured,
            trajectories=len(self._trajectories),
            last_seq=self._last_seq,
        )


class Cells:
    """Folds of one store. Thread-safe; reads only scores that came since the last call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cells: dict[CellKey, CellFold] = {}
        self._passing: set[tuple[str, CellKey]] = set()
        """Refusals among what is folded that another score may take the place of."""
        self._last_seq = 0

    def rows(self, connection: sqlite3.Connection) -> list[CellRow]:
        """One row per cell, in order of key."""
        query = "SELECT engine, model, COUNT(*) FROM traces GROUP BY engine, model"
        with self._lock:
            self._fold_new(connection)
            captured = {(engine, model): n for engine, model, n in connection.execute(query)}
            return [
                self._cells[key].row(captured.get((key[0], key[2]), 0))
                for key in sorted(self._cells)
            ]

    def _fold_new(self, connection: sqlite3.Connection) -> None:
        rows = connection.execute(
            "SELECT seq, engine, trainer, model, kind, meta FROM scores WHERE seq > ? ORDER BY seq",
            (self._last_seq,),
        )
        for seq, engine, trainer, model, kind, text in rows:
            meta = msgspec.json.decode(text, type=ScoreMeta)
            key = (engine, trainer, model, kind)
            if (meta.trace_id, key) in self._passing:  # sums cannot be taken out again
                self._cells, self._passing, self._last_seq = {}, set(), 0
                return self._fold_new(connection)
            if is_passing(meta):
                self._passing.add((meta.trace_id, key))
            if key not in self._cells:
                self._cells[key] = CellFold(meta)
            self._cells[key].fold(meta, seq)
            self._last_seq = seq

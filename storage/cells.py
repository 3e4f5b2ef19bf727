"""Scores folded per cell, each score once: the cached sums behind ``Reader.cells``."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from driftgate.mismatch import Bucket, Worst
from driftgate.router import RouterBucket
from driftgate.storage.rows import CellRow
from driftgate.trace import Engine, ScoreMeta, Trainer

__all__ = ["CellKey", "Cells"]

CellKey: TypeAlias = tuple[str, str, str, str]
"""Engine digest, trainer digest, model, kind."""


@dataclass(slots=True)
class _Cell:
    """Running sums of one cell, in order of ``seq``."""

    engine: Engine | Trainer
    trainer: Engine | Trainer
    bucket: Bucket | None = None
    comparable_bucket: Bucket | None = None
    router: RouterBucket | None = None
    worst: Worst | None = None
    comparable: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    buckets: dict[str, Bucket] = field(default_factory=dict)
    trajectories: set[str] = field(default_factory=set)
    n_seqs: int = 0
    scored: int = 0
    last_seq: int = 0

    def fold(self, seq: int, meta: ScoreMeta) -> None:
        """Add one score."""
        verdict = meta.comparable.verdict
        self.scored, self.last_seq = self.scored + 1, seq
        self.comparable[verdict] += 1
        self.reasons.update({reason.code for reason in meta.comparable.reasons})
        self.trajectories.add(meta.trajectory)
        if meta.bucket is not None:
            self.n_seqs += 1
            self.bucket = _merged(self.bucket, meta.bucket)
            self.buckets[meta.trajectory] = _merged(self.buckets.get(meta.trajectory), meta.bucket)
            if verdict != "no":
                self.comparable_bucket = _merged(self.comparable_bucket, meta.bucket)
        if meta.router is not None:
            self.router = meta.router if self.router is None else self.router.merge(meta.router)
        if meta.worst is not None and _larger(meta.worst, self.worst):
            self.worst = meta.worst


class Cells:
    """Folds of one store. Thread-safe; reads only scores that came since the last call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cells: dict[CellKey, _Cell] = {}
        self._last_seq = 0

    def rows(self, connection: sqlite3.Connection) -> list[CellRow]:
        """One row per cell, in order of key."""
        query = "SELECT engine, model, COUNT(*) FROM traces GROUP BY engine, model"
        with self._lock:
            self._fold_new(connection)
            captured = {(engine, model): n for engine, model, n in connection.execute(query)}
            return [
                _row(key, cell, captured) for key, cell in sorted(self._cells.items(), key=_key)
            ]

    def buckets(self, connection: sqlite3.Connection, key: CellKey) -> dict[str, Bucket]:
        """Folded bucket per trajectory; empty for a cell without scores."""
        with self._lock:
            self._fold_new(connection)
            cell = self._cells.get(key)
            return dict(cell.buckets) if cell else {}

    def _fold_new(self, connection: sqlite3.Connection) -> None:
        rows = connection.execute(
            "SELECT seq, engine, trainer, model, kind, meta FROM scores WHERE seq > ? ORDER BY seq",
            (self._last_seq,),
        )
        for seq, engine, trainer, model, kind, text in rows:
            meta = msgspec.json.decode(text, type=ScoreMeta)
            cell = self._cells.setdefault(
                (engine, trainer, model, kind), _Cell(meta.engine, meta.trainer)
            )
            cell.fold(seq, meta)
            self._last_seq = seq


def _key(item: tuple[CellKey, _Cell]) -> CellKey:
    return item[0]


def _merged(sum_: Bucket | None, bucket: Bucket) -> Bucket:
    return bucket if sum_ is None else sum_.merge(bucket)


def _larger(worst: Worst, old: Worst | None) -> bool:
    return old is None or abs(worst.log_ratio) > abs(old.log_ratio)


def _row(key: CellKey, cell: _Cell, captured: dict[tuple[str, str], int]) -> CellRow:
    engine, _, model, kind = key
    assert kind in ("drift", "noise_floor"), kind
    return CellRow(
        engine=cell.engine,
        trainer=cell.trainer,
        model=model,
        kind="drift" if kind == "drift" else "noise_floor",
        bucket=cell.bucket,
        comparable_bucket=cell.comparable_bucket,
        router=cell.router,
        comparable=dict(cell.comparable),
        reasons=dict(cell.reasons),
        worst=cell.worst,
        n_seqs=cell.n_seqs,
        scored=cell.scored,
        captured=captured.get((engine, model), 0),
        trajectories=len(cell.trajectories),
        last_seq=cell.last_seq,
    )

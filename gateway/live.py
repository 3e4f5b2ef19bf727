"""Scores over time, per cell, and the worst trajectories: folded as they come, each score once.

`driftgate.storage.cells` keeps one sum per cell; this keeps one row per score, small enough to
hold very many, so that drift can be shown against time and an alarm can say since when.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from driftgate.anatomy import DIVERGENT
from driftgate.codes import SPOILS_ROUTES
from driftgate.listings import RunDrift, TrajectoryRow
from driftgate.live_views import CellSeries, SeriesPoint
from driftgate.mismatch import Bucket, Worst
from driftgate.pool import pool_of
from driftgate.router import RouterBucket
from driftgate.storage import ScoreRow
from driftgate.trace import ScoreMeta
from driftgate.views import Kind

__all__ = ["BLOCK_TOKENS", "CellKey", "Live", "Refuted", "Sums", "TrajectoryWorst", "stretch"]

MAX_SCORES = 50_000
"""Rows kept of one cell, the newest: about 16 MB."""

KEPT_WORST = 200
"""Trajectories whose worst token is kept, those with the largest |D|."""

KEPT_RUNS = 20_000
"""Trajectories whose drift is kept for the list of them, those scored last: about 10 MB."""

PAGE = 1000
"""Scores read from the index at once."""

BLOCK_TOKENS = 512
"""Tokens, or (token, layer) pairs where routes are asked about, that are judged together when a
stretch is dated: single answers are too short to tell drift from chance."""

CellKey = tuple[str, str, str, Kind]
"""Engine digest, trainer digest, model, kind."""

Refuted = Mapping[CellKey, Collection[str]]
"""Pools of each cell (`driftgate.pool`) whose scores together are no evidence, whatever each says
itself. Known only once they have been merged, so it is asked for with each question."""


class Sums(NamedTuple):
    """What one score, or several, add to a point of a line."""

    scored_ns: int = 0
    scores: int = 0
    not_comparable: int = 0
    n_tokens: int = 0
    n_bad_tokens: int = 0
    k3: float | None = 0.0
    """Sum over tokens; None where float64 cannot hold it."""
    abs_log_ratio: float = 0.0
    over_2: int = 0
    """Tokens whose ratio leaves [1/2, 2]."""
    worst: float = 0.0
    """D of the token with the largest |D|, nats."""
    cells: int = 0
    """Valid (token, layer) pairs of routes that nothing is known against."""
    disagree: int = 0
    all_cells: int = 0
    """Valid pairs of all routes, misaligned ones too."""
    zero_overlap: int = 0
    """Of ``all_cells``: this is how misaligned ones show."""
    pool: str = ""
    """Of its cell."""

    @classmethod
    def of(cls, meta: ScoreMeta, pool: str = "") -> Sums:
        """Of one score; numbers that are not comparable are left out, the score is counted."""
        counted = meta.bucket is not None and meta.comparable.verdict != "no"
        bucket = meta.bucket if counted and meta.bucket is not None else Bucket()
        router = meta.router or RouterBucket()
        same = sum(layer[-1] for layer in router.shared)
        spoiled = any(reason.code in SPOILS_ROUTES for reason in meta.comparable.reasons)
        return cls(
            scored_ns=meta.scored_ns,
            scores=int(counted),
            not_comparable=int(not counted),
            n_tokens=bucket.n_tokens,
            n_bad_tokens=bucket.n_bad_tokens,
            k3=bucket.linear.k3 if bucket.linear is not None else None,
            abs_log_ratio=bucket.sum_abs,
            over_2=bucket.token_hits.get("extreme_frac_tau2", 0),
            worst=bucket.worst.log_ratio if bucket.worst is not None else 0.0,
            cells=0 if spoiled else router.n_cells,
            disagree=0 if spoiled else router.n_cells - same,
            all_cells=router.n_cells,
            zero_overlap=sum(layer[0] for layer in router.shared),
            pool=pool,
        )

    def refuted(self) -> Sums:
        """The same with nothing that is comparable; its routes stay."""
        return self._replace(
            scores=0,
            not_comparable=self.scores + self.not_comparable,
            n_tokens=0,
            n_bad_tokens=0,
            k3=0.0,
            abs_log_ratio=0.0,
            over_2=0,
            worst=0.0,
        )

    @classmethod
    def merge(cls, parts: Iterable[Sums]) -> Sums:
        """The sums of all; ``scored_ns`` is the first one's."""
        rows = list(parts)
        k3 = [row.k3 for row in rows if row.k3 is not None]
        total = {
            name: sum(getattr(row, name) for row in rows)
            for name in cls._fields
            if name not in ("scored_ns", "k3", "worst", "pool")
        }
        return cls(
            scored_ns=rows[0].scored_ns if rows else 0,
            k3=sum(k3) if len(k3) == len(rows) else None,
            worst=max((row.worst for row in rows), key=abs, default=0.0),
            **total,
        )

    def but_worst(self) -> Sums:
        """The same without the token of the largest |D|: one token is no rate."""
        if not self.n_tokens:
            return self
        d = self.worst
        return self._replace(
            n_tokens=self.n_tokens - 1,
            k3=None if self.k3 is None else self.k3 - (math.expm1(d) - d),
            abs_log_ratio=self.abs_log_ratio - abs(d),
            over_2=self.over_2 - (abs(d) > DIVERGENT),
            worst=0.0,
        )

    def metrics(self) -> dict[str, float | None]:
        """By METRICS name; None where there is nothing to divide by."""
        return {
            "kl_k3_rollout_train": None if self.k3 is None else _over(self.k3, self.n_tokens),
            "abs_log_ratio_mean": _over(self.abs_log_ratio, self.n_tokens),
            "extreme_frac_tau2": _over(self.over_2, self.n_tokens),
            "router_set_disagree_rate": _over(self.disagree, self.cells),
            "router_zero_overlap_rate": _over(self.zero_overlap, self.all_cells),
        }


class TrajectoryWorst(NamedTuple):
    """The worst comparable token of a trajectory and where it stands."""

    trajectory: str
    model: str
    step: int
    choice: int
    worst: Worst
    cell: CellKey
    pool: str


class RunSums(NamedTuple):
    """Comparable scores of one trajectory in one pool of a cell."""

    n_tokens: int = 0
    sum_abs: float = 0.0
    max_abs: float = 0.0

    def merge(self, other: RunSums) -> RunSums:
        """Of both."""
        return RunSums(
            self.n_tokens + other.n_tokens,
            self.sum_abs + other.sum_abs,
            max(self.max_abs, other.max_abs),
        )


class Live:
    """The fold of one store. Thread-safe; ``read(after)`` gives scores behind a cursor."""

    def __init__(self, read: Callable[[int, int], Sequence[ScoreRow]]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._cells: dict[CellKey, deque[Sums]] = {}
        self._forgotten: dict[CellKey, int] = {}
        self._worst: dict[str, TrajectoryWorst] = {}
        self._runs: dict[str, dict[tuple[CellKey, str], RunSums]] = {}
        self._pools: dict[CellKey, dict[str, None]] = {}
        self._last_seq = 0
        self.last_score_ns: int | None = None

    def refresh(self) -> None:
        """Fold what came since the last call."""
        with self._lock:
            page = PAGE
            while page == PAGE:
                rows = self._read(self._last_seq, PAGE)
                for row in rows:
                    self._fold(row.meta)
                    self._last_seq = row.seq
                page = len(rows)

    def cells(self, refuted: Refuted) -> dict[CellKey, list[Sums]]:
        """Each cell's scores in the order they came."""
        with self._lock:
            kept = {key: list(rows) for key, rows in self._cells.items()}
        for key in kept.keys() & refuted.keys():
            if pools := refuted[key]:
                kept[key] = [row.refuted() if row.pool in pools else row for row in kept[key]]
        return kept

    def worst(self, limit: int, refuted: Refuted) -> list[TrajectoryWorst]:
        """Trajectories by their worst token, the largest |D| first."""
        with self._lock:
            found = [
                one for one in self._worst.values() if one.pool not in refuted.get(one.cell, ())
            ]
        return sorted(found, key=_size, reverse=True)[:limit]

    def with_drift(self, rows: Sequence[TrajectoryRow], refuted: Refuted) -> list[TrajectoryRow]:
        """The rows, each with what is known of its drift."""
        with self._lock:
            return [
                replace(row, drift=_drift(self._runs.get(row.trajectory, {}), refuted))
                for row in rows
            ]

    def series(self, slot_s: float, refuted: Refuted) -> list[CellSeries]:
        """Every cell's scores merged by slots of ``slot_s`` seconds."""
        return [
            CellSeries(
                engine_digest=engine,
                trainer_digest=trainer,
                model=model,
                kind=kind,
                points=_points(rows, int(slot_s * 1e9)),
                forgotten=self._forgotten.get((engine, trainer, model, kind), 0),
            )
            for (engine, trainer, model, kind), rows in sorted(self.cells(refuted).items())
        ]

    def span_s(self) -> float:
        """From the first to the last score that is kept, in seconds."""
        times = [row.scored_ns for rows in self.cells({}).values() for row in rows]
        return (max(times) - min(times)) / 1e9 if times else 0.0

    def _fold(self, meta: ScoreMeta) -> None:
        key = (meta.engine.digest, meta.trainer.digest, meta.model, meta.kind)
        rows = self._cells.setdefault(key, deque(maxlen=MAX_SCORES))
        if len(rows) == MAX_SCORES:
            self._forgotten[key] = self._forgotten.get(key, 0) + 1
        pools = self._pools.setdefault(key, {})
        pool = pool_of(meta, pools)
        pools[pool] = None
        rows.append(Sums.of(meta, pool))
        self.last_score_ns = max(self.last_score_ns or 0, meta.scored_ns)
        if meta.kind != "drift" or meta.worst is None or meta.comparable.verdict == "no":
            return
        self._fold_run(meta, abs(meta.worst.log_ratio), (key, pool))
        found = TrajectoryWorst(
            meta.trajectory, meta.model, meta.step, meta.choice, meta.worst, key, pool
        )
        known = self._worst.get(meta.trajectory)
        if known is None or _size(found) > _size(known):
            self._worst[meta.trajectory] = found
        if len(self._worst) > KEPT_WORST:
            del self._worst[min(self._worst.values(), key=_size).trajectory]

    def _fold_run(self, meta: ScoreMeta, largest: float, at: tuple[CellKey, str]) -> None:
        if meta.bucket is None or not meta.bucket.n_tokens:
            return
        sums = self._runs.pop(meta.trajectory, {})  # back at the end: the one scored last
        one = RunSums(meta.bucket.n_tokens, meta.bucket.sum_abs, largest)
        sums[at] = sums.get(at, RunSums()).merge(one)
        self._runs[meta.trajectory] = sums
        if len(self._runs) > KEPT_RUNS:
            del self._runs[next(iter(self._runs))]


def stretch(
    rows: Sequence[Sums], holds: Callable[[Sums], bool], weight: Callable[[Sums], int]
) -> Sums | None:
    """The newest unbroken stretch of which ``holds`` is true, merged; None where there is none.

    Judged in blocks of at least ``BLOCK_TOKENS`` of ``weight``, what the question divides by, from
    the newest back. Rows without any of it neither fill a block nor break a stretch.
    """
    found: list[Sums] = []
    for block in _blocks(rows, weight):
        if not holds(Sums.merge(block)):
            break
        found = block + found
    return Sums.merge(found) if found else None


def _blocks(rows: Sequence[Sums], weight: Callable[[Sums], int]) -> Iterator[list[Sums]]:
    """From the newest back; the oldest rows, too few for a block, are part of the oldest one."""
    full: list[Sums] = []
    block: list[Sums] = []
    filled = 0
    for row in reversed(rows):
        if not (more := weight(row)):
            continue
        block.insert(0, row)
        filled += more
        if filled >= BLOCK_TOKENS:
            if full:
                yield full
            full, block, filled = block, [], 0
    if full or block:
        yield block + full


def _points(rows: Sequence[Sums], slot_ns: int) -> list[SeriesPoint]:
    slots: dict[int, list[Sums]] = {}
    for row in rows:
        slots.setdefault(row.scored_ns // slot_ns, []).append(row)
    points = []
    for slot in sorted(slots):
        total = Sums.merge(slots[slot])
        points.append(
            SeriesPoint(
                start_ns=slot * slot_ns,
                scores=total.scores,
                not_comparable=total.not_comparable,
                n_tokens=total.n_tokens,
                metrics=total.metrics(),
            )
        )
    return points


def _drift(sums: Mapping[tuple[CellKey, str], RunSums], refuted: Refuted) -> RunDrift | None:
    pairs: dict[CellKey, RunSums] = {}
    for (cell, pool), one in sums.items():
        if pool not in refuted.get(cell, ()):
            pairs[cell] = pairs.get(cell, RunSums()).merge(one)
    if not pairs:
        return None
    worst = max(pairs.values(), key=lambda sums: sums.sum_abs / sums.n_tokens)
    return RunDrift(
        n_tokens=worst.n_tokens,
        abs_log_ratio_mean=worst.sum_abs / worst.n_tokens,
        abs_log_ratio_max=worst.max_abs,
        pairs=len(pairs),
    )


def _size(entry: TrajectoryWorst) -> float:
    return abs(entry.worst.log_ratio)


def _over(total: float, count: int) -> float | None:
    return total / count if count else None

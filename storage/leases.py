"""The teacher's work queue: who may score which trajectory for which trainer, and until when.

A view over the index: work is every scorable trace without a drift score by that trainer, and for a
teacher that starts also those it was refused for a reason that may have passed. A worker
that dies loses its lease at ``expires``, and the next one takes the trajectory. A score that was
written twice is stored once (``Writer``), so a lease taken too early costs time, not truth.

A lease that is not given back stays as a row, and the next one over the same work counts it: so a
trajectory whose scoring ends the process is known as such, however the process ended.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from driftgate.storage.index import INDEX_NAME, open_index, transaction
from driftgate.storage.inserts import next_seq
from driftgate.storage.recovery import StoreLock
from driftgate.storage.rows import Lease, OpenWork

__all__ = ["MAX_LEASE_S", "Leases"]

MAX_LEASE_S = 3600.0
"""A lease that runs out later than this was taken under a clock that ran ahead, and is none: no
living worker needs more before it renews."""

_UNSCORED = (
    "scorable AND (:model IS NULL OR model = :model) AND NOT EXISTS (SELECT 1 FROM scores s "
    "WHERE s.trace_id = t.trace_id AND s.trainer = :trainer AND s.kind = 'drift' "
    "AND NOT (s.passing AND s.seq <= :before)) "
    "AND NOT EXISTS (SELECT 1 FROM temp.aside a WHERE a.trace_id = t.trace_id)"
)
# rowid is the order of indexing: all work at or below ``done`` is finished and stays so.
_DONE = (
    f"SELECT COALESCE((SELECT rowid FROM traces t WHERE rowid > :done AND {_UNSCORED} "
    "ORDER BY rowid LIMIT 1) - 1, (SELECT MAX(rowid) FROM traces), 0)"
)
_FIRST_FREE = (
    f"SELECT trajectory FROM traces t WHERE rowid > :done AND {_UNSCORED} AND NOT EXISTS "
    "(SELECT 1 FROM leases l WHERE l.trajectory = t.trajectory AND l.trainer = :trainer "
    f"AND (l.expires > :now AND l.expires <= :now + {MAX_LEASE_S} OR :untried)) "
    "ORDER BY rowid LIMIT 1"
)
_WORK = (
    f"SELECT trace_id FROM traces t WHERE trajectory = :trajectory AND {_UNSCORED} "
    "ORDER BY step, started_ns, choice"
)
_OPEN = (
    "SELECT t.trajectory, MAX(l.worker), MAX(l.expires) FROM traces t LEFT JOIN leases l "
    "ON l.trajectory = t.trajectory AND l.trainer = :trainer "
    f"WHERE t.rowid > :done AND {_UNSCORED} GROUP BY t.trajectory ORDER BY MIN(t.rowid)"
)


class Leases:
    """Work queue of one store; creates the store where it is missing. Thread-safe."""

    def __init__(self, root: Path, *, refused: bool = False) -> None:
        """``refused``: what was refused before now for a reason that may have passed
        (`driftgate.codes.PASSING`) is work once more."""
        self._store_lock = StoreLock(root)
        try:
            self._connection = open_index(root / INDEX_NAME, create=True)
            self._connection.execute("CREATE TEMP TABLE aside (trace_id TEXT PRIMARY KEY)")
            self._before = next_seq(self._connection) - 1 if refused else 0
        except BaseException:
            self._store_lock.close()
            raise
        self._lock = threading.Lock()
        self._done: dict[tuple[str, str | None], int] = {}

    def acquire(
        self,
        trainer: str,
        *,
        worker: str,
        ttl_s: float,
        model: str | None = None,
        untried: bool = False,
        now: float | None = None,
    ) -> Lease | None:
        """All open work of the trajectory that has waited longest; None where there is none.

        ``trainer`` is a digest; ``ttl_s`` is at most MAX_LEASE_S; ``now`` is seconds since the
        epoch; ``untried`` leaves out what an earlier lease did not give back. Polling an empty
        queue takes no lock.
        """
        assert ttl_s <= MAX_LEASE_S, ttl_s
        now = time.time() if now is None else now
        asked: dict[str, object] = {
            "trainer": trainer,
            "model": model,
            "now": now,
            "untried": untried,
            "before": self._before,
        }
        with self._lock:
            asked["done"] = self._advance(asked, (trainer, model))
            if self._connection.execute(_FIRST_FREE, asked).fetchone() is None:
                return None
            with transaction(self._connection):
                return self._take(asked, worker, now + ttl_s, ttl_s)

    def open_work(self, trainer: str, *, model: str | None = None) -> list[OpenWork]:
        """Every trajectory with unscored work, leased or not; the oldest first.

        Empty exactly where ``acquire`` has nothing left to give, now or when leases run out.
        """
        asked: dict[str, object] = {"trainer": trainer, "model": model, "before": self._before}
        with self._lock:
            asked["done"] = self._advance(asked, (trainer, model))
            rows = self._connection.execute(_OPEN, asked).fetchall()
        return [OpenWork(trajectory=one, worker=by, expires=until) for one, by, until in rows]

    def renew(self, lease: Lease, *, now: float | None = None) -> bool:
        """Extend a lease by its ``ttl_s`` from now; False where another worker has taken it."""
        now = time.time() if now is None else now
        return self._change(
            "UPDATE leases SET expires = ? WHERE trajectory = ? AND trainer = ? AND token = ?",
            (now + lease.ttl_s, lease.trajectory, lease.trainer, lease.token),
        )

    def release(self, lease: Lease) -> None:
        """Give a lease back; nothing happens where another worker has taken it."""
        self._change(
            "DELETE FROM leases WHERE trajectory = ? AND trainer = ? AND token = ?",
            (lease.trajectory, lease.trainer, lease.token),
        )

    def set_aside(self, trace_ids: Iterable[str]) -> None:
        """Leave these as they are: they are work for others, and no more for this object."""
        with self._lock:
            self._connection.executemany(
                "INSERT OR IGNORE INTO aside VALUES (?)", [(one,) for one in trace_ids]
            )

    def close(self) -> None:
        """Close the index; leases stay until they expire. Idempotent."""
        with self._lock:
            self._connection.close()
            self._store_lock.close()

    def _advance(self, asked: dict[str, object], key: tuple[str, str | None]) -> int:
        """Everything up to this rowid is scored: keeps a poll from scanning the whole store."""
        asked = {**asked, "done": self._done.get(key, 0)}
        (self._done[key],) = self._connection.execute(_DONE, asked).fetchone()
        return self._done[key]

    def _take(
        self, asked: dict[str, object], worker: str, expires: float, ttl_s: float
    ) -> Lease | None:
        """Inside a transaction: the first free trajectory, now leased."""
        row = self._connection.execute(_FIRST_FREE, asked).fetchone()
        if row is None:
            return None
        key = (row[0], asked["trainer"])
        left = self._connection.execute(
            "SELECT attempts FROM leases WHERE trajectory = ? AND trainer = ?", key
        ).fetchone()
        crashes: int = left[0] if left else 0
        work = self._connection.execute(_WORK, {**asked, "trajectory": row[0]}).fetchall()
        lease = Lease(
            trajectory=row[0],
            trainer=str(asked["trainer"]),
            worker=worker,
            token=secrets.token_hex(8),
            trace_ids=[trace_id for (trace_id,) in work],
            ttl_s=ttl_s,
            expires=expires,
            crashes=crashes,
        )
        self._connection.execute(
            "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?)",
            (lease.trajectory, lease.trainer, worker, lease.token, expires, crashes + 1),
        )
        return lease

    def _change(self, sql: str, values: tuple[object, ...]) -> bool:
        with self._lock, transaction(self._connection):
            cursor: sqlite3.Cursor = self._connection.execute(sql, values)
            return cursor.rowcount == 1

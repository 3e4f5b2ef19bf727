"""Gateways that share a store: who else is there, and whose call is which step.

A gateway alone numbers the steps of its trajectories in memory. Where several live on one store, an
agent's calls may come to any of them, and records reach the index some time after the call: then
each number is given out by a small database beside the index. A gateway that had a neighbour goes
on asking it: its own memory lacks the steps that the other gave. The database is not derived from
anything and not needed later: the first gateway of a store begins with an empty one.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from driftgate.storage.index import BUSY_TIMEOUT_S

__all__ = ["Neighbours"]

FOLDER = "gateways"
STEPS_NAME = "steps.sqlite"

SETTLED_NS = 10**9
"""A folder that changed less long ago may change again without a new time: file systems keep times
in steps of some milliseconds."""


class Neighbours:
    """One gateway's place among those of a store. ``any`` belongs to one thread."""

    def __init__(self, root: Path) -> None:
        """Make this gateway known. OSError where the store cannot be written."""
        self._folder = root / FOLDER
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._steps = root / STEPS_NAME
        self._seen_ns = 0
        self._found = False
        self._path = self._folder / f"{os.getpid()}-{time.time_ns()}.lock"
        temporary = self._path.with_suffix(".tmp")
        self._fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        os.rename(temporary, self._path)
        if not any(map(_lives, self._others())):
            self._steps.unlink(missing_ok=True)

    def any(self) -> bool:
        """Whether another gateway lives on this store, or gave steps since this one started.

        Costs one ``stat`` while no gateway comes or goes.
        """
        changed_ns = self._folder.stat().st_mtime_ns
        if changed_ns != self._seen_ns:
            self._found = any(map(_lives, self._others())) or self._steps.exists()
            settled = abs(time.time_ns() - changed_ns) > SETTLED_NS
            self._seen_ns = changed_ns if settled else 0
        return self._found

    def next_step(self, trajectory: str, at_least: int) -> int:
        """A step that no gateway has given to this trajectory; sqlite3.Error. Any thread."""
        connection = sqlite3.connect(self._steps, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        with closing(connection):
            # Numbers outlive no gateway: a machine that stops takes all of them along.
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS steps "
                "(trajectory TEXT PRIMARY KEY, last INTEGER NOT NULL) STRICT, WITHOUT ROWID"
            )
            (step,) = connection.execute(
                "INSERT INTO steps VALUES (?, ?) ON CONFLICT (trajectory) "
                "DO UPDATE SET last = MAX(last + 1, excluded.last) RETURNING last",
                (trajectory, at_least),
            ).fetchone()
        return int(step)

    def close(self) -> None:
        """This gateway is gone."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def _others(self) -> list[Path]:
        return [path for path in self._folder.glob("*.lock") if path != self._path]


def _lives(path: Path) -> bool:
    """Whether the gateway of a file lives; that of one that does not is removed."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False

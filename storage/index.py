"""The index: SQLite tables derived from segments, and how processes share them.

Everything but ``leases`` follows from the segments (``driftgate.storage.inserts``). Several
processes write, each transaction under ``BEGIN IMMEDIATE``. It is synced lazily (WAL,
``synchronous=NORMAL``): after a power cut it may fall back to an earlier state, together with
``segments.indexed_bytes``, and recovery reads the rest again.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from driftgate.errors import StorageError

__all__ = ["INDEX_NAME", "OWNER_GONE", "Connections", "open_index", "transaction"]

INDEX_NAME = "index.sqlite"

INDEX_VERSION = 7
"""``PRAGMA user_version``. An index of another version is rebuilt, not migrated: it is derived."""

BUSY_TIMEOUT_S = 30.0
"""How long a writer waits for another: a score batch holds the lock for one fsync, a recovery for a
second or two."""

PRIMARY_CODE = 0xFF
"""Of SQLite's error codes: above are bits that say more."""

OWNER_GONE = "the gateway ended before the call did: it was killed, or its machine stopped"
"""Reason of an outcome that no gateway wrote: recovery infers it from an intent alone."""

NOT_ALLOWED = (
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH,
)
"""Codes of a file or folder that this user may not open or write: no rebuild helps."""

_SCHEMA = f"""
CREATE TABLE segments (
    name TEXT PRIMARY KEY,
    indexed_bytes INTEGER NOT NULL              -- end of the last whole record in the index
) STRICT;

CREATE TABLE trajectories (
    trajectory TEXT PRIMARY KEY,
    started_ns INTEGER NOT NULL,
    ended_ns INTEGER NOT NULL
) STRICT;
CREATE INDEX trajectories_by_start ON trajectories (started_ns, trajectory);

CREATE TABLE calls (
    call_id TEXT PRIMARY KEY,
    trajectory TEXT NOT NULL,
    step INTEGER NOT NULL,
    model TEXT NOT NULL,
    retry INTEGER NOT NULL,
    started_ns INTEGER NOT NULL,
    intent TEXT,                                -- JSON CallIntent
    segment TEXT,                               -- of the intent
    outcome TEXT,                               -- JSON CallOutcome
    status TEXT,                                -- of the outcome
    choices INTEGER NOT NULL DEFAULT 0,         -- n of the request, 0 while no trace says it
    captured INTEGER NOT NULL DEFAULT 0,        -- traces in the store
    flawed INTEGER NOT NULL DEFAULT 0,          -- of those, partial, missing something or baseless
    -- whole: all choices are there; cancelled beside them says that they could not be delivered
    whole INTEGER NOT NULL GENERATED ALWAYS AS
        (captured > 0 AND captured >= choices AND flawed = 0
         AND (status IS NULL OR status = 'cancelled')) VIRTUAL,
    gap INTEGER NOT NULL DEFAULT 1              -- not whole, and no repetition made up for it
) STRICT;
CREATE INDEX calls_by_trajectory ON calls (trajectory, step, retry, started_ns);
CREATE INDEX calls_by_start ON calls (started_ns);
CREATE INDEX calls_by_model ON calls (model, trajectory);
CREATE INDEX calls_open ON calls (trajectory) WHERE captured = 0 AND status IS NULL;
CREATE INDEX calls_gap ON calls (trajectory) WHERE gap;

-- what was inferred yields to what is there: a segment that was damaged or away has come back
CREATE TRIGGER inferred_outcome_yields AFTER UPDATE ON calls
WHEN new.captured > 0 AND new.captured >= new.choices AND new.flawed = 0
    AND json_extract(new.outcome, '$.reason') = '{OWNER_GONE}'
BEGIN UPDATE calls SET outcome = NULL, status = NULL WHERE call_id = new.call_id; END;

CREATE TABLE early_outcomes (                   -- of calls of which nothing else is here yet
    call_id TEXT PRIMARY KEY,
    outcome TEXT NOT NULL                       -- JSON CallOutcome
) STRICT;

CREATE TABLE traces (
    trace_id TEXT PRIMARY KEY,
    call_id TEXT NOT NULL,
    trajectory TEXT NOT NULL,
    step INTEGER NOT NULL,
    choice INTEGER NOT NULL,
    model TEXT NOT NULL,
    engine TEXT NOT NULL,                       -- digest
    started_ns INTEGER NOT NULL,
    retry INTEGER NOT NULL,
    flawed INTEGER NOT NULL,
    baseless INTEGER NOT NULL,                  -- what it is built on is lost: nobody can read it
    scorable INTEGER NOT NULL,                  -- has prompt, response and logprobs: none is empty
    scored INTEGER NOT NULL,                    -- has a drift score by some trainer
    prompt_len INTEGER,
    response_len INTEGER,
    has_routes INTEGER NOT NULL,
    twin_key TEXT,
    prompt_key TEXT,                            -- of a first step
    base TEXT,
    depth INTEGER NOT NULL,
    segment TEXT NOT NULL,
    offset INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    meta TEXT NOT NULL                          -- JSON TraceMeta
) STRICT;
CREATE INDEX traces_by_trajectory ON traces (trajectory, step, started_ns, choice);
CREATE INDEX traces_by_call ON traces (call_id);
CREATE INDEX traces_by_engine ON traces (engine, model);
CREATE INDEX traces_by_twin ON traces (twin_key, engine, started_ns) WHERE twin_key IS NOT NULL;
CREATE INDEX traces_by_prompt ON traces (prompt_key, started_ns) WHERE prompt_key IS NOT NULL;
CREATE INDEX traces_baseless ON traces (trajectory) WHERE baseless;
CREATE INDEX traces_unscored ON traces (trajectory) WHERE scorable AND NOT scored;

CREATE TABLE scores (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,      -- never given twice, also where a score was lost
    trace_id TEXT NOT NULL,
    trajectory TEXT NOT NULL,
    kind TEXT NOT NULL,
    engine TEXT NOT NULL,                       -- digest
    trainer TEXT NOT NULL,                      -- digest
    model TEXT NOT NULL,
    segment TEXT NOT NULL,
    offset INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    passing INTEGER NOT NULL,                   -- no numbers, for a reason that may have passed
    meta TEXT NOT NULL,                         -- JSON ScoreMeta
    UNIQUE (trace_id, engine, trainer, kind)
) STRICT;
CREATE INDEX scores_by_trajectory ON scores (trajectory, seq);
CREATE INDEX scores_by_trainer ON scores (trace_id, trainer, kind);

CREATE TABLE rewards (
    trajectory TEXT PRIMARY KEY,
    given_ns INTEGER NOT NULL,
    reward TEXT NOT NULL                        -- JSON Reward
) STRICT;

CREATE TABLE leases (
    trajectory TEXT NOT NULL,
    trainer TEXT NOT NULL,
    worker TEXT NOT NULL,
    token TEXT NOT NULL,
    expires REAL NOT NULL,                      -- seconds since the epoch
    attempts INTEGER NOT NULL,                  -- leases since one was given back, this one too
    PRIMARY KEY (trajectory, trainer)
) STRICT;
"""


def open_index(path: Path, *, create: bool) -> sqlite3.Connection:
    """A connection to the index; usable from any thread, by one at a time.

    StorageError where there is none (and ``create`` is false) or it is of another version. Where
    the folder may not be written it only reads.
    """
    if not create and not path.exists():
        raise StorageError(
            f"no driftgate index at {path}: is this the store's folder? "
            "If it has segments, run `driftgate index rebuild`"
        )
    read_only = not create and not _writable(path)
    how = "?mode=ro&immutable=1" if _unshared(path) else "?mode=ro"
    connection = sqlite3.connect(
        path.absolute().as_uri() + how if read_only else path,
        uri=read_only,
        timeout=BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        if not read_only:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
        if create:
            with transaction(connection):
                if not connection.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0]:
                    _create(connection)
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error as error:
        connection.close()
        raise StorageError(
            f"index {path} cannot be opened ({error}): {_fix(path, error)}"
        ) from error
    if version != INDEX_VERSION:
        connection.close()
        raise StorageError(
            f"index {path} has version {version}, not {INDEX_VERSION}: "
            "run `driftgate index rebuild`"
        )
    return connection


def _fix(path: Path, error: sqlite3.Error) -> str:
    """What to do where an index does not open."""
    code = getattr(error, "sqlite_errorcode", 0) & PRIMARY_CODE
    if code in NOT_ALLOWED:
        return f"make {path.parent} and what is in it writable, or read a copy of the store"
    if code == sqlite3.SQLITE_BUSY:
        return "another process keeps it locked: look for a stopped gateway or teacher, try again"
    if code == sqlite3.SQLITE_FULL:
        return "make room on its disk"
    return "run `driftgate index rebuild`"


def _writable(path: Path) -> bool:
    """Whether SQLite can make the files beside an index by which it shares a WAL."""
    return os.access(path.parent, os.W_OK)


def _unshared(path: Path) -> bool:
    """Whether an index is to be read without them: there is no WAL to share, and nobody writes."""
    if _writable(path):
        return False
    try:
        return path.with_name(path.name + "-wal").stat().st_size == 0
    except FileNotFoundError:
        return True


class Connections:
    """One connection per thread to the index of ``root``, opened when first asked for.

    A rebuild replaces the file; the next ``get`` then opens the new one.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / INDEX_NAME
        self._local = threading.local()
        self._lock = threading.Lock()
        self._all: list[sqlite3.Connection] = []

    def get(self) -> sqlite3.Connection:
        """This thread's connection; StorageError where there is no index."""
        seen = self._look()
        if getattr(self._local, "seen", None) != seen:
            connection = open_index(self._path, create=False)
            with self._lock:
                self._all.append(connection)
            self._local.connection, self._local.seen = connection, seen
        current: sqlite3.Connection = self._local.connection
        return current

    def _look(self) -> tuple[int, ...]:
        """What differs where a connection must be opened anew."""
        try:
            file = os.stat(self._path)
        except FileNotFoundError:
            return (-1,)
        if _unshared(self._path):  # SQLite keeps what it has read of a file that cannot change
            return file.st_ino, file.st_mtime_ns, file.st_size
        return (file.st_ino,)

    @property
    def file(self) -> int:
        """Which file this thread's connection is to: another number after a rebuild."""
        inode: int = self._local.seen[0]
        return inode

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """``get`` for the length of the block; StorageError where SQLite or the disk fails."""
        try:
            yield self.get()
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"the store of {self._path} cannot be read ({error}); where it is damaged, "
                "run `driftgate index rebuild`"
            ) from error

    def close(self) -> None:
        """Close the connections of all threads, which must be done with them."""
        with self._lock:
            for connection in self._all:
                connection.close()
            self._all.clear()
        self._local = threading.local()


@contextmanager
def transaction(
    connection: sqlite3.Connection, *, on_busy: Callable[[], None] | None = None
) -> Iterator[None]:
    """Take the index's write lock; commit at the end, roll back on any error.

    Where another holds the lock for longer than BUSY_TIMEOUT_S: sqlite3.OperationalError, or, with
    ``on_busy``, a call of that and another BUSY_TIMEOUT_S, for as long as it takes.
    """
    _locking(connection, "BEGIN IMMEDIATE", on_busy)
    try:
        yield
        _locking(connection, "COMMIT", on_busy)
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _locking(
    connection: sqlite3.Connection, statement: str, on_busy: Callable[[], None] | None
) -> None:
    """Execute a statement that may find the lock taken and leaves all as it was then."""
    while True:
        try:
            connection.execute(statement)
        except sqlite3.OperationalError as error:
            if on_busy is None or error.sqlite_errorcode & PRIMARY_CODE != sqlite3.SQLITE_BUSY:
                raise
            on_busy()
        else:
            return


def _create(connection: sqlite3.Connection) -> None:
    for statement in _SCHEMA.split(";\n"):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {INDEX_VERSION}")

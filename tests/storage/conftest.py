"""What the storage tests share: stores in a temporary folder, a dump of an index."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from driftgate.storage import Reader, Writer
from driftgate.storage.index import INDEX_NAME


def dump(root: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table of an index but leases."""
    connection = sqlite3.connect(root / INDEX_NAME)
    try:
        tables = [
            name
            for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
            if name != "leases"
        ]
        return {
            t: connection.execute(f"SELECT * FROM {t} ORDER BY 1, 2").fetchall() for t in tables
        }
    finally:
        connection.close()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    """A writer on a new store, closed at the end."""
    writer = Writer(tmp_path)
    yield writer
    writer.close()


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """A reader on the same store."""
    reader = Reader(tmp_path)
    yield reader
    reader.close()


@pytest.fixture
def dump_index() -> Callable[[Path], dict[str, list[tuple[Any, ...]]]]:
    """Every row of every derived table."""
    return dump

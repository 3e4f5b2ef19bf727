"""Append-only segments (the truth) and a SQLite index (derived): FORMAT.md."""

from driftgate.storage.glance import Activity, AnswerText
from driftgate.storage.leases import MAX_LEASE_S, Leases
from driftgate.storage.neighbours import Neighbours
from driftgate.storage.reader import Reader
from driftgate.storage.rebuild import rebuild_index
from driftgate.storage.records import Record
from driftgate.storage.rows import (
    CallRow,
    CellRow,
    Counts,
    Lease,
    OpenWork,
    RebuildReport,
    ScoreRow,
    TraceRow,
    TrajectoryRow,
)
from driftgate.storage.segments import read_segment
from driftgate.storage.writer import Writer, WriterStats

__all__ = [
    "MAX_LEASE_S",
    "Activity",
    "AnswerText",
    "CallRow",
    "CellRow",
    "Counts",
    "Lease",
    "Leases",
    "Neighbours",
    "OpenWork",
    "Reader",
    "RebuildReport",
    "Record",
    "ScoreRow",
    "TraceRow",
    "TrajectoryRow",
    "Writer",
    "WriterStats",
    "read_segment",
    "rebuild_index",
]

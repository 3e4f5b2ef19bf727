"""Lost or wrong: each call held against what the store says of it, value by value."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from driftgate.errors import NotFoundError
from driftgate.storage import Reader
from driftgate.trace import CallOutcome, Trace
from reliability.agent import Seen
from reliability.answers import Said, is_exact, is_part

__all__ = ["Call", "Row", "Stored", "digest_of", "read_call"]


@dataclass(frozen=True, slots=True)
class Call:
    """What an agent sent and saw."""

    said: Said
    trajectory: str
    body: bytes
    seen: Seen


@dataclass(frozen=True, slots=True)
class Stored:
    """What the store says of a call."""

    traces: list[Trace]
    outcomes: list[CallOutcome]
    known: int
    """Calls with an intent or a trace."""
    still_open: int

    @property
    def reasons(self) -> list[str]:
        """Everything that is said to be missing, and why."""
        missing = [text for trace in self.traces for text in trace.meta.missing]
        return missing + [outcome.reason for outcome in self.outcomes]

    def has(self, call: Call) -> bool:
        """The whole answer is stored, exactly."""
        return any(is_exact(trace, call.said, call.body) for trace in self.traces)

    def wrong(self, call: Call) -> int:
        """Traces that hold anything but (the beginning of) this answer, or call a part the
        whole."""
        return sum(
            not is_part(trace, call.said, call.body)
            or (trace.meta.status == "complete" and not is_exact(trace, call.said, call.body))
            for trace in self.traces
        )


def digest_of(body: bytes) -> str:
    """As a call's intent has it."""
    return hashlib.sha256(body).hexdigest()[:16]


def read_call(reader: Reader, call: Call) -> Stored:
    """The records of one call."""
    digest = digest_of(call.body)
    try:
        rows = [
            row
            for row in reader.calls(call.trajectory)
            if row.intent is None or row.intent.body_sha256 == digest
        ]
    except NotFoundError:
        rows = []
    ids = {row.call_id for row in rows}
    found = [
        reader.trace(row.meta.trace_id)
        for row in reader.traces(call.trajectory)
        if row.meta.call_id in ids
    ]
    return Stored(
        traces=found,
        outcomes=[row.outcome for row in rows if row.outcome is not None],
        known=len(rows),
        still_open=sum(row.state == "open" for row in rows),
    )


@dataclass(slots=True)
class Row:
    """One line of the table."""

    fault: str
    saw: str = ""
    """By the agent, in words."""
    tries: int = 0
    lost: int = 0
    wrong: int = 0
    worst: float | None = None
    """Of what the row bounds: the age of a lost answer, a delay, memory; None: nothing."""
    unit: str = "ms"
    """Of ``worst``."""
    notes: list[str] = field(default_factory=list)
    """What is not as it should be, in words."""

    def judge(self, store: Path, calls: list[Call]) -> None:
        """Add calls: an answer whose end came must be stored, and no stored one may differ."""
        reader = Reader(store)
        for call in calls:
            stored = read_call(reader, call)
            if call.seen.answered and not stored.has(call):
                self.lose(f"{call.said.name}: answered, stored is {stored.reasons or 'nothing'}")
            if wrong := stored.wrong(call):
                self.wrong += wrong
                self.notes.append(f"{call.said.name}: {wrong} traces differ from what was sent")
        reader.close()

    def lose(self, note: str) -> None:
        """One record that should be there is not."""
        self.lost += 1
        self.notes.append(note)

    def check(self, holds: bool, note: str) -> None:
        """Something else that must hold."""
        if not holds:
            self.wrong += 1
            self.notes.append(note)

    def says(self, reasons: list[str], pattern: str) -> None:
        """One of the stored reasons must match."""
        found = any(re.search(pattern, reason) for reason in reasons)
        self.check(found, f"no stored reason is like {pattern!r}: {reasons}")

    @property
    def good(self) -> bool:
        """Nothing lost, nothing wrong."""
        return not (self.lost or self.wrong)

"""Every result that was written, good or bad: a table sums over all of them and lists them.

``docs/reliability.jsonl`` has one line for each run and table, and is only appended to.
"""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from benchmarks.report import Goal, Table, machine
from reliability.verdict import Row

__all__ = ["DOCUMENT", "Kept", "Result", "append", "history", "keep", "kept", "summed"]

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"
RESULTS = DOCUMENT.with_suffix(".jsonl")

COLUMNS = ["fault", "runs", "tries", "agent saw (last run)", "worst", "records lost", "wrong"]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One row of one run."""

    fault: str
    saw: str
    tries: int
    lost: int
    wrong: int
    worst: float | None = None
    unit: str = "ms"
    notes: list[str] = []

    @classmethod
    def of(cls, row: Row) -> Result:
        """As the run found it."""
        return cls(
            fault=row.fault,
            saw=row.saw,
            tries=row.tries,
            lost=row.lost,
            wrong=row.wrong,
            worst=row.worst,
            unit=row.unit,
            notes=[note.replace(f"{DOCUMENT.parent.parent}/", "") for note in row.notes],
        )


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one table."""

    table: str
    time: str
    """UTC"""
    command: str
    commit: str
    machine: str
    rows: list[Result] = []
    goals: list[Goal] = []
    """Of a table that has no faults but figures."""


def keep(
    table: str, command: str, *, rows: list[Row] | None = None, goals: list[Goal] | None = None
) -> Kept:
    """A run that has just ended, as a line of the results."""
    return Kept(
        table=table,
        time=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        command=command,
        commit=_commit(),
        machine=machine(),
        rows=[Result.of(row) for row in rows or []],
        goals=goals or [],
    )


def append(run: Kept) -> None:
    """To what is kept."""
    with RESULTS.open("ab") as results:
        results.write(msgspec.json.encode(run) + b"\n")


def kept(table: str, path: Path = RESULTS) -> list[Kept]:
    """Earlier runs of a table, oldest first."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [one for one in (msgspec.json.decode(line, type=Kept) for line in lines)
            if one.table == table]  # fmt: skip


def summed(runs: list[Kept]) -> Table:
    """All runs together, a line for each fault of the last one and then of earlier ones."""
    faults = dict.fromkeys(row.fault for run in reversed(runs) for row in run.rows)
    lines = []
    for fault in faults:
        rows = [row for run in runs for row in run.rows if row.fault == fault]
        worst = [row.worst for row in rows if row.worst is not None]
        lines.append(
            [
                fault,
                str(len(rows)),
                f"{sum(row.tries for row in rows):,}",
                rows[-1].saw,
                f"{max(worst):.0f} {rows[-1].unit}" if worst else "",
                str(sum(row.lost for row in rows)),
                str(sum(row.wrong for row in rows)),
            ]
        )
    return Table("What broke and what came of it, over every run", COLUMNS, lines)


def history(runs: list[Kept]) -> Table:
    """Every run and what it found."""
    lines = [
        [run.time, run.command.removeprefix("python -m reliability "), run.commit, _found(run)]
        for run in runs
    ]
    return Table("Every run", ["UTC", "run", "commit", "found"], lines)


def _found(run: Kept) -> str:
    if run.goals:
        return "; ".join(f"{goal.what}: {goal.measured}" for goal in run.goals)
    tries, lost = sum(row.tries for row in run.rows), sum(row.lost for row in run.rows)
    wrong = sum(row.wrong for row in run.rows)
    where = ", ".join(row.fault for row in run.rows if row.lost or row.wrong)
    return f"{tries:,} tries, {lost} lost, {wrong} wrong" + (f" ({where})" if where else "")


def _commit() -> str:
    """What was run; ``+`` where files differ from it."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=RESULTS.parent,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.stdout.strip()

"""What a benchmark says: machine, command, tables, goals; printed, and kept in docs/benchmarks.md.

One text form for both, Markdown. A section of the document lies between two markers and is replaced
as a whole, so that text around it stays.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["DOCUMENT", "Goal", "Section", "Table", "machine", "write_section"]

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"

HEADING = """\
# Benchmarks

`make bench`, or `python -m benchmarks NAME`. Every ratio is measured in one run on one machine;
absolute numbers are there to be compared within a table only. `--write` replaces the sections
below.
"""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a caption; the first column is left aligned, numbers are right aligned."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """A Markdown table whose columns also line up as plain text."""
        rows = [list(self.columns), *map(list, self.rows)]
        widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(self.columns))]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines = [
            "| "
            + " | ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            + " |"
            for row in [rows[0], rule, *rows[1:]]
        ]
        return "\n".join([f"**{self.caption}**", "", *lines])


@dataclass(frozen=True, slots=True)
class Goal:
    """A number that was asked for, and what came out."""

    what: str
    wanted: str
    measured: str
    met: bool

    def markdown(self) -> str:
        """One list item."""
        verdict = "met" if self.met else "NOT MET"
        return f"- {self.what}: {self.measured} (goal: {self.wanted}): {verdict}"


@dataclass(slots=True)
class Section:
    """The result of one benchmark."""

    name: str
    title: str
    how: str
    """What was measured and under which conditions, in a few sentences."""
    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    command: str = ""
    """What makes this section; empty: the benchmark of its name."""

    def markdown(self) -> str:
        """The whole section."""
        day = datetime.now(UTC).date().isoformat()
        parts = [
            f"## {self.title}",
            f"`{self.command or f'python -m benchmarks {self.name}'}`, {day}, on {machine()}.",
            self.how,
            *(table.markdown() for table in self.tables),
            "\n".join(goal.markdown() for goal in self.goals),
            "\n".join(f"- {note}" for note in self.notes),
        ]
        return "\n\n".join(part for part in parts if part)


def machine() -> str:
    """CPU model, cores that this process may use, memory, kernel and Python."""
    model = "unknown CPU"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        model = found.group(1).strip() if found else platform.machine()
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    busy = os.getloadavg()[0]
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores, {gib:.0f} GiB, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"load average {busy:.1f} at the end"
    )


def write_section(section: Section, document: Path = DOCUMENT) -> None:
    """Replace the section in ``document`` between its markers, or add it at the end."""
    start, end = f"<!-- benchmark:{section.name} -->", f"<!-- /benchmark:{section.name} -->"
    text = document.read_text() if document.exists() else HEADING
    block = f"{start}\n\n{section.markdown()}\n\n{end}"
    before, found, rest = text.partition(start)
    if found:
        _, closed, after = rest.partition(end)
        if not closed:
            raise ValueError(f"{document}: {start} is not closed; add {end}")
        text = before + block + after
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(text)

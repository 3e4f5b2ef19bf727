"""``python -m reliability [NAME …] [--full] [--write]``: break things, print the tables.

Exit status 1 where a record was lost or wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import Goal, Section, write_section
from reliability.results import DOCUMENT, Kept, append, history, keep, kept, summed
from reliability.verdict import Row

__all__ = ["FAULTS", "NAMES", "run_rows"]

FAULTS = {
    "kills": "Killed processes",
    "teacher": "Killed trainers",
    "upstream": "The engine breaks",
    "extremes": "Large and slow answers",
    "clients": "Agents and clocks misbehave",
    "disk": "The disk fails",
    "stops": "Stops and restarts",
}
NAMES = (*FAULTS, "soak")


def run_rows(name: str, folder: Path, *, full: bool) -> list[Row]:
    """The rows of one table."""
    rows: list[Row] = asyncio.run(
        importlib.import_module(f"reliability.{name}").run(folder, full=full)
    )
    return rows


def section(name: str, folder: Path, *, full: bool) -> tuple[Section, Kept]:
    """One table as a section of the document, over this run and all that were kept before."""
    command = f"python -m reliability {name}{' --full' if full else ''}"
    if name == "soak":
        found: Section = importlib.import_module("reliability.soak").run(folder, full=full)
        found.command = command
        this = keep(name, command, goals=found.goals)
        found.tables.append(history([*kept(name), this]))
        return found, this
    rows = run_rows(name, folder, full=full)
    bad = [row for row in rows if not row.good]
    for row in bad:
        for note in row.notes:
            print(f"{row.fault}: {note}", file=sys.stderr)
    this = keep(name, command, rows=rows)
    runs = [*kept(name), this]
    lost, wrong = sum(row.lost for row in rows), sum(row.wrong for row in rows)
    made = Section(
        name=name,
        title=FAULTS[name],
        how=str(importlib.import_module(f"reliability.{name}").__doc__).strip(),
        command=command,
        tables=[summed(runs), history(runs)],
        goals=[Goal("records lost and wrong, last run", "0 and 0", f"{lost} and {wrong}", not bad)],
    )
    return made, this


def main() -> None:
    """Run what was named, or every fault."""
    parser = argparse.ArgumentParser(prog="python -m reliability")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--full", action="store_true", help="as often as the document says")
    parser.add_argument("--write", action="store_true", help=f"keep the result, in {DOCUMENT.name}")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(
            f"nothing is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}"
        )
    logging.basicConfig(level=logging.ERROR)
    missed = 0
    for name in options.names or FAULTS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="driftgate-reliability-") as folder:
            made, this = section(name, Path(folder), full=options.full)
        print(f"\n{made.markdown()}\n", flush=True)
        print(f"{name} took {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        missed += sum(not goal.met for goal in made.goals)
        if options.write:
            append(this)
            write_section(made, DOCUMENT)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()

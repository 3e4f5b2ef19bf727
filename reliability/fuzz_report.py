"""Keeps what a fuzz run found, target by target, so that a long run can be taken up again.

A line of ``docs/reliability.jsonl`` for each; the table sums the cases of all of them and shows the
worst that any observed.
"""

from __future__ import annotations

import asyncio
import re

from benchmarks.report import Goal, Section, Table, write_section
from reliability.fuzz import API, CASE_TIMEOUT_S, MAX_INPUT_BYTES, MAX_RSS_MB, Outcome
from reliability.results import DOCUMENT, Kept, append, keep, kept
from reliability.schema import examine
from reliability.verdict import Row

__all__ = ["of_api", "of_target", "section", "write"]

TABLE = "fuzz"

_WHAT = re.compile(r"^(?:- | +)((?:[A-Z]+\d+|assert) .*)$|^(\w*Error: \w.*)$", re.MULTILINE)
"""Of what atheris or schemathesis print."""

HOW = f"""\
Coverage-guided (atheris), each target in a process of its own, inputs up to {MAX_INPUT_BYTES}
bytes, from real answers, streams and the golden segment. A crash, an error that is not the
documented one, a broken invariant, a case over {CASE_TIMEOUT_S} s or a process over {MAX_RSS_MB} MB
is a find. The line `{API}` is schemathesis with the admin key against a real gateway."""


def of_target(outcome: Outcome) -> tuple[Kept, str]:
    """One target's run, and what it printed of a find."""
    row = Row(
        outcome.target,
        f"{outcome.what}; {outcome.edges:,} edges",
        tries=outcome.cases,
        wrong=outcome.finds,
        worst=outcome.peak_rss_mb,
        unit=f"MB, < {outcome.slowest_s + 1} s",
        notes=[outcome.said] if outcome.said else [],
    )
    return keep(TABLE, f"python -m reliability.fuzz {outcome.target}", rows=[row]), outcome.said


def of_api(examples: int, *, seed: int) -> tuple[Kept, str]:
    """schemathesis over every operation of the API."""
    api = asyncio.run(examine(examples, seed=seed))
    said = "" if api.passed else api.said
    what = f"requests to {api.operations} operations, valid and not, alone and in sequences"
    row = Row(API, what, tries=api.cases, wrong=int(not api.passed), notes=[said] if said else [])
    return keep(TABLE, "python -m reliability.fuzz api", rows=[row]), said


def section(runs: list[Kept]) -> Section:
    """The table over all runs."""
    rows = [row for run in runs for row in run.rows]
    lines = []
    for target in dict.fromkeys(row.fault for row in rows):
        ours = [row for row in rows if row.fault == target]
        worst = max(ours, key=lambda row: row.worst or 0.0)
        lines.append(
            [
                target,
                ours[-1].saw,
                str(len(ours)),
                f"{sum(row.tries for row in ours):,}",
                str(sum(row.wrong for row in ours)),
                "" if worst.worst is None else f"{worst.worst:.0f} {worst.unit}",
            ]
        )
    finds = sum({row.fault: row.wrong for row in rows}.values())
    columns = ["target", "reads; last run", "runs", "cases", "finds", "most memory, slowest"]
    return Section(
        name=TABLE,
        title="Fuzzing",
        command="make fuzz",
        how=HOW,
        tables=[Table("Readers of foreign bytes, over every run", columns, lines), *_finds(runs)],
        goals=[Goal("finds in the last run of each", "0", str(finds), finds == 0)],
    )


def _finds(runs: list[Kept]) -> list[Table]:
    """Every find, with the line that says what it was; the whole is in the results."""
    lines = [
        [run.time, row.fault, run.commit, _what("\n".join(row.notes))]
        for run in runs
        for row in run.rows
        if row.wrong
    ]
    return [Table("Every find", ["UTC", "target", "commit", "what"], lines)] if lines else []


def _what(said: str) -> str:
    found = _WHAT.search(said)
    return "" if found is None else found.group(1) or found.group(2)


def write(made: Kept) -> None:
    """Keep a result and write the table anew."""
    append(made)
    write_section(section(kept(TABLE)), DOCUMENT)

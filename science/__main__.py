"""``python -m science [--fast] [--write]``: print the table; exit 1 unless all rows hold."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from science import causes, cells, decimals, judging, numbers, planted, signatures
from science.table import DOCUMENT, Row, exactly, markdown, section

__all__ = ["fast", "main"]

Part = tuple[str, Callable[[str], Iterator[Row]]]

FAST: Sequence[Part] = (
    ("METRICS 2, planted", lambda part: numbers.log_ratios(part, numbers.planted())),
    ("METRICS 2, where float64 ends", decimals.extremes),
    (
        "METRICS 3, planted",
        lambda part: numbers.routing(part, *numbers.planted_routes(), ordered=True),
    ),
    ("Merging, planted", lambda part: numbers.merging(part, numbers.planted())),
    ("METRICS 4, simulated", signatures.signatures),
    ("METRICS 4, a planted case for each reason", planted.planted),
    ("Causes, planted", causes.causes),
    ("Length, turns, probability and kinds of token, planted", causes.anatomies),
    ("METRICS 5, random responses", judging.verdicts),
)
"""No engine, no second process, no torch: some seconds."""
ANSWERS = 19
"""Of `tests.e2e.rollouts.roll_out`: two chats of three, four completions, two of n = 2, and
seven alone."""
STORED = "Cells, groups and feedback, planted"


def fast(root: Path) -> list[Row]:
    """The rows that `make test` runs; ``root``: a folder for a store."""
    found = [row for part, rows in FAST for row in _timed(part, rows)]
    return found + _timed(STORED, lambda part: cells.cells(part, root / "planted"))


def slow(root: Path) -> Iterator[Row]:
    """Everything that needs an engine, or processes of their own."""
    import torch

    from science import (
        cost,
        families,
        floors,
        handed_on,
        launched,
        replayed,
        rollouts,
        taught,
        trap,
    )

    torch.set_num_threads(1)
    yield from _timed("95 % intervals, simulated", numbers.coverage)
    yield from _timed("Routers of model families", families.routers)
    yield from _timed("Temperature trap", lambda part: trap.trap(part, root / "trap"))
    yield from _timed("Layouts", lambda part: launched.layouts(part, root))
    yield from _timed("Attached to a job", lambda part: launched.attached(part, root))
    found = list[rollouts.Rollouts]()

    def capture(part: str) -> Iterator[Row]:
        found.append(rollouts.capture(root))
        yield exactly(part, "answers recorded", len(found[0].traces), ANSWERS)

    yield from _timed("Capture, a real vLLM", capture)
    if not found:  # that row does not hold; what rests on the engine is not there
        return
    (made,) = found
    yield from _timed("Real scores", lambda part: rollouts.rows(part, made))
    yield from _timed("driftgate floor", lambda part: floors.floors(part, made.floors))
    yield from _timed("Routing replay", lambda part: replayed.replayed(part, made, root))
    yield from _timed("Workers of every backend", lambda part: taught.taught(part, made, root))
    yield from _timed("Exports", lambda part: handed_on.exports(part, made, root))
    yield from _timed("Two workers", lambda part: handed_on.two_workers(part, made, root))
    yield from _timed("What it costs", lambda part: cost.costs(part, root / "cost"))


def main() -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m science")
    parser.add_argument("--fast", action="store_true", help="only what needs no engine")
    parser.add_argument("--write", action="store_true", help="put the table into docs/science.md")
    options = parser.parse_args()
    if options.fast and options.write:
        parser.error("--write is of the whole table: leave out --fast")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="driftgate-science-") as folder:
        rows = fast(Path(folder))
        if not options.fast:
            rows += slow(Path(folder))
    print(f"\n{markdown(rows)}\n")
    failed = [row for row in rows if not row.holds]
    _say(f"{len(rows)} rows in {time.monotonic() - started:.0f} s")
    if options.write:
        DOCUMENT.write_text(section(rows))
    return 1 if failed else 0


def _timed(part: str, rows: Callable[[str], Iterator[Row]]) -> list[Row]:
    started, found = time.monotonic(), list[Row]()
    try:
        for row in rows(part):
            found.append(row)
    except Exception as error:  # a part that breaks off is a row that does not hold, and no more
        traceback.print_exc()
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        found.append(exactly(part, "comes to its end", said, "yes"))
    failed = [row for row in found if not row.holds]
    took = time.monotonic() - started
    _say(f"{part}: {len(found)} rows, {len(failed)} do not hold, {took:.1f} s")
    for row in failed:
        _say(f"  does not hold: {' | '.join(row.cells())}")
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

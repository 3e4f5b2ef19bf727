"""What the matrix shows beside its numbers: noise floors, replay, how much is scored. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from driftgate.floor import REPEAT
from driftgate.terminal import MISSING, number, percent
from driftgate.views import CellView, FloorView

__all__ = ["beside", "by_lag", "floor_name", "progress", "replay_measure"]


def progress(cell: CellView) -> Text:
    """Marked where numbers may still change."""
    text = Text(f"{cell.scored} of {cell.captured}")
    return text.append("  (partial)", "yellow") if cell.partial else text


def replay_measure(cell: CellView, name: str) -> Text:
    """What is left, and the share that routing replay removes, with its interval."""
    if cell.replay is None:
        return Text(MISSING)
    share = f"replay_removes_{name}"
    text = Text(number(cell.replay.measures.metrics.get(name)))
    text.append(f"  removes {percent(cell.replay.shares.metrics.get(share))}")
    if interval := cell.intervals.get(share):
        text.append(f" [{percent(interval.low)}, {percent(interval.high)}]", "dim")
    return text


def by_lag(cell: CellView, name: str) -> str:
    """A metric by policy lag, a line each; one lag has nothing to be told apart from."""
    if len(cell.by_lag) < 2:
        return MISSING
    return "\n".join(
        f"{lag.label}: {number(lag.measures.metrics.get(name) if lag.measures else None)}"
        f" ({lag.n_tokens:,} tokens)"
        for lag in cell.by_lag
    )


def floor_name(floor: FloorView) -> str:
    """Which side it is of and, where the second run was made in another way, how."""
    return floor.side if floor.label == REPEAT else f"{floor.side} {floor.label}"


def beside(floors: Sequence[tuple[str, str]]) -> str:
    """A line of (name, value) of each floor; nothing where none was measured."""
    if not floors:
        return ""
    return "\nfloor: " + ", ".join(f"{side} {value}" for side, value in floors)

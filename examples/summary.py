"""The demo's end: what storage holds, drawn and written down. Nothing here is counted elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from driftgate import render
from driftgate.gateway.answers import Answers
from driftgate.storage import Reader
from driftgate.trace import Engine, Trainer
from driftgate.views import CellView, WorstView

__all__ = ["finish", "pending", "summarise"]


def pending(store: Path, *, models: int) -> str:
    """In words, what is not scored yet; empty when all of it is, both noise floors included."""
    reader = Reader(store)
    try:
        counts, cells = reader.counts(), reader.cells()
    finally:
        reader.close()
    floors = sum(cell.kind == "noise_floor" for cell in cells)
    if counts.scored < counts.scorable or not counts.scorable:
        return f"{counts.scored} of {counts.scorable} answers scored"
    if floors < 2 * models:  # an engine's and a trainer's, for each model
        return f"{floors} of {2 * models} noise floors measured"
    return ""


def summarise(reader: Reader, elapsed_s: dict[str, float]) -> dict[str, Any]:
    """The content of ``summary.json``: counts and metrics from storage, seconds from the demo."""
    counts = reader.counts()
    cells = Answers(reader).cells().items
    worst = worst_of(cells)
    return {
        "trajectories": counts.trajectories,
        "steps": counts.steps,
        "choices": counts.traces,
        "complete": counts.complete,
        "scored": counts.scored,
        "cells": [_cell(cell) for cell in cells],
        "worst": worst
        and {
            "trajectory": reader.trace(worst.trace_id).meta.trajectory,
            "step": worst.step,
            "token_index": worst.token_index,
            "log_ratio": worst.log_ratio,
        },
        "elapsed_s": elapsed_s,
    }


def worst_of(cells: list[CellView]) -> WorstView | None:
    """The worst token of all drift cells."""
    found = [cell.worst for cell in cells if cell.kind == "drift" and cell.worst is not None]
    return max(found, key=lambda worst: abs(worst.log_ratio or 0.0), default=None)


def _cell(cell: CellView) -> dict[str, Any]:
    measures = cell.measures or cell.all_measures
    return {
        "engine": _side(cell.engine),
        "trainer": _side(cell.trainer),
        "model": cell.model,
        "kind": cell.kind,
        "comparable": cell.comparable,
        **(measures.metrics if measures else {}),
        **(cell.router.metrics if cell.router else {}),
    }


def _side(side: Engine | Trainer) -> str:
    name = side.name if isinstance(side, Engine) else side.backend
    return f"{name}:{side.digest}"


def finish(
    console: Console,
    store: Path,
    path: Path,
    elapsed_s: dict[str, float],
    *,
    svg: Path | None = None,
) -> None:
    """Write ``summary.json`` and show the matrix, the worst token and where to look next."""
    reader = Reader(store)
    try:
        summary = summarise(reader, elapsed_s)
        cells = Answers(reader).cells().items
    finally:
        reader.close()
    path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    console.print(
        f"\n[bold]{summary['trajectories']} trajectories[/], {summary['steps']} steps, "
        f"{summary['choices']} answers; {summary['complete']} trajectories complete, "
        f"{summary['scored']} answers scored, {elapsed_s['total']:.0f} s\n"
    )
    console.print(render.matrix(cells))
    worst = worst_of(cells)
    if worst is not None:
        trajectory = summary["worst"]["trajectory"]
        console.print(f"\n[bold]worst token of the worst trajectory[/]  {trajectory}")
        console.print(render.worst_in_context(worst))
        console.print("\n[bold]where to look next[/]")
        console.print(f"  driftgate show {trajectory} --step {worst.step} --store {store}")
        console.print(f"  driftgate cells --store {store}")
    console.print(f"  {path}")
    if svg is not None:
        picture = console.export_svg(title="make demo")
        # Rich links fonts from the network; the picture is right with any monospaced one.
        svg.write_text(re.sub(r"@font-face\s*\{[^}]*\}", "", picture))

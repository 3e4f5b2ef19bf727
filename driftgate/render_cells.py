"""Draws the matrix: engines against trainers, each value with what it is read against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.text import Text

from driftgate.codes import SEVERITY
from driftgate.colours import STYLES, VERDICTS, colour
from driftgate.fitted import Fitted
from driftgate.floor import label_of
from driftgate.render_beside import beside, by_lag, floor_name, progress, replay_measure
from driftgate.terminal import MISSING, number, percent, plain, quoted, safe, signed
from driftgate.trace import Engine, Trainer
from driftgate.views import CellView, WorstView

__all__ = ["matrix", "worst_token"]

STANDING = "tokens / responses / runs"
"""What stands behind a cell's values; few are runs, which the intervals are over."""

CELLS_PER_TABLE = 4
"""Columns of values that the eye takes in beside the names; fewer where the terminal is narrow."""

ROWS: tuple[tuple[str, str], ...] = (
    ("k3", "kl_k3_rollout_train"),
    ("mean |D|", "abs_log_ratio_mean"),
    ("p99 |D|", "abs_log_ratio_p99"),
    ("max |D|", "abs_log_ratio_max"),
    ("ess_kish_response", "ess_kish_response"),
    ("ess_kish_token", "ess_kish_token"),
    ("ess_kish_seq", "ess_kish_seq"),
    ("ess_inv_second_moment_seq", "ess_inv_second_moment_seq"),
)
"""What the matrix shows of METRICS 2: (label, name)."""

AGAINST_FLOOR = tuple(name for _, name in ROWS if not name.startswith("ess"))
"""Shown with the noise floor; effective sample sizes are 1 at a floor of 0."""

ROUTER_ROWS: tuple[tuple[str, str], ...] = (
    ("router set-disagree", "router_set_disagree_rate"),
    ("router expert-miss", "router_expert_miss_rate"),
    ("router zero-overlap", "router_zero_overlap_rate"),
)


REPLAY_ROWS: tuple[tuple[str, str], ...] = (
    ("k3 under replay", "kl_k3_rollout_train"),
    ("mean |D| under replay", "abs_log_ratio_mean"),
)
"""Drift that is left under the rollout's routes, and the share of it that is gone."""


def matrix(cells: Sequence[CellView]) -> RenderableType:
    """The cells side by side, each number with its interval and, beside it, the noise floor."""
    if not cells:
        return Text("Nothing is scored yet: start `driftgate teach --follow` beside the gateway.")
    drift = sorted((cell for cell in cells if cell.kind == "drift"), key=lambda cell: cell.model)
    floors = sorted((cell for cell in cells if cell.kind != "drift"), key=lambda cell: cell.model)
    tables: list[RenderableType] = [_Matrix(drift)]
    if floors:
        tables.append(_floor_table(floors))
    return Group(*tables, *_cell_reasons(drift), *_cell_notes(drift))


@dataclass(frozen=True, slots=True)
class _Matrix:
    """As many cells side by side as the terminal holds."""

    cells: Sequence[CellView]

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        for size in range(CELLS_PER_TABLE, 0, -1):
            groups = [self.cells[at : at + size] for at in range(0, len(self.cells), size)]
            tables = [_matrix_table(group) for group in groups]
            if size == 1 or all(table.fits(console, options) for table in tables):
                yield from tables
                return


def _matrix_table(cells: Sequence[CellView]) -> Fitted:
    head: list[list[RenderableType]] = [
        ["engine", *(_side(cell.engine, cell.engine_digest) for cell in cells)],
        ["trainer", *(_side(cell.trainer, cell.trainer_digest) for cell in cells)],
        [STANDING, *(_counts(cell) for cell in cells)],
        ["scored of captured", *(progress(cell) for cell in cells)],
        ["comparable", *(_comparable(cell) for cell in cells)],
    ]
    rows: list[list[RenderableType]] = [
        [label, *(_measure(cell, name) for cell in cells)] for label, name in ROWS
    ]
    if any(cell.router is not None for cell in cells):
        rows += [[label, *(_router_measure(c, name) for c in cells)] for label, name in ROUTER_ROWS]
    if any(cell.replay is not None for cell in cells):
        rows += [[label, *(replay_measure(c, name) for c in cells)] for label, name in REPLAY_ROWS]
    if any(len(cell.by_lag) > 1 for cell in cells):
        rows.append(["mean |D| by lag", *(by_lag(cell, "abs_log_ratio_mean") for cell in cells)])
    rows.append(["worst token", *(worst_token(cell.worst) for cell in cells)])
    return Fitted(
        title="rollout engine × trainer",
        columns=[("", "left"), *((safe(cell.model), "left") for cell in cells)],
        rows=[*head, *rows],
        head_rows=len(head),
    )


def _floor_table(cells: Sequence[CellView]) -> Fitted:
    """Each side against itself; what drift is read against."""
    names = ("model", "side", "second run", STANDING, "k3", "mean |D|", "max |D|", "router")
    rows: list[list[RenderableType]] = []
    for cell in cells:
        metrics = cell.measures.metrics if cell.measures else {}
        router = cell.router.metrics if cell.router else {}
        rows.append(
            [
                plain(cell.model),
                _side(cell.engine, cell.engine_digest),
                label_of(cell.trainer),
                _counts(cell),
                *(number(metrics.get(name)) for name in AGAINST_FLOOR if "p99" not in name),
                percent(router.get("router_set_disagree_rate")),
            ]
        )
    return Fitted(
        title="noise floor: the same side twice",
        columns=[(name, "left") for name in names],
        rows=rows,
        spare=["second run"],
    )


def _side(side: Engine | Trainer, digest: str) -> Text:
    if isinstance(side, Engine):
        return plain(f"{side.name} {side.version}\n{digest}")
    return plain(f"{side.backend} {side.dtype} ×{side.world_size}\n{digest}")


def _counts(cell: CellView) -> str:
    few = " (few)" if cell.few else ""
    return f"{cell.n_tokens:,} / {cell.n_seqs:,} / {cell.trajectories:,}{few}"


def _comparable(cell: CellView) -> Text:
    text = Text()
    for verdict, style in VERDICTS.items():
        if count := cell.comparable.get(verdict, 0):
            text.append(f"{verdict} {count}  ", style)
    if cell.verdict != "yes":
        text.append(f"\nmerged: {cell.verdict}", VERDICTS[cell.verdict])
    return text


def _measure(cell: CellView, name: str) -> Text:
    shown = cell.measures or cell.all_measures
    text = Text(number(shown.metrics.get(name) if shown else None), STYLES[colour(cell)])
    if interval := cell.intervals.get(name):
        text.append(f" [{number(interval.low)}, {number(interval.high)}]", "dim")
    if name in AGAINST_FLOOR:
        floors = [(floor_name(f), number(f.measures.metrics.get(name))) for f in cell.floors]
        text.append(beside(floors), "dim")
    return text


def _router_measure(cell: CellView, name: str) -> Text:
    if cell.router is None:
        return Text(MISSING)
    text = Text(percent(cell.router.metrics.get(name)), STYLES[colour(cell)])
    if interval := cell.intervals.get(name):
        text.append(f" [{percent(interval.low)}, {percent(interval.high)}]", "dim")
    routers = [
        (floor_name(floor), floor.router) for floor in cell.floors if floor.router is not None
    ]
    floors = [(side, percent(router.metrics.get(name))) for side, router in routers]
    text.append(beside(floors), "dim")
    return text


def worst_token(worst: WorstView | None) -> Text:
    if worst is None:
        return Text(MISSING)
    return Text(f"{quoted(worst.token_id, worst.text)} {signed(worst.log_ratio)}")


def _cell_reasons(cells: Sequence[CellView]) -> Iterator[Text]:
    """What makes scores not comparable, or comparable only under a transform."""
    for cell in cells:
        for reason in cell.reasons:
            if SEVERITY.get(reason.code) != "note":
                line = Text("! ", "yellow").append(reason.code, "bold")
                scores = f"{reason.scores} of {cell.scored} scores of {cell.model}"
                yield line.append(safe(f": {reason.meaning} ({scores})"), "default")
        for finding in cell.findings:
            if SEVERITY.get(finding.code) != "note":
                line = Text("! merged: ", "red").append(finding.code, "bold")
                yield line.append(safe(f": {finding.detail}. {finding.fix}"), "default")


def _cell_notes(cells: Sequence[CellView]) -> Iterator[Text]:
    """What is worth knowing and changes no verdict, in one line."""
    counts: Counter[str] = Counter()
    for cell in cells:
        counts.update({r.code: r.scores for r in cell.reasons if SEVERITY.get(r.code) == "note"})
    if counts:
        listed = ", ".join(f"{code} {count}" for code, count in sorted(counts.items()))
        yield Text(f"notes (scores): {listed}", "dim")

"""Draws the API's answers for a terminal: values in, Rich renderables out, nothing printed here.

Colour says the band of METRICS 2, and only where the comparison is valid: a score that is not
comparable is grey however small its numbers are, and a bucket with bad tokens is never green.
Numbers without a value are drawn as ``–``, never as 0.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from driftgate.bands import Colour, band, slack_of
from driftgate.codes import SEVERITY
from driftgate.floor import label_of
from driftgate.render_beside import beside, by_lag, floor_name, progress, replay_measure
from driftgate.terminal import MISSING, number, percent, plain, safe, signed
from driftgate.trace import Engine, Reason, Trainer
from driftgate.views import (
    CellView,
    DriftEvent,
    MismatchView,
    ScoreView,
    StepDetail,
    TokenView,
    TrajectoryDetail,
    WorstView,
)

__all__ = [
    "colour",
    "drift_line",
    "matrix",
    "mismatch",
    "number",
    "step",
    "trajectory",
    "worst_in_context",
]

STYLES: dict[Colour | None, str] = {
    "green": "green",
    "amber": "yellow",
    "red": "bold red",
    None: "bright_black",
}

VERDICTS = {"yes": "green", "converted": "yellow", "no": "red"}

ORDER: tuple[Colour, ...] = ("green", "amber", "red")

GATED = ("kl_k3_rollout_train", "abs_log_ratio_mean", "extreme_frac_tau2")
"""Metrics whose bands colour a line; a router's set-disagree is the fourth."""

CELLS_PER_TABLE = 4
"""Columns of values that fit a terminal of 120 characters beside the names."""

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


def colour(item: ScoreView | CellView) -> Colour | None:
    """The worst band of the gated metrics; None where no valid comparison stands behind them."""
    if isinstance(item, ScoreView) and item.comparable.verdict == "no":
        return None
    if item.measures is None:
        return None
    values = item.measures.metrics
    bad = int(values.get("n_bad_tokens") or 0)
    slack = slack_of(item.engine, routed=item.router is not None)
    found = [band(name, values.get(name), n_bad_tokens=bad, slack=slack) for name in GATED]
    if item.router is not None:
        name = "router_set_disagree_rate"
        found.append(band(name, item.router.metrics.get(name)))
    return max((level for level in found if level), key=ORDER.index, default=None)


def drift_line(event: DriftEvent) -> Text:
    """One line for one scored step: where, how much, how far, is it valid, which token."""
    score = event.score
    style = STYLES[colour(score)]
    metrics = score.measures.metrics if score.measures else {}
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append("● ", style)
    line.append(safe(score.trajectory), "bold").append(f" {score.step}.{score.choice}")
    if score.kind == "noise_floor":
        line.append("  noise floor", "cyan")
    line.append(f"  n={number(metrics.get('n_tokens'))}")
    for label, name in (
        ("k3", "kl_k3_rollout_train"),
        ("mean|D|", "abs_log_ratio_mean"),
        ("max|D|", "abs_log_ratio_max"),
    ):
        line.append(f"  {label} ").append(number(metrics.get(name)), style)
    line.append("  comparable ").append(_verdict(score), _verdict_style(score))
    if score.router is not None:
        disagree = score.router.metrics.get("router_set_disagree_rate")
        line.append("  router ").append(percent(disagree))
    if score.replay is not None:
        removed = score.replay.shares.metrics.get("replay_removes_abs_log_ratio_mean")
        line.append("  replay removes ").append(percent(removed))
    if score.worst is not None:
        line.append("  worst ").append(_quoted(score.worst), "reverse")
        line.append(f" {signed(score.worst.log_ratio)}")
    return line


def _verdict(score: ScoreView) -> str:
    codes = ", ".join(
        reason.code for reason in score.comparable.reasons if SEVERITY.get(reason.code) != "note"
    )
    return f"{score.comparable.verdict} ({codes})" if codes else score.comparable.verdict


def _verdict_style(score: ScoreView) -> str:
    return VERDICTS[score.comparable.verdict]


def _quoted(worst: WorstView) -> str:
    """The token as a JSON string, so that blanks and line ends are seen; its id without a text."""
    if worst.text is None:
        return f"⟨{worst.token_id}⟩"
    return safe(json.dumps(worst.text, ensure_ascii=False))


def matrix(cells: Sequence[CellView]) -> RenderableType:
    """The cells side by side, each number with its interval and, beside it, the noise floor."""
    if not cells:
        return Text("Nothing is scored yet: start `driftgate teach --follow` beside the gateway.")
    drift = sorted((cell for cell in cells if cell.kind == "drift"), key=lambda cell: cell.model)
    floors = sorted((cell for cell in cells if cell.kind != "drift"), key=lambda cell: cell.model)
    groups = [drift[at : at + CELLS_PER_TABLE] for at in range(0, len(drift), CELLS_PER_TABLE)]
    tables = [_matrix_table(group) for group in groups]
    if floors:
        tables.append(_floor_table(floors))
    return Group(*tables, *_cell_reasons(drift), *_cell_notes(drift))


def _matrix_table(cells: Sequence[CellView]) -> Table:
    table = Table(title="rollout engine × trainer", title_justify="left", pad_edge=False)
    table.add_column("")
    for cell in cells:
        table.add_column(plain(cell.model))
    table.add_row("engine", *(_side(cell.engine, cell.engine_digest) for cell in cells))
    table.add_row("trainer", *(_side(cell.trainer, cell.trainer_digest) for cell in cells))
    table.add_row("tokens / responses", *(_counts(cell) for cell in cells))
    table.add_row("scored of captured", *(progress(cell) for cell in cells))
    table.add_row("comparable", *(_comparable(cell) for cell in cells), end_section=True)
    for label, name in ROWS:
        table.add_row(label, *(_measure(cell, name) for cell in cells))
    if any(cell.router is not None for cell in cells):
        for label, name in ROUTER_ROWS:
            table.add_row(label, *(_router_measure(cell, name) for cell in cells))
    if any(cell.replay is not None for cell in cells):
        for label, name in REPLAY_ROWS:
            table.add_row(label, *(replay_measure(cell, name) for cell in cells))
    if any(len(cell.by_lag) > 1 for cell in cells):
        table.add_row("mean |D| by lag", *(by_lag(cell, "abs_log_ratio_mean") for cell in cells))
    table.add_row("worst token", *(_worst_cell(cell.worst) for cell in cells))
    return table


def _floor_table(cells: Sequence[CellView]) -> Table:
    """Each side against itself; what drift is read against."""
    table = Table(title="noise floor: the same side twice", title_justify="left", pad_edge=False)
    for name in (
        "model",
        "side",
        "second run",
        "tokens / responses",
        "k3",
        "mean |D|",
        "max |D|",
        "router",
    ):
        table.add_column(name)
    for cell in cells:
        metrics = cell.measures.metrics if cell.measures else {}
        router = cell.router.metrics if cell.router else {}
        table.add_row(
            plain(cell.model),
            _side(cell.engine, cell.engine_digest),
            label_of(cell.trainer),
            _counts(cell),
            *(number(metrics.get(name)) for name in AGAINST_FLOOR if "p99" not in name),
            percent(router.get("router_set_disagree_rate")),
        )
    return table


def _side(side: Engine | Trainer, digest: str) -> Text:
    if isinstance(side, Engine):
        return plain(f"{side.name} {side.version}\n{digest}")
    return plain(f"{side.backend} {side.dtype} ×{side.world_size}\n{digest}")


def _counts(cell: CellView) -> str:
    few = "  (few)" if cell.few else ""
    return f"{cell.n_tokens:,} / {cell.n_seqs:,}{few}"


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


def _worst_cell(worst: WorstView | None) -> Text:
    if worst is None:
        return Text(MISSING)
    return Text(f"{_quoted(worst)} {signed(worst.log_ratio)}")


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


def _reason(reason: Reason) -> Text:
    line = Text("! ", "yellow").append(reason.code, "bold")
    return line.append(f": {reason.detail}. {reason.fix}", "default")


def mismatch(found: MismatchView) -> RenderableType:
    """A trajectory's cells, each with its worst token in its text."""
    cells = [cell.whole for cell in found.cells]
    if not cells:
        return Text("Not scored yet.")
    worst = [worst_in_context(cell.worst) for cell in cells if cell.worst is not None]
    return Group(matrix(cells), *worst)


def worst_in_context(worst: WorstView) -> Text:
    """The worst token highlighted in the text around it, and both sides' log-probabilities."""
    text = Text()
    text.append(f"step {worst.step}, choice {worst.choice}, token {worst.token_index}", "bold")
    text.append(
        f"  engine {number(worst.rollout_logprob)}  trainer {number(worst.train_logprob)}"
        f"  D {signed(worst.log_ratio)}\n"
    )
    text.append(safe(worst.before), "dim")
    text.append(safe(worst.text or f"⟨{worst.token_id}⟩"), "reverse bold")
    return text.append(safe(worst.after), "dim")


def trajectory(detail: TrajectoryDetail) -> RenderableType:
    """An agent run: one row per answer, then what is not there."""
    item = detail.trajectory
    head = Text(safe(item.trajectory), "bold")
    head.append(f"  {safe(', '.join(item.models))}  {item.steps} steps, {item.choices} choices, ")
    head.append("complete" if item.complete else "INCOMPLETE_CAPTURE", _whole(item.complete))
    head.append(f", {item.scored} of {item.captured} scored")
    if detail.reward is not None:
        head.append(f", reward {detail.reward.value:g}")
    table = Table(pad_edge=False)
    for column in ("step", "prompt", "sampled", "finish", "routes", "k3", "mean|D|", "max|D|"):
        table.add_column(column, justify="left" if column == "finish" else "right")
    for column in ("comparable", "worst"):
        table.add_column(column)
    for row in detail.steps:
        for choice in row.choices:
            table.add_row(
                f"{row.step}.{choice.meta.choice}",
                number(choice.prompt_len),
                number(choice.response_len),
                plain(choice.meta.finish_reason or MISSING),
                choice.meta.routes_via if choice.has_routes else MISSING,
                *_score_columns(choice.scores),
            )
    return Group(head, table, *(Text(safe(f"! {gap}"), "yellow") for gap in item.gaps))


def _score_columns(scores: Sequence[ScoreView]) -> list[RenderableType]:
    drift = [score for score in scores if score.kind == "drift" and score.measures]
    if not drift:
        return [MISSING] * 5
    last = max(drift, key=lambda score: (score.comparable.verdict != "no", score.scored_ns))
    assert last.measures is not None
    names = ("kl_k3_rollout_train", "abs_log_ratio_mean", "abs_log_ratio_max")
    values = [Text(number(last.measures.metrics.get(name)), STYLES[colour(last)]) for name in names]
    verdict = Text(_verdict(last), _verdict_style(last))
    return [*values, verdict, _worst_cell(last.worst)]


def _whole(complete: bool) -> str:
    return "green" if complete else "red"


def step(detail: StepDetail) -> RenderableType:
    """A step in full: each choice's request, tokens coloured by |D|, verdict and worst token."""
    parts: list[RenderableType] = []
    for choice in detail.choices:
        meta = choice.meta
        parts.append(Text(safe(f"{detail.trajectory} {detail.step}.{meta.choice}"), "bold"))
        parts.append(plain(msgspec.json.format(bytes(choice.request), indent=2).decode()))
        parts.append(_tokens(choice.tokens))
        parts.extend(Text(safe(f"! {missing}"), "yellow") for missing in meta.missing)
        if choice.score is not None:
            parts.extend(_reason(reason) for reason in choice.score.comparable.reasons)
            if choice.score.worst is not None:
                parts.append(worst_in_context(choice.score.worst))
    return Group(*parts)


def _tokens(tokens: Sequence[TokenView]) -> Text:
    """The sampled text; a token's colour is the band of its |D| on the scale of mean |D|."""
    text = Text()
    for token in tokens:
        distance = None if token.log_ratio is None else abs(token.log_ratio)
        style = "" if distance is None else STYLES[band("abs_log_ratio_mean", distance)]
        text.append(safe(f"⟨{token.token_id}⟩" if token.text is None else token.text), style)
    return text

"""Draws the API's answers for a terminal: values in, Rich renderables out, nothing printed here.

Colour says the band of METRICS 2, and only where the comparison is valid: a score that is not
comparable is grey however small its numbers are, and a bucket with bad tokens is never green.
Numbers without a value are drawn as ``–``, never as 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.console import Group, JustifyMethod, RenderableType
from rich.text import Text

from driftgate.bands import band
from driftgate.codes import SEVERITY
from driftgate.colours import STYLES, VERDICTS, colour
from driftgate.fitted import Fitted
from driftgate.render_cells import matrix, worst_token
from driftgate.terminal import MISSING, number, percent, plain, quoted, safe, signed
from driftgate.trace import Reason
from driftgate.views import (
    ChoiceView,
    DriftEvent,
    MismatchView,
    ScoreView,
    StepDetail,
    TokenView,
    TrajectoryDetail,
    WorstView,
)
from driftgate.words import counted

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
        line.append("  worst ").append(quoted(score.worst.token_id, score.worst.text), "reverse")
        line.append(f" {signed(score.worst.log_ratio)}")
    return line


def _verdict(score: ScoreView) -> str:
    codes = ", ".join(
        reason.code for reason in score.comparable.reasons if SEVERITY.get(reason.code) != "note"
    )
    return f"{score.comparable.verdict} ({codes})" if codes else score.comparable.verdict


def _verdict_style(score: ScoreView) -> str:
    return VERDICTS[score.comparable.verdict]


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
    steps, choices = counted(item.steps, "step"), counted(item.choices, "choice")
    head.append(f"  {safe(', '.join(item.models))}  {steps}, {choices}, ")
    head.append("complete" if item.complete else "INCOMPLETE_CAPTURE", _whole(item.complete))
    head.append(f", {item.scored} of {item.captured} scored")
    if detail.reward is not None:
        head.append(f", reward {detail.reward.value:g}")
    table = Fitted(
        columns=ANSWER_COLUMNS,
        rows=[_answer_row(row.step, choice) for row in detail.steps for choice in row.choices],
        spare=["routes", "finish", "prompt", "worst", "sampled", "max|D|", "comparable"],
    )
    return Group(head, table, *(Text(safe(f"! {gap}"), "yellow") for gap in item.gaps))


ANSWER_COLUMNS: tuple[tuple[str, JustifyMethod], ...] = (
    ("step", "right"),
    ("prompt", "right"),
    ("sampled", "right"),
    ("finish", "left"),
    ("routes", "right"),
    ("k3", "right"),
    ("mean|D|", "right"),
    ("max|D|", "right"),
    ("comparable", "left"),
    ("worst", "left"),
)


def _answer_row(step: int, choice: ChoiceView) -> list[RenderableType]:
    return [
        f"{step}.{choice.meta.choice}",
        number(choice.prompt_len),
        number(choice.response_len),
        plain(choice.meta.finish_reason or MISSING),
        choice.meta.routes_via if choice.has_routes else MISSING,
        *_score_columns(choice.scores),
    ]


def _score_columns(scores: Sequence[ScoreView]) -> list[RenderableType]:
    drift = [score for score in scores if score.kind == "drift" and score.measures]
    if not drift:
        return [MISSING] * 5
    last = max(drift, key=lambda score: (score.comparable.verdict != "no", score.scored_ns))
    assert last.measures is not None
    names = ("kl_k3_rollout_train", "abs_log_ratio_mean", "abs_log_ratio_max")
    values = [Text(number(last.measures.metrics.get(name)), STYLES[colour(last)]) for name in names]
    verdict = Text(_verdict(last), _verdict_style(last))
    return [*values, verdict, worst_token(last.worst)]


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

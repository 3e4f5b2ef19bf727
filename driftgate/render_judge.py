"""Draws explanations and verdicts for a terminal: values in, Rich renderables out.

A number without a value is ``–``; a verdict that was not given is drawn with its reason, never as
a pass. The profile is always named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from driftgate.anatomy import Growth, Place, Slice
from driftgate.explain import Explanation, TrajectoryExplanation
from driftgate.fitted import Fitted
from driftgate.judgements import Feedback, TrajectoryVerdicts
from driftgate.profiles import Tier
from driftgate.terminal import MISSING, number, percent, plain, safe, signed
from driftgate.verdict import Brief, Verdict
from driftgate.words import listed

__all__ = ["explanation", "feedback", "verdicts"]

TIER_STYLES: dict[Tier | None, str] = {
    "train": "green",
    "train_with_correction": "yellow",
    "replay": "yellow",
    "quarantine": "bold red",
    None: "bright_black",
}

FOUND_STYLES = {
    "measured": "bold",
    "inferred": "bold",
    "suspected": "yellow",
    "absent": "dim",
    "untested": "dim",
}


def verdicts(found: TrajectoryVerdicts) -> RenderableType:
    """Each verdict with its reasons and gates, then the prompt group."""
    parts: list[RenderableType] = []
    for item in found.items:
        pair = f"engine {item.engine_digest or MISSING}  trainer {item.trainer_digest or MISSING}"
        versions = ", ".join(item.weight_versions) or MISSING
        head = Text(safe(found.trajectory), "bold")
        head.append(f"  {safe(item.model or MISSING)}  {pair}  weights {safe(versions)}", "default")
        head.append(f"  {item.scored} of {item.captured} scored, {item.n_tokens:,} tokens")
        parts += [head, *_verdict(item.verdict), *_gates(item.verdict)]
    for group in found.groups:
        of = f" of {group.of}" if group.of > len(group.members) else ""
        head = Text(f"prompt group of {len(group.members)}{of}", "bold")
        head.append(f"  trainer {group.trainer_digest}", "default")
        head.append(f"  ess_kish_trajectory {number(group.ess_kish_trajectory)}")
        parts += [head, *_verdict(group.verdict)]
        for member in group.members:
            line = Text("  ").append(safe(member.trajectory)).append("  ")
            parts.append(line.append_text(_brief(member.verdict)))
    return Group(*parts)


def _verdict(verdict: Verdict) -> Iterator[RenderableType]:
    line = Text("  ").append(verdict.verdict or "no verdict", TIER_STYLES[verdict.verdict])
    line.append(f"  under profile {verdict.profile.name}")
    if verdict.why_null:
        line.append(safe(f": {verdict.why_null}"))
    yield line
    for reason in verdict.reasons:
        text = Text("  ! ", TIER_STYLES[reason.verdict]).append(reason.code, "bold")
        text.append(f" → {reason.verdict}: ", "default")
        yield text.append(safe(f"{reason.detail}. {reason.fix}"))
    measured = ", ".join(f"{name} {number(value)}" for name, value in verdict.measured.items())
    yield Text(f"  measured: {measured}", "dim")
    for name, why in verdict.undefined.items():
        yield Text(safe(f"  not tested: {name}: {why}"), "dim")


def _gates(verdict: Verdict) -> Iterator[RenderableType]:
    caught = [share for share in verdict.gates if share.share]
    if not verdict.gates:
        return
    if not caught:
        yield Text("  no trainer's gate would touch it", "dim")
        return
    table = Table(title="trainers' own gates", title_justify="left", pad_edge=False)
    for column in ("gate", "share", "of", "in force", "rule"):
        table.add_column(column)
    for share in caught:
        gate = share.gate
        table.add_row(gate.metric, percent(share.share), gate.of, gate.on, gate.rule)
    yield table


def _brief(brief: Brief) -> Text:
    text = Text(brief.verdict or "no verdict", TIER_STYLES[brief.verdict])
    return text.append(safe(f"  {', '.join(brief.codes) or brief.why_null or ''}"), "default")


def explanation(found: TrajectoryExplanation) -> RenderableType:
    """The causes with their shares, then where the drift sits."""
    if not found.items:
        return Text(safe(f"{found.trajectory}: nothing to explain: {found.why_empty}"))
    parts: list[RenderableType] = []
    for item in found.items:
        parts.append(_head(found.trajectory, item))
        parts += _set_aside(item)
        if not item.n_responses:
            continue
        parts.append(_causes(item))
        parts.append(_growth(item.growth))
        for title, slices in (
            ("step", item.by_step),
            ("position in the context", item.by_position),
            ("engine's probability", item.by_probability),
            ("kind of token", item.by_class),
        ):
            if slices:
                parts.append(_slices(title, slices))
        parts += [Text(safe(f"cannot be told: {note}"), "dim") for note in item.class_notes]
        parts.append(_place("first ratio outside [1/2, 2]", item.first_divergent))
        parts.append(_place("worst token", item.worst))
    return Group(*parts)


def _head(trajectory: str, item: Explanation) -> Text:
    head = Text(safe(trajectory), "bold")
    pair = f"engine {item.engine_digest}  trainer {item.trainer_digest}"
    head.append(f"  {safe(item.model)}  {pair}", "default")
    head.append(f"  {item.scored} of {item.captured} scored, {item.n_tokens:,} tokens")
    head.append(f"  mean|D| {number(item.abs_log_ratio_mean)}")
    head.append(f"  floor {number(item.noise_floor)}")
    return head.append("  comparable " + ", ".join(f"{k} {v}" for k, v in item.comparable.items()))


def _set_aside(item: Explanation) -> Iterator[RenderableType]:
    """What no number below is of, and why."""
    for aside in item.set_aside:
        text = Text("  set aside: ").append(safe(aside.code), "bold yellow")
        text.append(
            f": {number(aside.tokens)} tokens, {percent(aside.share_of_tokens)} of all and "
            f"{percent(aside.share_of_drift)} of all |D|, step {listed(aside.steps)}: "
        )
        yield text.append(safe(f"{aside.detail}. {aside.fix}"))
    if item.left_out_responses:
        yield Text(
            f"  a long run: {item.n_responses:,} answers evenly over it were read; "
            f"{item.left_out_responses:,} with {item.left_out_tokens:,} tokens were not. First and "
            "worst token are of all",
            "dim",
        )
    if item.unreadable_responses:
        yield Text(f"  not readable: {item.unreadable_responses} answers", "yellow")
    if not item.n_responses:
        yield Text("  no comparable token: there is nothing to look for causes in")


def _causes(item: Explanation) -> Table:
    table = Table(
        title="shares of mean|D| of the comparable tokens", title_justify="left", pad_edge=False
    )
    for column in ("cause", "share", "found", "what was seen", "what to do"):
        table.add_column(column)
    for cause in item.causes:
        style = FOUND_STYLES[cause.found]
        table.add_row(
            Text(cause.name, style),
            Text(percent(cause.share), style),
            cause.found,
            plain(cause.detail),
            plain("" if cause.found == "absent" else cause.fix),
        )
    table.caption = item.method
    return table


def _growth(growth: Growth) -> Text:
    if growth.exponent is None:
        return Text(f"growth with length: {MISSING} ({growth.why_null})", "dim")
    text = Text(f"growth with length: std of summed D ~ T^{growth.exponent:.2f}")
    if growth.exponent_if_independent is not None:
        low, high = growth.exponent_if_independent
        text.append(f" (in random order {low:.2f} to {high:.2f})")
        text.append(": it compounds" if growth.compounds else ": no compounding", "bold")
    if growth.bias_exceeds_noise_after is not None:
        after = max(1, round(growth.bias_exceeds_noise_after))
        text.append(f"; a bias of {signed(growth.bias_per_token)} nats a token ")
        text.append(f"exceeds the noise after {after:,} tokens")
    return text


def _slices(title: str, slices: Sequence[Slice]) -> Table:
    table = Table(pad_edge=False)
    table.add_column(title)
    for column in ("tokens", "mean|D|", "mean D", "mean|Δp|", "of tokens", "of drift"):
        table.add_column(column, justify="right")
    for part in slices:
        table.add_row(
            plain(part.label),
            number(part.n_tokens),
            number(part.abs_log_ratio_mean),
            number(part.log_ratio_mean),
            number(part.prob_abs_diff_mean),
            percent(part.share_of_tokens),
            percent(part.share_of_drift),
        )
    return table


def _place(title: str, place: Place | None) -> Text:
    if place is None:
        return Text(f"{title}: none", "dim")
    said = (
        f"⟨{place.token_id}⟩" if place.text is None else json.dumps(place.text, ensure_ascii=False)
    )
    text = Text(f"{title}: step {place.step}, choice {place.choice}, token {place.token_index} ")
    text.append(safe(said), "reverse")
    return text.append(
        f" ({place.token_class})  engine {number(place.rollout_logprob)}"
        f"  trainer {number(place.train_logprob)}  D {signed(place.log_ratio)}",
        "default",
    )


def feedback(found: Feedback) -> RenderableType:
    """One row for each engine, trainer and weight version."""
    title = (
        f"verdicts on the newest {found.trajectories} of {found.of} trajectories, "
        f"profile {found.profile.name}"
    )
    names = ("model", "engine", "trainer", "weights", "runs", *TIER_STYLES)
    rows: list[list[RenderableType]] = [
        [
            plain(row.model),
            row.engine_digest,
            row.trainer_digest or MISSING,
            plain(row.weight_version),
            number(row.trajectories),
            *(
                Text(number(row.verdicts.get(tier or "null", 0)), style)
                for tier, style in TIER_STYLES.items()
            ),
            number(row.kl_k3_rollout_train),
            number(row.abs_log_ratio_mean),
            ", ".join(f"{code} {count}" for code, count in row.codes.items()),
        ]
        for row in found.items
    ]
    columns = [name or "none yet" for name in (*names, "k3", "mean|D|", "reasons")]
    return Fitted(title=title, columns=[(name, "left") for name in columns], rows=rows)

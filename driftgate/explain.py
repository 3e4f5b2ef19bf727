"""Why trainer and engine differ on one run: causes with their shares, and where the drift sits.

Pure: scored responses in, an explanation out. Answers that are not comparable are set aside first,
by the reason that says so, with their share of all tokens and of all drift: their numbers accuse
nobody. Causes are of what is left. Those of `driftgate.causes` are undone one after the other; the
share of each is how much the sum of |D| over the comparable tokens falls when it is, so that they
add to 1 with what is left, ``unexplained``. What one cause took, the next cannot take again: where
two are entangled, the earlier one has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from driftgate import anatomy
from driftgate.anatomy import Growth, Place, Response, Slice
from driftgate.baseline import Floor, Run
from driftgate.causes import CAUSES, Found
from driftgate.trace import Reason, ScoreMeta

__all__ = [
    "METHOD",
    "Cause",
    "CauseName",
    "Explanation",
    "Refusal",
    "SetAside",
    "TrajectoryExplanation",
    "explain",
]

F64 = npt.NDArray[np.float64]

CauseName = Literal["transform", "template", "stale_weights", "routing", "precision", "unexplained"]

METHOD = (
    "of the comparable tokens: causes are undone in this order; a share is the fall of sum|D| when "
    "its cause is undone, over sum|D| at the start, so shares add to 1; one that cannot be "
    "measured has share 0, and its drift stays unexplained"
)


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """One possible cause and its part of the drift."""

    name: CauseName
    share: float
    """Of the sum of |D|; 0 unless ``found`` is measured or inferred."""
    found: Found
    detail: str
    evidence: dict[str, float | int | str | None] = {}
    fix: str


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A scored answer that is not comparable."""

    step: int
    reason: Reason
    """The first that says so."""
    tokens: int
    """Sampled ones."""
    sum_abs: float
    """nats, over those that could be subtracted at all."""


class SetAside(msgspec.Struct, frozen=True, kw_only=True):
    """The answers that one reason makes not comparable: no cause is looked for in them."""

    code: str
    """Of `driftgate.codes`, such as ``grammar_masked``."""
    detail: str
    """What was seen, in the first of them."""
    fix: str
    responses: int
    steps: list[int]
    tokens: int
    share_of_tokens: float
    """Of the scored answers' sampled tokens."""
    share_of_drift: float | None
    """Of their sum of |D|, comparable or not; null where that is 0."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """One run under one engine and one trainer."""

    model: str
    engine_digest: str
    trainer_digest: str
    captured: int
    """Traces of this engine in the run."""
    scored: int
    """Of those, by this trainer."""
    n_tokens: int
    """Comparable ones that were read: the numbers below are of these."""
    n_responses: int
    set_aside: list[SetAside]
    """What is not comparable, by reason; most tokens first."""
    left_out_responses: int
    """Comparable ones that were not read: of a long run, answers evenly over it are."""
    left_out_tokens: int
    unreadable_responses: int
    """Scored ones whose trace is lost or damaged."""
    comparable: dict[str, int]
    """Scores by their verdict: ``yes``, ``converted``, ``no``; what only the whole cell refutes is
    ``no`` here."""
    abs_log_ratio_mean: float | None
    """nats; null without a comparable token."""
    noise_floor: float | None
    """mean|D| of the noisier side against itself; null where it was not measured."""
    causes: list[Cause]
    """In the order that they are undone, ``unexplained`` last; none without a comparable token."""
    method: str
    growth: Growth
    by_step: list[Slice]
    by_position: list[Slice]
    by_probability: list[Slice]
    by_class: list[Slice]
    class_notes: list[str]
    """What cannot be told about the tokens' classes."""
    first_divergent: Place | None
    """The first token whose ratio leaves [1/2, 2]; null where none does."""
    worst: Place | None


class TrajectoryExplanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why the sides differ on one trajectory."""

    trajectory: str
    items: list[Explanation]
    """One for each (engine, trainer)."""
    why_empty: str | None = None


def explain(
    responses: Sequence[Response],
    *,
    sides: ScoreMeta,
    captured: int,
    comparable: Mapping[str, int],
    refusals: Sequence[Refusal] = (),
    floor: Floor | None = None,
    left_out: Sequence[int] = (),
    unreadable: int = 0,
) -> Explanation:
    """The explanation of one run under one engine and one trainer.

    ``responses``: comparable ones that were read. ``sides``: any score of the run. ``captured``:
    traces of the engine in it. ``comparable``: scores by verdict. ``left_out``: tokens of each
    comparable response that was not read.
    """
    ordered = sorted(responses, key=lambda r: (r.trace.step, r.trace.started_ns, r.trace.choice))
    d = np.concatenate([response.d for response in ordered] or [np.zeros(0)])
    return Explanation(
        model=sides.model,
        engine_digest=sides.engine.digest,
        trainer_digest=sides.trainer.digest,
        captured=captured,
        scored=sum(comparable.values()),
        n_tokens=d.size,
        n_responses=len(ordered),
        set_aside=_set_aside(refusals, d, sum(left_out)),
        left_out_responses=len(left_out),
        left_out_tokens=sum(left_out),
        unreadable_responses=unreadable,
        comparable=dict(comparable),
        abs_log_ratio_mean=float(np.abs(d).mean()) if d.size else None,
        noise_floor=floor.abs_log_ratio_mean if floor else None,
        causes=attribute(Run(ordered, floor)) if ordered else [],
        method=METHOD,
        growth=anatomy.growth(ordered),
        by_step=anatomy.by_step(ordered),
        by_position=anatomy.by_position(ordered),
        by_probability=anatomy.by_probability(ordered),
        by_class=anatomy.by_class(ordered),
        class_notes=list(dict.fromkeys(note for r in ordered for note in r.notes)),
        first_divergent=anatomy.first_divergent(ordered),
        worst=anatomy.worst(ordered),
    )


def _set_aside(refusals: Sequence[Refusal], d: F64, unread: int) -> list[SetAside]:
    """``d``: [n] nats of the comparable tokens, ``unread`` others of which are not known here and
    drift as these do."""
    drift = float(np.abs(d).sum()) * (1.0 + unread / d.size if d.size else 1.0)
    tokens = d.size + unread + sum(refusal.tokens for refusal in refusals)
    drift += sum(refusal.sum_abs for refusal in refusals)
    codes: dict[str, list[Refusal]] = {}
    for refusal in refusals:
        codes.setdefault(refusal.reason.code, []).append(refusal)
    out = [
        SetAside(
            code=code,
            detail=found[0].reason.detail,
            fix=found[0].reason.fix,
            responses=len(found),
            steps=sorted({one.step for one in found}),
            tokens=(count := sum(one.tokens for one in found)),
            share_of_tokens=count / tokens if tokens else 0.0,
            share_of_drift=sum(one.sum_abs for one in found) / drift if drift else None,
        )
        for code, found in codes.items()
    ]
    return sorted(out, key=lambda aside: (-aside.tokens, aside.code))


def attribute(run: Run) -> list[Cause]:
    """The causes with their shares; they add to 1, or are all 0 where there is no drift."""
    d = run.d
    total = left = float(np.abs(d).sum())
    out = []
    names: tuple[CauseName, ...] = (
        "transform",
        "template",
        "stale_weights",
        "routing",
        "precision",
    )
    for name in names:
        undone = CAUSES[name](run, d)
        share, found = 0.0, undone.found
        if undone.d is not None:
            after = float(np.abs(undone.d).sum())
            if after < left:
                share, left, d = (left - after) / total, after, undone.d
            else:
                found = "absent"
        out.append(
            Cause(
                name=name,
                share=share,
                found=found,
                detail=undone.detail,
                evidence=undone.evidence,
                fix=undone.fix,
            )
        )
    return [*out, _rest(left, total, run)]


def _rest(left: float, total: float, run: Run) -> Cause:
    tokens = run.at.size
    return Cause(
        name="unexplained",
        share=left / total if total else 0.0,
        found="measured",
        detail=f"mean|D| {left / tokens:.3g} is left" if total else "the two sides are equal",
        evidence={"abs_log_ratio_mean": left / tokens},
        fix="read the suspected causes, the worst token and the classes below"
        if left
        else "nothing",
    )

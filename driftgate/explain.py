"""Why trainer and engine differ on one run: causes with their shares, and where the drift sits.

Pure: scored responses in, an explanation out. Shares are of the sum of |D| over the compared
tokens, comparable or not: what is wrong with a comparison is itself a cause. The causes of
`driftgate.causes` are undone one after the other; the share of each is how much the sum falls when
it is, so that they add to 1 with what is left, ``unexplained``. What one cause took, the next
cannot take again: where two are entangled, the earlier one has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from driftgate import anatomy
from driftgate.anatomy import Growth, Place, Response, Slice
from driftgate.causes import CAUSES, Floor, Found, Run

__all__ = [
    "METHOD",
    "Cause",
    "CauseName",
    "Explanation",
    "TrajectoryExplanation",
    "explain",
]

CauseName = Literal["transform", "template", "stale_weights", "routing", "precision", "unexplained"]

METHOD = (
    "causes are undone in this order; a share is the fall of sum|D| when its cause is undone, over "
    "sum|D| at the start, so shares add to 1; one that cannot be measured has share 0, and its "
    "drift stays unexplained"
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
    n_responses: int
    comparable: dict[str, int]
    """Scores by their verdict: ``yes``, ``converted``, ``no``."""
    abs_log_ratio_mean: float
    """nats, over all its compared tokens."""
    noise_floor: float | None
    """mean|D| of the noisier side against itself; null where it was not measured."""
    causes: list[Cause]
    """In the order that they are undone, ``unexplained`` last."""
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
    responses: Sequence[Response], *, captured: int, scored: int, floor: Floor | None = None
) -> Explanation:
    """The explanation of at least one response of one engine and one trainer.

    ``captured``, ``scored``: responses of the run, those without a comparable token included.
    ValueError without a response.
    """
    if not responses:
        raise ValueError("nothing to explain: no response has a comparable token")
    ordered = sorted(responses, key=lambda r: (r.trace.step, r.trace.started_ns, r.trace.choice))
    run, first = Run(ordered, floor), ordered[0].score
    verdicts = [response.score.comparable.verdict for response in ordered]
    return Explanation(
        model=first.model,
        engine_digest=first.engine.digest,
        trainer_digest=first.trainer.digest,
        captured=captured,
        scored=scored,
        n_tokens=int(run.at.size),
        n_responses=len(ordered),
        comparable={v: verdicts.count(v) for v in ("yes", "converted", "no") if v in verdicts},
        abs_log_ratio_mean=float(np.abs(run.d).mean()),
        noise_floor=floor.abs_log_ratio_mean if floor else None,
        causes=attribute(run),
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

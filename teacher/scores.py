"""From a trace and the trainer's numbers to the score that is stored. Pure.

Three kinds: the drift of a trace, a refusal that says why there is none (so that it is not tried
forever), and a noise floor, where one side ran twice and its second run stands in the trainer's
place. A floor whose second run was made in another way says so in the settings of that side, under
``driftgate.floor.LABEL``: floors of different kinds are different cells.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import msgspec
import numpy as np

from driftgate import mismatch
from driftgate.codes import SEVERITY, SPOILS_ROUTES
from driftgate.comparable import headline_temperature, judge
from driftgate.floor import LABEL
from driftgate.mismatch import Bucket
from driftgate.router import RouterBucket, ShiftFinding, route_shift
from driftgate.teacher.base import SliceResult
from driftgate.teacher.held import Held
from driftgate.teacher.replay import Replayed
from driftgate.trace import (
    F32,
    I32,
    Comparable,
    Engine,
    Reason,
    Routes,
    Score,
    ScoreMeta,
    Trace,
    TraceMeta,
    Trainer,
)

__all__ = ["Run", "drift", "engine_floor", "floor", "refusal", "trainer_floor"]

NOTHING = np.zeros(0, np.float32)


def drift(
    held: Held,
    result: SliceResult,
    *,
    trainer: Trainer,
    now_ns: int,
    findings: Seq[Reason] = (),
    weight_version: str | None = None,
    replayed: Replayed | None = None,
) -> Score:
    """The trainer's numbers for one trace, against what its engine reported.

    ``replayed``: its numbers under the rollout's routes, or why there are none.
    ``findings``: what is known to be wrong with the trainer. ``weight_version``: of its weights.
    """
    trace = held.trace
    assert trace.logprobs is not None
    assert trace.response_ids is not None
    at_one = _bucket(trace, result.logprobs)
    at_asked = None if result.at_temperature is None else _bucket(trace, result.at_temperature)
    router, shift, reason = _router(held, result, trainer, replayed)
    judged = judge(
        trace.meta,
        trainer,
        at_one=at_one,
        at_requested=at_asked,
        router=router,
        shift=shift,
        findings=findings,
        trainer_weight_version=weight_version,
        parent=held.parent,
    )
    temperature = headline_temperature(
        trace.meta.engine, trace.meta.sampling, at_one=at_one, at_requested=at_asked
    )
    headline = result.logprobs if temperature == 1.0 else result.at_temperature
    assert headline is not None
    under, why_not = _replay(replayed, judged, temperature)
    return Score(
        meta=ScoreMeta(
            **_names(trace.meta),
            engine=trace.meta.engine,
            trainer=trainer,
            trainer_weight_version=weight_version,
            temperature=temperature,
            bucket=at_one if temperature == 1.0 else at_asked,
            at_requested_temperature=at_asked,
            router=router,
            router_reason=reason,
            comparable=judged,
            replay=None if under is None else _bucket(trace, under, of=headline),
            replay_reason=why_not,
            replay_coverage=replayed.coverage if replayed and under is not None else None,
            worst=mismatch.worst(
                headline, trace.logprobs, trace.response_ids, trace_id=trace.meta.trace_id
            ),
            one_pass=result.one_pass,
            forward_s=result.forward_s,
            scored_ns=now_ns,
        ),
        logprobs=result.logprobs,
        entropy=result.entropy,
        logprobs_at_temperature=result.at_temperature,
        logprobs_replay=under,
        routes=result.routes,
    )


def refusal(meta: TraceMeta, reason: Reason, *, trainer: Trainer, now_ns: int) -> Score:
    """A score without numbers: why this trainer cannot score this trace."""
    return Score(
        meta=ScoreMeta(
            **_names(meta),
            engine=meta.engine,
            trainer=trainer,
            bucket=None,
            router_reason=reason.detail,
            comparable=Comparable(verdict="no", reasons=[reason]),
            scored_ns=now_ns,
        ),
        logprobs=NOTHING,
        entropy=NOTHING,
    )


class Run(NamedTuple):
    """One of two runs of the same side over the same tokens."""

    logprobs: F32
    """[n] nats."""
    routes: Routes | None
    """[n, L, K]."""


def trainer_floor(
    trace: Trace, first: SliceResult, second: SliceResult, *, trainer: Trainer, now_ns: int
) -> Score:
    """The trainer's second run over a trace against its first.

    Where the first was inside a longer sequence, the second is to be of the trace alone: the
    variation that drift scores have, which is that of kernels whose tiling follows the length.
    Else it is to be the same forward again. The score's ``one_pass`` says which it was.
    """
    assert trace.response_ids is not None
    return floor(
        trace.meta,
        trace.response_ids,
        Run(first.logprobs, first.routes),
        Run(second.logprobs, second.routes),
        side=trainer,
        now_ns=now_ns,
        entropy=second.entropy,
        margins=second.margins,
        layer_ids=second.layer_ids,
        one_pass=first.one_pass,
    )


def engine_floor(held_first: Held, held_second: Held, *, now_ns: int) -> Score:
    """An engine's second answer to one request against its first, for the tokens that they share.

    Two runs that sample different tokens are only comparable before the first different one; the
    score's reasons then say where that is.
    """
    first, second = held_first.trace, held_second.trace
    assert first.response_ids is not None
    assert second.response_ids is not None
    assert first.logprobs is not None
    assert second.logprobs is not None
    shared = _common_prefix(first, second)
    score = floor(
        second.meta,
        second.response_ids[:shared],
        Run(first.logprobs[:shared], _rows(held_first, shared)),
        Run(second.logprobs[:shared], _rows(held_second, shared)),
        side=second.meta.engine,
        now_ns=now_ns,
    )
    lengths = len(first.response_ids), len(second.response_ids)
    if shared < max(lengths):
        seen = (
            f"two runs of {first.meta.engine.name} with one seed share {shared} tokens of "
            f"{lengths[0]} and {lengths[1]}; {first.meta.trace_id} is the other run"
        )
        score.meta.comparable.reasons.append(
            Reason(
                code="samples_diverged",
                detail=seen,
                fix="expect a noise floor above 0: this engine does not repeat itself",
            )
        )
    return score


def floor(
    meta: TraceMeta,
    ids: I32,
    first: Run,
    second: Run,
    *,
    side: Engine | Trainer,
    now_ns: int,
    label: str | None = None,
    foreign: bool = False,
    entropy: F32 = NOTHING,
    margins: F32 | None = None,
    layer_ids: tuple[int, ...] = (),
    one_pass: bool = False,
) -> Score:
    """One side's second run against its first, over the tokens ``ids`` [n] that both runs share.

    ``label``: how the second run was made, where it was not simply the same again. ``foreign``: the
    tokens are not those of the trace, whose prompt alone was used: no token of it is named.
    """
    named, tokens = "" if foreign else meta.trace_id, len(ids)
    again = side
    if label is not None:
        again = msgspec.structs.replace(side, settings={**side.settings, LABEL: label})
    router = None
    if first.routes is not None and second.routes is not None and tokens:
        router = RouterBucket.of(
            first.routes,
            second.routes,
            rollout_ordered=side.routes_ordered,
            train_ordered=side.routes_ordered,
            margins=margins,
            layer_ids=layer_ids or None,
        )
    bucket = Bucket.of(second.logprobs, first.logprobs, token_ids=ids, trace_id=named)
    return Score(
        meta=ScoreMeta(
            **_names(meta),
            kind="noise_floor",
            engine=side,
            trainer=again,
            bucket=bucket if tokens else None,
            router=router,
            router_reason=None if router is not None else "no routes on both runs",
            comparable=Comparable(verdict="yes" if tokens else "no", reasons=[]),
            worst=(
                None
                if foreign
                else mismatch.worst(second.logprobs, first.logprobs, ids, trace_id=named)
            ),
            one_pass=one_pass,
            scored_ns=now_ns,
        ),
        logprobs=second.logprobs,
        entropy=entropy,
        routes=second.routes,
    )


def _bucket(trace: Trace, train: F32, *, of: F32 | None = None) -> Bucket:
    """``of``: [R] nats; over the tokens that compare with these alone, so that equal counts are
    equal tokens."""
    assert trace.logprobs is not None
    mask = None if of is None else mismatch.good_tokens(of, trace.logprobs, None)[0]
    ids, name = trace.response_ids, trace.meta.trace_id
    return Bucket.of(train, trace.logprobs, mask, token_ids=ids, trace_id=name)


def _replay(
    replayed: Replayed | None, judged: Comparable, temperature: float
) -> tuple[F32 | None, str | None]:
    """[R] nats under the rollout's routes at the headline's temperature, or why there are none."""
    if replayed is None or replayed.result is None:
        return None, replayed.reason if replayed else "not scored under the rollout's routes"
    spoilt = [
        r.code for r in judged.reasons if r.code in SPOILS_ROUTES and SEVERITY[r.code] == "no"
    ]
    if spoilt:
        return None, f"the rollout's routes say nothing here: {', '.join(spoilt)}"
    result = replayed.result
    return (result.logprobs if temperature == 1.0 else result.at_temperature), None


def _router(
    held: Held, result: SliceResult, trainer: Trainer, replayed: Replayed | None
) -> tuple[RouterBucket | None, ShiftFinding | None, str | None]:
    """Router drift over the rows that predict the response, rows that stand elsewhere, or why there
    is neither. Without routes the backend can tell, by ``replayed``, whether the model has no
    routers or none that is known."""
    if result.routes is None:
        return None, None, replayed.reason if replayed else "the trainer's model has no routers"
    if held.routes is None:
        return None, None, held.no_routes
    try:
        bucket = RouterBucket.of(
            held.routes,
            result.routes,
            rollout_ordered=held.trace.meta.engine.routes_ordered,
            train_ordered=trainer.routes_ordered,
            margins=result.margins,
            layer_ids=result.layer_ids,
            num_experts=result.experts,
        )
    except ValueError as error:
        return None, None, str(error)
    same_layers = held.routes.shape == result.routes.shape
    return bucket, route_shift(held.routes, result.routes) if same_layers else None, None


def _rows(held: Held, tokens: int) -> Routes | None:
    """[tokens, L, K] rows that predict the first ``tokens`` of the response."""
    return None if held.routes is None else held.routes[:tokens]


def _common_prefix(first: Trace, second: Trace) -> int:
    a, b = first.response_ids, second.response_ids
    assert a is not None
    assert b is not None
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if different.size else length


def _names(meta: TraceMeta) -> dict[str, Any]:
    """Keyword arguments that every score takes over from its trace."""
    return {
        "trace_id": meta.trace_id,
        "trajectory": meta.trajectory,
        "step": meta.step,
        "choice": meta.choice,
        "model": meta.model,
        "sampling": meta.sampling,
        "weight_version": meta.weight_version,
    }

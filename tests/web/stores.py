"""A store with everything that a page shows: dense and MoE, floors, gaps, refusals, length."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from driftgate.router import RouterBucket
from driftgate.storage import Record
from driftgate.testing.traces import ENGINE, TRAINER, make_intent, make_score, make_trajectory
from driftgate.trace import Comparable, Reason, Reward, Score, Trace, WeightSpan

DENSE_ENGINE = msgspec.structs.replace(ENGINE, model="tiny-dense")
DENSE_TRAINER = msgspec.structs.replace(TRAINER, model="tiny-dense", checkpoint="decade")
BAD_TRAINER = msgspec.structs.replace(TRAINER, dtype="bfloat16")
OTHER_BUILD = msgspec.structs.replace(ENGINE, system_fingerprint="another-build")
LONG_TOKENS = 10_000
MASKED = Reason(code="grammar_masked", detail="tool_choice=named", fix="compare free answers")


def routed_score(trace: Trace, *, flips: int, seed: int, **options: Any) -> Score:
    """A score whose trainer sends the first ``flips`` tokens' last layer to other experts."""
    assert trace.routes is not None
    assert trace.response_ids is not None
    rollout = trace.routes[-len(trace.response_ids) :]
    train = rollout.copy()
    train[:flips, -1, :] = (rollout[:flips, -1, :].astype(int) + 1) % 16
    router = RouterBucket.of(rollout, train, train_ordered=True)
    score = make_score(trace, seed=seed, router=router, **options)
    return dataclasses.replace(score, routes=train)


def renamed(trace: Trace, name: str) -> Trace:
    """The same prompt and answer in another trajectory."""
    call = f"{name}-{trace.meta.step}"
    ids = {"trajectory": name, "call_id": call, "trace_id": f"{call}.0"}
    meta = msgspec.structs.replace(trace.meta, **ids, parent=None, prefix_len=0, prefix_exact=False)
    return dataclasses.replace(trace, meta=meta)


def misaligned(trace: Trace) -> Score:
    """A score whose routes stand one row off, as vLLM's without a bonus row would."""
    score = routed_score(trace, flips=0, seed=0, noise=0.01)
    assert score.routes is not None
    train = np.roll(score.routes, 1, axis=0).astype(np.uint8)
    why = Reason(code="routes_misaligned", detail="shift 1", fix="count rows")
    meta = msgspec.structs.replace(
        score.meta,
        router=RouterBucket.of(score.routes, train),
        comparable=Comparable(verdict="no", reasons=[why]),
    )
    return dataclasses.replace(score, meta=meta, routes=train)


def page_records() -> Iterator[Record]:
    """Everything, in an order that a store accepts."""
    for n in range(4):
        for trace in make_trajectory(f"moe-{n}", steps=4, response=40):
            yield from called(trace)
            lag = {"weight_version": "step-1", "trainer_weight_version": f"step-{1 + n // 2}"}
            yield routed_score(trace, flips=3 + n, seed=n, noise=0.02 * (n + 1), **lag)
    dense = {"model": "tiny-dense", "engine": DENSE_ENGINE, "routed": False}
    for n in range(3):
        for trace in make_trajectory(f"dense-{n}", steps=3, response=40, **dense):
            yield from called(trace)
            no = Comparable(verdict="no", reasons=[MASKED])
            verdict = no if trace.meta.step == 0 else Comparable(verdict="yes")
            yield make_score(trace, noise=0.01, seed=n, trainer=DENSE_TRAINER, comparable=verdict)
    shifted = msgspec.structs.replace(ENGINE, model="tiny-shift")
    for trace in make_trajectory("shift", steps=3, response=60, model="tiny-shift", engine=shifted):
        yield from called(trace)
        yield misaligned(trace)
    (first, *_) = make_trajectory("moe-0", steps=4, response=40)
    yield make_score(first, noise=0.0, kind="noise_floor", trainer=ENGINE)
    yield make_score(
        first, noise=1.0, trainer=BAD_TRAINER, comparable=Comparable(verdict="no", reasons=[MASKED])
    )
    for trace in make_trajectory("moe-0", steps=2, response=40, engine=OTHER_BUILD):
        again = renamed(trace, "other-build")
        yield from called(again)
        yield routed_score(again, flips=2, seed=7, noise=0.03)
    yield Reward(trajectory="moe-0", value=0.5, source="verifier", given_ns=1)
    asked = likely()
    yield from called(asked)
    yield make_score(asked, noise=0.01)
    gap = list(make_trajectory("gap", steps=2, missing=["routed_experts: not asked for"]))
    yield from called(gap[0])
    yield make_intent(gap[1])
    (long,) = make_trajectory("long", steps=1, response=LONG_TOKENS, **dense)
    yield from called(long)
    yield make_score(long, noise=0.01, trainer=DENSE_TRAINER)


def likely() -> Trace:
    """An answer whose agent asked for alternatives, and whose weights changed at its 30th token."""
    (trace,) = make_trajectory("likely", steps=1, response=40)
    tops = [{"token": "<script>", "logprob": -0.5}, {"token": "\n", "logprob": -2.0}]
    rows = {"content": [{"top_logprobs": tops}] * 40}
    spans = [WeightSpan(0, "step-8"), WeightSpan(30, "step-9")]
    meta = msgspec.structs.replace(trace.meta, weight_spans=spans, weight_version="step-8+step-9")
    response = msgspec.json.encode(msgspec.json.decode(trace.response) | {"logprobs": rows})
    return dataclasses.replace(trace, meta=meta, response=response)


def called(trace: Trace) -> Iterator[Record]:
    yield make_intent(trace)
    yield trace

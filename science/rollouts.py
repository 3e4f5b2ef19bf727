"""A real vLLM on CPU, captured and scored; then every number of it a second time from elsewhere.

One engine (a mixture of experts in bfloat16), one store: conversations, completions of token ids
that extend each other, branches, a temperature, and one request twice. The trainer is the reference
in float32.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from driftgate.gateway.explanations import Explanations
from driftgate.storage import Reader
from driftgate.teacher.batches import Batching
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.reference import ReferenceBackend
from driftgate.teacher.sequences import assemble
from driftgate.testing.checkpoints import make_checkpoint
from driftgate.testing.engine import start_vllm
from driftgate.trace import Score, Trace, Trainer
from science import numbers
from science.floors import Floors, measure
from science.table import Row, exactly, near, worst
from tests.e2e.oracle import HuggingFace, Pair
from tests.e2e.rollouts import roll_out
from tests.e2e.support import stored_scores, stored_traces, teach

__all__ = ["Rollouts", "capture", "rows"]

TILING = 2e-5
"""Nats, float32: a longer sequence or fewer rows choose other kernels; 6e-6 was measured."""
NEAR_TIE = 1e-5
"""In probability: float32 kernels may choose either of two experts that are so close."""


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What was captured, and what the reference made of it."""

    checkpoint: Path
    unscored: Path
    store: Path
    trainer: Trainer
    traces: list[Trace]
    scores: dict[str, Score]
    """By trace."""
    backend: ReferenceBackend
    floors: Floors
    """Of both sides, as ``driftgate floor`` measured them."""


def capture(root: Path) -> Rollouts:
    """Start the engine, record, stop it, score."""
    checkpoint = make_checkpoint(root / "rollout", "moe")
    unscored = root / "unscored"
    with start_vllm(checkpoint, name="moe", log=root / "vllm.log", routes=True) as engine:
        asyncio.run(roll_out(engine, unscored, engine_settings={"dtype": "bfloat16"}))
        floors = measure(engine, unscored, checkpoint, root)
    store = Path(shutil.copytree(unscored, root / "scored"))
    backend = ReferenceBackend.load(
        TeacherConfig(store="unused", model=str(checkpoint), dtype="float32")
    )
    teach(store, backend, checkpoint)
    scores = stored_scores(store, backend.trainer.digest)
    return Rollouts(
        checkpoint=checkpoint,
        unscored=unscored,
        store=store,
        trainer=backend.trainer,
        traces=stored_traces(store),
        scores={score.meta.trace_id: score for score in scores},
        backend=backend,
        floors=floors,
    )


def rows(part: str, made: Rollouts) -> Iterator[Row]:
    """Scores, metrics, floors and the ways of scoring, of what was captured."""
    yield exactly(part, "traces with a score", len(made.scores), len(made.traces))
    yield from _against_hugging_face(part, made)
    pairs = [_pair(made, trace) for trace in made.traces]
    yield from numbers.log_ratios(f"{part}: METRICS 2", pairs)
    yield from numbers.merging(f"{part}: METRICS 2", pairs)
    yield from _routing(f"{part}: METRICS 3", made)
    yield from _floors(f"{part}: noise floors", made)
    yield from _ways(f"{part}: ways of scoring", made)
    yield from _explained(f"{part}: causes", made)


def _pair(made: Rollouts, trace: Trace) -> Pair:
    assert trace.logprobs is not None
    train = made.scores[trace.meta.trace_id].logprobs
    return train.astype(np.float64), trace.logprobs.astype(np.float64)


def _against_hugging_face(part: str, made: Rollouts) -> Iterator[Row]:
    """Whole logits and a softmax in float64, one forward for each trace."""
    plain = HuggingFace(made.checkpoint)
    apart = {"log-probabilities": 0.0, "entropies": 0.0, "at the engine's temperature": 0.0}
    differ, ties = 0, 0
    for trace in made.traces:
        score, answer = made.scores[trace.meta.trace_id], plain.answer(trace)
        found = [score.logprobs - answer.logprobs, score.entropy - answer.entropy]
        if answer.at_temperature is not None:
            assert score.logprobs_at_temperature is not None
            found.append(score.logprobs_at_temperature - answer.at_temperature)
        for name, gaps in zip(apart, found, strict=False):
            apart[name] = max(apart[name], float(np.abs(gaps).max()))
        assert score.routes is not None
        ours, wanted = np.sort(score.routes, -1), np.sort(np.array(answer.experts), -1)
        differ += int((ours != wanted).any(-1).sum())
        ties += int((answer.margins < NEAR_TIE).sum())
    for name, difference in apart.items():
        tolerance = TILING * (10 if name == "entropies" else 3 if "temp" in name else 1)
        yield worst(part, f"reference in float32: {name}", difference, tolerance, "Hugging Face")
    what = f"cells with other experts (ties within {NEAR_TIE:g}: {ties})"
    yield Row(part, what, differ, 0, differ, ties)


def _routing(part: str, made: Rollouts) -> Iterator[Row]:
    """All responses of one trajectory's worth of routes end to end, as one response."""
    a, b = [], []
    for trace in made.traces:
        score = made.scores[trace.meta.trace_id]
        assert trace.routes is not None
        assert score.routes is not None
        a.append(trace.routes[-len(score.routes) :])
        b.append(score.routes)
    yield from numbers.routing(part, np.concatenate(a), np.concatenate(b), None, ordered=False)


def _floors(part: str, made: Rollouts) -> Iterator[Row]:
    """Each side against itself: ours as stored, the reference from the two runs' own numbers."""
    by_trace = {trace.meta.trace_id: trace for trace in made.traces}
    pairs = 0
    for floor in stored_scores(made.store, kind="noise_floor"):
        assert floor.meta.bucket is not None
        mine = floor.meta.bucket.metrics()["abs_log_ratio_max"]
        trace = by_trace[floor.meta.trace_id]
        run = f"{trace.meta.trajectory}, step {trace.meta.step}: largest |D|"
        if isinstance(floor.meta.trainer, Trainer):
            (again,) = made.backend.score(assemble([trace]))
            score = made.scores[floor.meta.trace_id]
            apart = float(np.abs(again.logprobs - score.logprobs).max())
            yield near(part, f"trainer twice, {run}", mine, apart, rel=1e-12)
        else:
            pairs += 1
            (other,) = [one for one in made.traces if one is not trace and _twins(one, trace)]
            assert trace.logprobs is not None
            assert other.logprobs is not None
            apart = float(np.abs(trace.logprobs - other.logprobs).max())
            yield near(part, f"engine, one request twice, {run}", mine, apart, rel=1e-12)
    asked = sum(_twins(a, b) for a, b in combinations(made.traces, 2))
    yield exactly(part, "engine floors, of pairs of one request", pairs, asked)


def _twins(a: Trace, b: Trace) -> bool:
    """One request in two calls; the choices of one call (n > 1) are no repetition."""
    assert a.prompt_ids is not None
    assert b.prompt_ids is not None
    same = a.meta.sampling == b.meta.sampling and np.array_equal(a.prompt_ids, b.prompt_ids)
    return same and a.meta.call_id != b.meta.call_id


def _ways(part: str, made: Rollouts) -> Iterator[Row]:
    """One pass, padding and packing against one forward for each trace; native routes forced."""
    alone = [result for one in made.traces for result in made.backend.score(assemble([one]))]
    wanted = {result.trace_id: result for result in alone}
    together = assemble(made.traces)
    what = f"one pass ({len(together)} forwards for {len(made.traces)} traces)"
    yield _apart(part, what, made.backend.score(together), wanted)
    model = made.backend._scorer.model
    ways: tuple[Batching, ...] = ("padded", "packed")
    for how in ways:
        backend = ReferenceBackend(model, name="rollout", batching=how)
        yield _apart(part, how, backend.score(together), wanted)
        yield exactly(part, f"{how}: label", backend.trainer.settings.get("batching"), how)


def _apart(part: str, what: str, found: list[Any], wanted: dict[str, Any]) -> Row:
    apart = [np.abs(one.logprobs - wanted[one.trace_id].logprobs).max() for one in found]
    return worst(part, what, float(max(apart)), TILING, "a forward for each trace")


EXPLAINED = "long"
"""The trajectory of most tokens: one answer, one version, one temperature."""


def _explained(part: str, made: Rollouts) -> Iterator[Row]:
    """`driftgate explain` of a real run, whose causes can only be routing, rounding and the rest:
    sums over the stored arrays."""
    with closing(Reader(made.store)) as reader:
        (told,) = Explanations(reader).trajectory(EXPLAINED).items
    (trace,) = [one for one in made.traces if one.meta.trajectory == EXPLAINED]
    score = made.scores[trace.meta.trace_id]
    assert trace.logprobs is not None
    assert score.logprobs_replay is not None
    rollout = trace.logprobs.astype(np.float64)
    total = float(np.abs(score.logprobs - rollout).sum())
    left = float(np.abs(score.logprobs_replay - rollout).sum())
    share = {cause.name: cause.share for cause in told.causes}
    early = share["transform"] + share["template"] + share["stale_weights"]
    yield exactly(part, f"{EXPLAINED}: tokens", told.n_tokens, len(rollout))
    yield exactly(part, f"{EXPLAINED}: share of what is not there", early, 0.0)
    wanted = max(0.0, 1 - left / total)
    yield near(part, f"{EXPLAINED}: share of routing", share["routing"], wanted, rel=1e-12)
    yield near(part, f"{EXPLAINED}: all shares", sum(share.values()), 1.0, rel=1e-12)
    assert told.worst is not None
    worst_at = int(np.abs(score.logprobs - rollout).argmax())
    yield exactly(part, f"{EXPLAINED}: worst token", told.worst.token_index, worst_at)

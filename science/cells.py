"""Cells, intervals, groups and feedback of a planted store, read as the API reads them.

Two builds of one engine and two weight versions; the second build drifts ten times as far, was
scored in part and has few runs. The reference is numpy over the arrays that were planted, run by
run, with a bootstrap that draws whole runs and pools their tokens anew each time.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np

from driftgate.gateway.answers import Answers
from driftgate.gateway.verdicts import Verdicts
from driftgate.storage import Reader, Record
from driftgate.testing.stores import write_store
from driftgate.testing.traces import ENGINE, make_intent
from driftgate.trace import Engine
from driftgate.views import CellView
from science import by_hand
from science.by_hand import F64
from science.table import Row, exactly, near
from tests.core.planted import noise, run, scored, with_meta

__all__ = ["cells"]

OTHER = msgspec.structs.replace(ENGINE, version="0.30.0")
STEPS, TOKENS = 2, 60
STORED = 1e-5
"""Relative: log-probabilities are kept in float32."""
DRAWS = 2000
MONTE_CARLO = 0.1
"""Of an interval's width: both bootstraps draw, ours 1,000 times."""


@dataclasses.dataclass(frozen=True, slots=True)
class Planted:
    """One run: its side, its numbers, and whether all of it is scored."""

    name: str
    engine: Engine
    version: str
    d: list[F64]
    """[R] nats of each step."""
    scored: int
    prompt: int
    """Runs of one number begin with the same prompt."""


def plant() -> list[Planted]:
    """40 runs of the one build, 5 of the other, and a group of three of a prompt of their own."""
    rng, out = np.random.default_rng(8), []
    for n in range(40):
        # A run's own offset: its tokens are not independent.
        d = [rng.normal(0, 0.01) + noise(2 * n + at, TOKENS, 0.02) for at in range(STEPS)]
        out.append(Planted(f"a{n}", ENGINE, "7" if n < 30 else "5", d, STEPS, 100 + n))
    for n in range(5):
        d = [noise(500 + 2 * n + at, TOKENS, 0.3) for at in range(STEPS)]
        out.append(Planted(f"b{n}", OTHER, "7", d, STEPS - (n == 4), 200 + n))
    for n, sigma in enumerate((0.01, 0.01, 0.5)):
        d = [noise(900 + 2 * n + at, TOKENS, sigma) for at in range(STEPS)]
        out.append(Planted(f"group{n}", ENGINE, "7", d, STEPS, 300))
    return out


def records(runs: Sequence[Planted]) -> Iterator[Record]:
    """What a gateway and a teacher would have stored."""
    for one in runs:
        for at, made in enumerate(run(STEPS, TOKENS, seed=one.prompt)):
            call = f"{one.name}-{at}"
            trace = with_meta(
                made,
                trajectory=one.name,
                call_id=call,
                trace_id=f"{call}.0",
                parent=f"{one.name}-0.0" if at else None,
                engine=one.engine,
                weight_version=one.version,
            )
            yield make_intent(trace)
            yield trace
            if at < one.scored:
                yield scored(trace, one.d[at], trainer_weight_version="7")


def cells(part: str, root: Path) -> Iterator[Row]:
    """Everything that is said of more than one run."""
    runs = plant()
    with closing(Reader(write_store(root, records(runs)))) as reader:
        found = {cell.engine_digest: cell for cell in Answers(reader).cells().items}
        verdicts = Verdicts(reader)
        for name, engine in (("one build", ENGINE), ("the other build", OTHER)):
            own = [one for one in runs if one.engine == engine]
            yield from _cell(part, name, found[engine.digest], own)
        yield exactly(part, "cells of two builds", len(found), 2)
        yield from _group(part, verdicts, [one for one in runs if one.prompt == 300])
        yield from _feedback(part, verdicts, runs)


def _cell(part: str, name: str, cell: CellView, runs: Sequence[Planted]) -> Iterator[Row]:
    by_run = [np.concatenate(one.d[: one.scored]) for one in runs]
    d = np.concatenate(by_run)
    assert cell.measures is not None
    ours = cell.measures.metrics
    for metric, wanted in (
        ("abs_log_ratio_mean", np.abs(d).mean()),
        ("kl_k3_rollout_train", (np.exp(d) - 1 - d).mean()),
    ):
        yield near(part, f"{name}: {metric}, of its own tokens", ours[metric], wanted, rel=STORED)
    captured, scores = STEPS * len(runs), sum(one.scored for one in runs)
    yield exactly(
        part, f"{name}: scored of captured", f"{cell.scored} of {cell.captured}",
        f"{scores} of {captured}",
    )  # fmt: skip
    yield exactly(part, f"{name}: is partial", cell.partial, scores < captured)
    yield exactly(part, f"{name}: runs", cell.trajectories, len(runs))
    yield from _lags(part, name, cell, runs)
    yield exactly(part, f"{name}: marked as few (n < 30)", cell.few, len(runs) < 30)
    if cell.few:
        return  # five runs have few different draws, and an interval no smooth end
    drawn = _bootstrap(by_run)
    for metric, (low, high) in drawn.items():
        told = cell.intervals[metric]
        apart = max(abs(told.low - low), abs(told.high - high))
        mine, theirs = f"{told.low:.4g} .. {told.high:.4g}", f"{low:.4g} .. {high:.4g}"
        what = f"{name}: 95 % interval of {metric}"
        yield Row(part, what, mine, theirs, apart, MONTE_CARLO * (high - low))


def _lags(part: str, name: str, cell: CellView, runs: Sequence[Planted]) -> Iterator[Row]:
    """Tokens by how many versions lie between sampling and scoring, which was under 7."""
    wanted: dict[str, list[F64]] = {}
    for one in runs:
        wanted.setdefault(str(7 - int(one.version)), []).extend(one.d[: one.scored])
    told = {lag.label: lag for lag in cell.by_lag}
    yield exactly(part, f"{name}: lags", ", ".join(told), ", ".join(sorted(wanted)))
    for label, parts in sorted(wanted.items()):
        d, lag = np.concatenate(parts), told[label]
        assert lag.measures is not None
        yield exactly(part, f"{name}, lag {label}: tokens", lag.n_tokens, len(d))
        mean = lag.measures.metrics["abs_log_ratio_mean"]
        what = f"{name}, lag {label}: abs_log_ratio_mean"
        yield near(part, what, mean, np.abs(d).mean(), rel=STORED)


def _bootstrap(by_run: Sequence[F64]) -> dict[str, tuple[float, float]]:
    """Whole runs drawn with replacement; all of their tokens pooled in every draw."""
    rng = np.random.default_rng(1)
    values: dict[str, list[float]] = {"abs_log_ratio_mean": [], "kl_k3_rollout_train": [],
                                      "log_ratio_mean": [], "ess_kish_seq": []}  # fmt: skip
    for _ in range(DRAWS):
        drawn = [by_run[n] for n in rng.integers(0, len(by_run), len(by_run))]
        d = np.concatenate(drawn)
        values["abs_log_ratio_mean"].append(float(np.abs(d).mean()))
        values["kl_k3_rollout_train"].append(float((np.exp(d) - 1 - d).mean()))
        values["log_ratio_mean"].append(float(d.mean()))
        # A response is a sequence: those of step 0 are the first TOKENS of a run.
        w = np.exp([x[at : at + TOKENS].sum() for x in drawn for at in range(0, len(x), TOKENS)])
        values["ess_kish_seq"].append(float(w.sum() ** 2 / (len(w) * (w * w).sum())))
    return {
        name: (float(np.quantile(one, 0.025)), float(np.quantile(one, 0.975)))
        for name, one in values.items()
    }


def _group(part: str, verdicts: Verdicts, members: Sequence[Planted]) -> Iterator[Row]:
    """Three samples of one prompt: each verdict by the rules, and whole runs weighed."""
    (group,) = verdicts.trajectory("group0").groups
    told = {one.trajectory: one.verdict.verdict for one in group.members}
    for one in members:
        # 120 tokens of one version, and no routes.
        wanted = by_hand.verdict("default", np.concatenate(one.d), 0, 0.0, 0.0)
        yield exactly(part, f"prompt group, {one.name}: verdict", told[one.name], wanted)
    d = np.concatenate([np.concatenate(one.d) for one in members])
    wanted = by_hand.verdict("default", d, 0, 0.0, 0.0)
    yield exactly(part, "prompt group as one: verdict", group.verdict.verdict, wanted)
    w = np.exp([math.fsum(np.concatenate(one.d).tolist()) for one in members])
    kish = float(w.sum() ** 2 / (len(w) * (w * w).sum()))
    what = "prompt group: ess_kish_trajectory"
    yield near(part, what, group.ess_kish_trajectory, kish, rel=STORED)


def _feedback(part: str, verdicts: Verdicts, runs: Sequence[Planted]) -> Iterator[Row]:
    """Verdicts by (engine, weight version)."""
    wanted: dict[tuple[str, str], Counter[str]] = {}
    for one in runs:
        lag = 7 - int(one.version)
        d = np.concatenate(one.d)
        verdict = by_hand.verdict("default", d, lag, 0.0, 0.0) if one.scored == STEPS else "null"
        wanted.setdefault((one.engine.digest, one.version), Counter())[verdict] += 1
    rows = {(row.engine_digest, row.weight_version): row for row in verdicts.feedback().items}
    yield exactly(part, "feedback: rows of (engine, version)", len(rows), len(wanted))
    for key, counts in wanted.items():
        ours = rows[key].verdicts
        build = "one build" if key[0] == ENGINE.digest else "the other build"
        words = [", ".join(f"{n} {name}" for name, n in sorted(one.items()))
                 for one in (ours, counts)]  # fmt: skip
        yield exactly(part, f"feedback: {build}, version {key[1]}", *words)

"""The worker itself under every backend on one captured store: scores, D and D_replay told.

``driftgate teach`` as a user starts it, on copies of the store that the reference scored: FSDP2 in
two processes by its command, Megatron-Core by the same launcher with the ranks' CPU shim. What
each stored is held against what the reference stored, token by token, and the shares of drift that
routing replay would remove against plain sums over the arrays.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from driftgate.replay import ReplayPair
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.launch import launch
from driftgate.trace import Score, Trainer
from science.by_hand import F64
from science.launched import EP, FP32, PP, SP, TP, driftgate
from science.replayed import HUGGING_FACE, MEGATRON
from science.rollouts import TILING, Rollouts
from science.table import Row, exactly, near, worst
from tests.e2e.support import WEIGHT_VERSION, stored_scores

__all__ = ["taught"]

SHARES = 1e-3
"""Of a share: mean|D| is some .05 nats here, and its float32 ends at 1e-5 of a nat."""

FLOOR_TRACES = 4

WAYS: Mapping[str, dict[str, Any]] = {
    "fsdp, 2 processes": {"backend": "fsdp", "nproc": 2},
    "megatron, TP 2 + SP + EP 2": {"backend": "megatron", "nproc": 2, TP: 2, EP: 2, SP: True},
    "megatron, PP 2": {"backend": "megatron", "nproc": 2, PP: 2},
}


def taught(part: str, made: Rollouts, root: Path) -> Iterator[Row]:
    """The reference's own shares by hand, then every other backend against it."""
    yield from _shares(part, "reference", made, made.scores)
    for number, (name, layout) in enumerate(WAYS.items()):
        store = Path(shutil.copytree(made.unscored, root / f"taught-{number}"))
        _teach(store, made.checkpoint, layout)
        scores = {one.meta.trace_id: one for one in stored_scores(store)}
        yield exactly(part, f"{name}: traces scored", len(scores), len(made.traces))
        bound = MEGATRON if layout["backend"] == "megatron" else HUGGING_FACE
        for what, field in (("log-probabilities", "logprobs"),
                            ("under the rollout's routes", "logprobs_replay")):  # fmt: skip
            apart = max(_apart(scores[one], made.scores[one], field) for one in made.scores)
            yield worst(part, f"{name}: {what}", apart, bound, "the reference")
        yield from _against(part, name, scores, made.scores)
        if SP in layout:
            yield from _floor(part, name, store, made, layout)


def _floor(part: str, name: str, store: Path, made: Rollouts, layout: Any) -> Iterator[Row]:
    """The trainer of ``driftgate floor``, twice over single answers: the same forward again."""
    _teach(store, made.checkpoint, {**layout, "floor_traces": FLOOR_TRACES})
    found = [
        one.meta.bucket.metrics()["abs_log_ratio_max"]
        for one in stored_scores(store, kind="noise_floor")
        if isinstance(one.meta.engine, Trainer) and one.meta.bucket is not None
    ]
    yield exactly(part, f"{name}: answers run twice, as asked", len(found) >= FLOOR_TRACES, True)
    apart = max(value for value in found if value is not None)
    yield worst(part, f"{name}: the same answer twice, alone and in a run", apart, TILING, "itself")


def _teach(store: Path, checkpoint: Path, layout: Mapping[str, Any]) -> None:
    if layout["backend"] == "megatron":
        given = {"store": str(store), "model": str(checkpoint), "dtype": "float32",
                 "weight_version": WEIGHT_VERSION, **layout}  # fmt: skip
        config = msgspec.convert(given, TeacherConfig)
        status = launch(config, rank_module="driftgate.testing.megatron_rank")
        if status:
            raise RuntimeError(f"the Megatron teacher ended with {status}; its log is above")
        return
    where = ("--store", store, "--model", checkpoint, "--dtype", "float32")
    how = ("--backend", layout["backend"], "--nproc", str(layout["nproc"]))
    driftgate("teach", *where, *how, "--weight-version", WEIGHT_VERSION)


def _apart(ours: Score, wanted: Score, field: str) -> float:
    a, b = getattr(ours, field), getattr(wanted, field)
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    return float(np.abs(a.astype(np.float64) - b).max())


def pair_of(scores: Mapping[str, Score]) -> ReplayPair:
    """The merged sums of all that were scored both ways."""
    found = [pair for one in scores.values() if (pair := ReplayPair.of(one.meta)) is not None]
    return reduce(ReplayPair.merge, found)


def _shares(part: str, name: str, made: Rollouts, scores: Mapping[str, Score]) -> Iterator[Row]:
    """D, D_replay and what replay removes: the stored sums against numpy over the arrays."""
    native, under = list[F64](), list[F64]()
    for trace in made.traces:
        score = scores[trace.meta.trace_id]
        if score.logprobs_replay is None or score.meta.temperature != 1.0:
            continue
        assert trace.logprobs is not None
        rollout = trace.logprobs.astype(np.float64)
        native.append(score.logprobs - rollout)
        under.append(score.logprobs_replay - rollout)
    d, r = np.concatenate(native), np.concatenate(under)
    pair = pair_of(scores)
    k3 = [(np.exp(x) - 1 - x).mean() for x in (d, r)]
    mean = [np.abs(x).mean() for x in (d, r)]
    for what, ours, wanted in (
        ("mean|D|", pair.native.metrics()["abs_log_ratio_mean"], mean[0]),
        ("mean|D_replay|", pair.under.metrics()["abs_log_ratio_mean"], mean[1]),
        ("k3(D_replay)", pair.under.metrics()["kl_k3_rollout_train"], k3[1]),
        ("replay_removes_abs_log_ratio_mean", pair.shares()["replay_removes_abs_log_ratio_mean"],
         1 - mean[1] / mean[0]),
        ("replay_removes_kl_k3_rollout_train", pair.shares()["replay_removes_kl_k3_rollout_train"],
         1 - k3[1] / k3[0]),
    ):  # fmt: skip
        yield near(part, f"{name}: {what}", ours, wanted, rel=1e-9)
    yield exactly(part, f"{name}: routes of the rollout that were used", pair.coverage, 1.0)


def _against(
    part: str, name: str, scores: Mapping[str, Score], reference: Mapping[str, Score]
) -> Iterator[Row]:
    """The same numbers as told by another backend."""
    ours, wanted = pair_of(scores), pair_of(reference)
    for what, a, b in (
        ("mean|D|", ours.native, wanted.native),
        ("mean|D_replay|", ours.under, wanted.under),
    ):
        means = [one.metrics()["abs_log_ratio_mean"] for one in (a, b)]
        yield near(part, f"{name}: {what}, as the reference told it", *means, rel=FP32)
    for share, mine in ours.shares().items():
        yield near(part, f"{name}: {share}", mine, wanted.shares()[share], rel=SHARES)

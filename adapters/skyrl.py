"""SkyRL: one ``GeneratorOutput`` per shard, as JSON.

Checked against skyrl 0.3.0 (PyPI; NovaSky-AI/SkyRL), ``skyrl/train/generators/base.py``, and its
``skyrl/train/dataset/preprocess.py``, which pads what is given here into tensors.
``rollout_expert_indices`` has n - 1 rows a sample; SkyRL pads with zeros and replays them, so a
sample with a missing row is written without routes, in a shard of its own. A trajectory without a
reward has null: set it before training.

``trajectory_ids`` are plain objects with SkyRL's field names: ``TrajectoryID(**entry)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from driftgate.adapters.export_base import Format, sample_of, whole_routes
from driftgate.samples import Sample, SampleMeta

__all__ = ["FORMAT"]


class TrajectoryID(msgspec.Struct):
    """Which run, and which of its lines."""

    instance_id: str
    repetition_id: int


class GeneratorOutput(msgspec.Struct, kw_only=True):
    """SkyRL's keys, one entry a sample."""

    prompt_token_ids: list[list[int]]
    response_ids: list[list[int]]
    rewards: list[float | None]
    loss_masks: list[list[int]]
    stop_reasons: list[str]
    rollout_metrics: None = None
    rollout_logprobs: list[list[float]]
    trajectory_ids: list[TrajectoryID]
    rollout_expert_indices: list[list[list[list[int]]]] | None
    """[samples, n - 1, L, K]"""
    is_last_step: None = None


def _write(path: Path, samples: Sequence[Sample]) -> None:
    starts = [sample.meta.prompt_len for sample in samples]
    both = list(zip(samples, starts, strict=True))
    routes = [sample.routes.tolist() for sample in samples if sample.routes is not None]
    output = GeneratorOutput(
        prompt_token_ids=[s.tokens[:p].tolist() for s, p in both],
        response_ids=[s.tokens[p:].tolist() for s, p in both],
        rewards=[s.meta.reward for s in samples],
        loss_masks=[s.mask[p:].astype(int).tolist() for s, p in both],
        stop_reasons=[s.meta.spans[-1].finish_reason or "unknown" for s in samples],
        rollout_logprobs=[s.logprobs[p:].tolist() for s, p in both],
        trajectory_ids=[TrajectoryID(s.meta.trajectory, s.meta.line) for s in samples],
        rollout_expert_indices=routes or None,
    )
    path.write_bytes(msgspec.json.encode(output))


def _read(path: Path, metas: Sequence[SampleMeta]) -> list[Sample]:
    output = msgspec.json.decode(path.read_bytes(), type=GeneratorOutput)
    found = []
    for row, meta in enumerate(metas):
        indices = output.rollout_expert_indices
        found.append(
            sample_of(
                meta,
                output.prompt_token_ids[row] + output.response_ids[row],
                output.loss_masks[row],
                output.rollout_logprobs[row],
                None if indices is None else np.asarray(indices[row]),
                valid=np.ones(meta.tokens - 1, np.bool_),
            )
        )
    return found


FORMAT = Format(
    name="skyrl",
    write=_write,
    read=_read,
    carries=whole_routes,
    shard_name="shard-{:05d}.json",
    route_bytes=40,  # a Python list of ints on its way into JSON
)

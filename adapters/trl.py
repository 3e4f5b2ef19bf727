"""TRL: what a GRPO ``rollout_func`` returns, as JSON, one shard a call.

Checked against trl 1.16.0 (PyPI; huggingface/trl), ``trl/trainer/grpo_trainer.py``: ``prompt_ids``,
``completion_ids`` and ``logprobs`` are required, ``logprobs`` become ``sampling_per_token_logps``,
``env_mask`` marks tokens that the model did not sample, and any other key goes to the reward
functions: ``reward`` is there for one that returns it (null where none was given). TRL has no place
for routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from driftgate.adapters.export_base import Format, no_routes, sample_of
from driftgate.samples import Sample, SampleMeta

__all__ = ["FORMAT"]


class Rollouts(msgspec.Struct, kw_only=True):
    """One entry a sample."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[float]]
    env_mask: list[list[int]]
    reward: list[float | None]
    trajectory: list[str]


def _write(path: Path, samples: Sequence[Sample]) -> None:
    both = [(sample, sample.meta.prompt_len) for sample in samples]
    rollouts = Rollouts(
        prompt_ids=[s.tokens[:p].tolist() for s, p in both],
        completion_ids=[s.tokens[p:].tolist() for s, p in both],
        logprobs=[s.logprobs[p:].tolist() for s, p in both],
        env_mask=[s.mask[p:].astype(int).tolist() for s, p in both],
        reward=[s.meta.reward for s in samples],
        trajectory=[s.meta.trajectory for s in samples],
    )
    path.write_bytes(msgspec.json.encode(rollouts))


def _read(path: Path, metas: Sequence[SampleMeta]) -> list[Sample]:
    rollouts = msgspec.json.decode(path.read_bytes(), type=Rollouts)
    return [
        sample_of(meta, prompt + completion, mask, logprobs)
        for meta, prompt, completion, mask, logprobs in zip(
            metas,
            rollouts.prompt_ids,
            rollouts.completion_ids,
            rollouts.env_mask,
            rollouts.logprobs,
            strict=True,
        )
    ]


FORMAT = Format(
    name="trl", write=_write, read=_read, carries=no_routes, shard_name="shard-{:05d}.json"
)

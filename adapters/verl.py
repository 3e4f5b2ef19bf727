"""verl: one ``DataProto`` batch per shard, as its agent loop builds it.

Checked against verl 0.9.1 (PyPI; volcengine/verl), ``experimental/agent_loop/agent_loop.py``:
prompts are padded on the left, responses on the right, ``response_mask`` is 0 on tool outputs and
padding, ``rollout_log_probs`` 0 on both, ``rm_scores`` holds the reward at the last response token,
and ``routed_experts`` is indexed by padded position. The last sampled token and padding have zero
rows there, which verl's replay masks out (``build_r3_replay_mask``); it would replay any other zero
row as expert 0, so a sample with a missing row is written without routes, in a shard of its own.

The file is safetensors, without pickle: ``DataProto.from_dict(tensors=load_file(path))``. A
trajectory without a reward has NaN in ``rm_scores``, so that it cannot be taken for 0; where none
has a reward the key is absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from driftgate.adapters.export_base import Format, padded_routes, sample_of, whole_routes
from driftgate.samples import Sample, SampleMeta

__all__ = ["FORMAT", "batch_of"]

PAD_TOKEN = 0
"""Under ``attention_mask`` 0; any id does."""


def batch_of(samples: Sequence[Sample]) -> dict[str, npt.NDArray[Any]]:
    """Tensors of a ``DataProto`` [B, ...], padded to the longest prompt and response.

    ``routed_experts`` int16 [B, P + R, L, K] where all samples have whole routes.
    """
    prompts = max(sample.meta.prompt_len for sample in samples)
    responses = max(sample.response_len for sample in samples)
    out = _empty(samples, prompts, responses)
    for row, sample in enumerate(samples):
        start = prompts - sample.meta.prompt_len
        end = start + sample.meta.tokens
        out["input_ids"][row, start:end] = sample.tokens
        out["attention_mask"][row, start:end] = 1
        out["response_mask"][row, : sample.response_len] = sample.mask[sample.meta.prompt_len :]
        values = sample.logprobs[sample.meta.prompt_len :]
        out["rollout_log_probs"][row, : sample.response_len] = values
        if sample.routes is not None:
            out["routed_experts"][row, start : end - 1] = padded_routes(
                sample, sample.meta.tokens - 1, np.int16
            )
        if "rm_scores" in out:
            reward = sample.meta.reward
            out["rm_scores"][row, sample.response_len - 1] = np.nan if reward is None else reward
    out["position_ids"] = np.maximum(out["attention_mask"].cumsum(1) - 1, 0)
    out["prompts"] = out["input_ids"][:, :prompts].copy()
    out["responses"] = out["input_ids"][:, prompts:].copy()
    return out


def _empty(samples: Sequence[Sample], prompts: int, responses: int) -> dict[str, npt.NDArray[Any]]:
    count, total = len(samples), prompts + responses
    out: dict[str, npt.NDArray[Any]] = {
        "input_ids": np.full((count, total), PAD_TOKEN, np.int64),
        "attention_mask": np.zeros((count, total), np.int64),
        "response_mask": np.zeros((count, responses), np.int64),
        "rollout_log_probs": np.zeros((count, responses), np.float32),
    }
    if any(sample.meta.reward is not None for sample in samples):
        out["rm_scores"] = np.zeros((count, responses), np.float32)
    routes = samples[0].meta.routes
    if routes is not None:
        out["routed_experts"] = np.zeros((count, total, routes.layers, routes.k), np.int16)
    return out


def _write(path: Path, samples: Sequence[Sample]) -> None:
    from safetensors.numpy import save_file

    save_file(batch_of(samples), path)


def _read(path: Path, metas: Sequence[SampleMeta]) -> list[Sample]:
    from safetensors.numpy import load_file

    batch = load_file(path)
    prompts, found = batch["prompts"].shape[1], []
    for row, meta in enumerate(metas):
        start, length = prompts - meta.prompt_len, meta.tokens - meta.prompt_len
        routes = batch["routed_experts"][row, start:] if meta.routes else None
        found.append(
            sample_of(
                meta,
                batch["input_ids"][row, start : start + meta.tokens],
                batch["response_mask"][row, :length],
                batch["rollout_log_probs"][row, :length],
                routes,
                valid=None if routes is None else np.ones(meta.tokens - 1, np.bool_),
            )
        )
    return found


FORMAT = Format(
    name="verl",
    write=_write,
    read=_read,
    carries=whole_routes,
    shard_name="shard-{:05d}.safetensors",
)

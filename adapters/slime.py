"""slime and miles: what they train from with ``--load-debug-rollout-data``.

Checked against THUDM/slime ``slime/utils/types.py`` at commit 0d234f3 and radixark/miles
``miles/utils/types.py`` at commit 002ce70, which share it: ``torch.save({"rollout_id",
"samples"})`` with ``Sample.to_dict()`` of each sample, loaded by ``--load-debug-rollout-data
OUT/rollout_{rollout_id}.pt``. Neither is on PyPI, so the tests hold the file against the invariants
that miles' ``Sample.validate`` states: ``loss_mask`` and ``rollout_log_probs`` have
``response_length`` entries, ``rollout_routed_experts`` is int32 [n - 1, L, K].

Both replay every row of ``rollout_routed_experts`` (slime gathers it as it is, miles fills a row of
-1 with experts 0 .. K-1), so a sample with a missing row is written without routes. ``reward`` is
None where none was given: set it before training. ``group_index`` is None: which trajectories
answer the same prompt is the trainer's to say.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from driftgate.adapters.export_base import Format, padded_routes, sample_of, whole_routes
from driftgate.samples import Sample, SampleMeta

__all__ = ["FORMAT", "MILES", "sample_dict"]

STATUS = {"length": "truncated", "abort": "aborted", None: "aborted"}
"""``Sample.Status`` of a finish reason; any other has completed."""


def sample_dict(sample: Sample, index: int) -> dict[str, Any]:
    """``Sample.to_dict()`` of slime; fields that are not named here take slime's defaults."""
    prompt, spans = sample.meta.prompt_len, sample.meta.spans
    routes = sample.routes
    return {
        "index": index,
        "group_index": None,
        "prompt": "",
        "tokens": sample.tokens.tolist(),
        "response": "",
        "response_length": sample.response_len,
        "reward": sample.meta.reward,
        "loss_mask": sample.mask[prompt:].astype(int).tolist(),
        "rollout_log_probs": sample.logprobs[prompt:].tolist(),
        "rollout_routed_experts": None
        if routes is None
        else padded_routes(sample, sample.meta.tokens - 1, np.int32),
        "weight_versions": [s.weight_version for s in spans if s.weight_version != "unknown"],
        "status": STATUS.get(spans[-1].finish_reason, "completed"),
        "metadata": {"driftgate_sample": sample.meta.sample_id},
        "session_id": sample.meta.trajectory,
    }


def _write(path: Path, samples: Sequence[Sample]) -> None:
    import torch

    rollout_id = int(path.stem.rpartition("_")[2])  # the shard's number, as slime names its files
    rows = [sample_dict(sample, index) for index, sample in enumerate(samples)]
    torch.save({"rollout_id": rollout_id, "samples": rows}, path)


def _read(path: Path, metas: Sequence[SampleMeta]) -> list[Sample]:
    import torch
    from numpy._core.multiarray import _reconstruct

    # What a numpy array pickles to, and nothing that runs code.
    arrays: list[Any] = [_reconstruct, np.ndarray, np.dtype, np.dtypes.Int32DType, codecs.encode]
    with torch.serialization.safe_globals(arrays):
        rows = torch.load(path, weights_only=True)["samples"]
    return [
        sample_of(
            meta,
            row["tokens"],
            row["loss_mask"],
            row["rollout_log_probs"],
            row["rollout_routed_experts"],
        )
        for meta, row in zip(metas, rows, strict=True)
    ]


FORMAT = Format(
    name="slime",
    write=_write,
    read=_read,
    carries=whole_routes,
    shard_name="rollout_{}.pt",
    route_bytes=4,
)

MILES = replace(FORMAT, name="miles")

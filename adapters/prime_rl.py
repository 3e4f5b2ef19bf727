"""prime-rl: a msgpack list of ``TrainingSample``, the struct that its packer takes.

Checked against PrimeIntellect-ai/prime-rl ``src/prime_rl/transport/types.py`` in its flat layout
(pull request 2763) with the fields up to ``branch_index`` that followed ``sampling_mask`` (pull
request 3431, September 2026). The struct is positional (``array_like``), so its order is the
contract and our twin of it below must be changed with theirs. prime-rl is not on PyPI: the tests
hold the bytes against that order.

``routed_experts`` has n rows: the last, which no logit depends on, repeats experts 0 .. K-1, all
different as a router's are. prime-rl replays every row, so a sample with a missing one is written
without routes. ``advantages`` are not ours to compute and stay unset; the reward is in the meta
file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from driftgate.adapters.export_base import Format, sample_of, whole_routes
from driftgate.samples import Sample, SampleMeta
from driftgate.temperature import effective_temperature

__all__ = ["FORMAT", "RoutedExperts", "TrainingSample"]

ENV_NAME = "driftgate"


class RoutedExperts(msgspec.Struct, array_like=True, gc=False, omit_defaults=True):
    """Expert ids [n, L, K] as bytes."""

    data: bytes
    shape: list[int]
    dtype: str


class TrainingSample(msgspec.Struct, array_like=True, gc=False, omit_defaults=True):
    """prime-rl's fields, in its order; a field that we never set has type None."""

    token_ids: list[int]
    mask: list[bool]
    logprobs: list[float]
    temperatures: list[float]
    env_name: str
    ref_logprobs: None = None
    mm_refs: None = None
    routed_experts: RoutedExperts | None = None
    mm_token_type_ids: None = None
    rl_weights: None = None
    ce_weights: None = None
    ref_kl_weights: None = None
    advantages: None = None
    sampling_mask: None = None
    trace_id: str | None = None
    branch_index: int | None = None


def _training_sample(sample: Sample) -> TrainingSample:
    temperatures = np.ones(sample.meta.tokens)
    for span in sample.meta.spans:
        # prime-rl divides its logits by it: that of the density that the logprobs are of.
        known = span.logprobs_temperature
        temperatures[span.start : span.end] = (
            effective_temperature(span.temperature) if known is None else known
        )
    return TrainingSample(
        token_ids=sample.tokens.tolist(),
        mask=sample.mask.tolist(),
        logprobs=sample.logprobs.tolist(),
        temperatures=temperatures.tolist(),
        env_name=ENV_NAME,
        routed_experts=_routed(sample),
        trace_id=sample.meta.sample_id,
    )


def _routed(sample: Sample) -> RoutedExperts | None:
    if sample.routes is None:
        return None
    _, layers, k = sample.routes.shape
    last = np.broadcast_to(np.arange(k, dtype=sample.routes.dtype), (1, layers, k))
    rows = np.concatenate([sample.routes, last])
    return RoutedExperts(rows.tobytes(), list(rows.shape), rows.dtype.name)


def _write(path: Path, samples: Sequence[Sample]) -> None:
    path.write_bytes(msgspec.msgpack.encode([_training_sample(sample) for sample in samples]))


def _read(path: Path, metas: Sequence[SampleMeta]) -> list[Sample]:
    rows = msgspec.msgpack.decode(path.read_bytes(), type=list[TrainingSample])
    found = []
    for meta, row in zip(metas, rows, strict=True):
        routed = row.routed_experts
        routes = (
            None
            if routed is None
            else np.frombuffer(routed.data, routed.dtype).reshape(routed.shape)
        )
        known = None if routed is None else np.ones(meta.tokens - 1, np.bool_)
        found.append(sample_of(meta, row.token_ids, row.mask, row.logprobs, routes, valid=known))
    return found


FORMAT = Format(
    name="prime-rl",
    write=_write,
    read=_read,
    carries=whole_routes,
    shard_name="shard-{:05d}.msgpack",
)

"""Parquet and Hugging Face datasets: a row a sample, for offline work on states, actions, rewards.

State is what stands before a sampled token: ``tokens`` where ``mask`` is false, and ``request``,
the conversation as JSON. Action is ``tokens`` where ``mask`` is true with their ``logprobs``, and
``response``. Routes are one flat list a row with their shape beside it, and ``routes_valid`` says
which positions are known. Written with pyarrow (26.0); read by pyarrow, pandas, polars, DuckDB, and
``datasets.load_dataset(OUT)`` (datasets 5.2), for which the format ``hf`` adds the card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from driftgate.adapters.export_base import Format, sample_of
from driftgate.samples import Sample, SampleMeta

__all__ = ["FORMAT", "HF"]

CARD = """---
configs:
- config_name: default
  data_files: "data/*.parquet"
---

Written by `driftgate export --format hf`: a row a sample; the columns are explained in driftgate's
docs/exports.md.
"""


def _write(path: Path, samples: Sequence[Sample]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    routes = samples[0].meta.routes
    ids = pa.list_(pa.type_for_alias(routes.dtype if routes else "uint8"))
    columns = {
        "sample_id": ([s.meta.sample_id for s in samples], pa.string()),
        "trajectory": ([s.meta.trajectory for s in samples], pa.string()),
        "model": ([s.meta.model for s in samples], pa.string()),
        "request": ([s.request.decode() for s in samples], pa.string()),
        "response": ([s.response.decode() for s in samples], pa.string()),
        "tokens": ([s.tokens for s in samples], pa.list_(pa.int32())),
        "mask": ([s.mask for s in samples], pa.list_(pa.bool_())),
        "logprobs": ([s.logprobs for s in samples], pa.list_(pa.float32())),
        "prompt_len": ([s.meta.prompt_len for s in samples], pa.int32()),
        "reward": ([s.meta.reward for s in samples], pa.float64()),
        "routes": ([None if s.routes is None else s.routes.ravel() for s in samples], ids),
        "routes_shape": (
            [None if s.routes is None else list(s.routes.shape) for s in samples],
            pa.list_(pa.int32()),
        ),
        "routes_valid": ([s.routes_valid for s in samples], pa.list_(pa.bool_())),
        "flags": ([s.meta.flags for s in samples], pa.list_(pa.string())),
    }
    table = pa.table({name: pa.array(values, kind) for name, (values, kind) in columns.items()})
    pa.parquet.write_table(table, path, compression="zstd")


def _read(path: Path, metas: Sequence[SampleMeta]) -> list[Sample]:
    from pyarrow.parquet import read_table

    table = read_table(path, partitioning=None)
    return [_sample(meta, table, row) for row, meta in enumerate(metas)]


def _sample(meta: SampleMeta, table: Any, row: int) -> Sample:
    def values(name: str) -> Any:
        cell = table.column(name)[row]
        return cell.values.to_numpy(zero_copy_only=False) if cell.is_valid else None

    routes, shape = values("routes"), values("routes_shape")
    sample = sample_of(
        meta,
        values("tokens"),
        values("mask"),
        values("logprobs"),
        None if routes is None else np.asarray(routes).reshape(shape),
        valid=values("routes_valid"),
    )
    texts = {name: str(table.column(name)[row]).encode() for name in ("request", "response")}
    return replace(sample, request=texts["request"], response=texts["response"])


def _whole(sample: Sample) -> Sample:
    return sample


FORMAT = Format(
    name="parquet", write=_write, read=_read, carries=_whole, shard_name="shard-{:05d}.parquet"
)
HF = replace(FORMAT, name="hf", shard_name="data/train-{:05d}.parquet", readme=CARD)

"""Megatron-Core: routes as ``RouterReplay.set_replay_data`` takes them, for one rank of a layout.

Checked against megatron-core 0.16.1 (PyPI; NVIDIA/Megatron-LM),
``megatron/core/transformer/moe/router_replay.py``: a list with one int64 [local tokens, K] for each
local MoE layer, in the order the routers were built. A router sees its tokens sequence-major ([S,
B], row s * B + b), so its rank's part of the sequence is cut out first: context parallel gives a
rank chunks r and 2 * cp - 1 - r of 2 * cp, sequence parallel cuts what is left into tp runs, and
pipeline parallel leaves the layers of the rank's stage. Expert and data parallel change nothing.

Every row must name K different experts, for Megatron gathers each one. Padding and the last sampled
token, which no logprob depends on, get experts 0 .. K-1. A row that no engine gave has no such
stand-in: it is refused, or marked -1 for trainers that route such rows themselves (NeMo-RL does).

The export itself is the layout-free form: sequences end to end in one safetensors file.
`replay_data` then serves any rank. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from driftgate.adapters.export_base import Format, all_routes, padded_routes, sample_of
from driftgate.samples import Sample, SampleMeta

__all__ = ["FORMAT", "Rank", "local_layers", "replay_data"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """Where one process stands in a Megatron layout."""

    tp: int = 1
    tp_rank: int = 0
    sequence_parallel: bool = False
    pp: int = 1
    pp_rank: int = 0
    cp: int = 1
    cp_rank: int = 0


def replay_data(
    samples: Sequence[Sample],
    *,
    seq_len: int,
    num_layers: int,
    moe_layers: Sequence[int],
    rank: Rank = Rank(),
    missing: Literal["refuse", "sentinel"] = "refuse",
) -> list[I64]:
    """One int64 [local tokens, K] for each MoE layer of ``rank``: ``set_replay_data``'s argument.

    ``samples`` are the batch in order, each right-padded to ``seq_len`` (a multiple of 2 * cp, and
    of tp under sequence parallel). ``moe_layers`` are the model's layers with a router, 0-based of
    ``num_layers``; the engine's L axis counts either those or all layers. ValueError in words for
    anything that does not fit.
    """
    batch = np.stack([_full(sample, seq_len, missing) for sample in samples], axis=1)
    if batch.shape[2] not in (num_layers, len(moe_layers)):
        raise ValueError(
            f"routes of {batch.shape[2]} layers fit neither {len(moe_layers)} MoE layers nor all "
            f"{num_layers}"
        )
    everywhere = batch.shape[2] == num_layers
    here = _sequence_part(batch, rank)
    local = set(local_layers(num_layers, rank))
    return [
        np.ascontiguousarray(here[:, :, layer if everywhere else place]).reshape(-1, batch.shape[3])
        for place, layer in enumerate(moe_layers)
        if layer in local
    ]


def local_layers(num_layers: int, rank: Rank) -> range:
    """The rank's layers, 0-based, in stages of equal length. ValueError where they are not."""
    if num_layers % rank.pp:
        raise ValueError(f"{num_layers} layers in {rank.pp} pipeline stages are not of one length")
    each = num_layers // rank.pp
    return range(rank.pp_rank * each, (rank.pp_rank + 1) * each)


def _full(sample: Sample, seq_len: int, missing: str) -> I64:
    """[seq_len, L, K] of one sample, a valid dummy where nothing depends on the row."""
    name = sample.meta.sample_id
    if sample.routes is None or sample.routes_valid is None:
        raise ValueError(f"sample {name} has no routes; leave it out of replay")
    if sample.meta.tokens > seq_len:
        raise ValueError(f"sample {name} has {sample.meta.tokens} tokens, seq_len is {seq_len}")
    unknown = np.flatnonzero(~sample.routes_valid)
    if missing == "refuse" and len(unknown):
        raise ValueError(
            f"sample {name} has no routes at {len(unknown)} positions, the first {unknown[0]}; "
            "leave it out, or ask for missing='sentinel' if your trainer routes rows of -1 itself"
        )
    rows: I64 = padded_routes(sample, seq_len, np.int64)
    rows[sample.meta.tokens - 1 :] = np.arange(sample.routes.shape[2])
    return rows


def _sequence_part(batch: I64, rank: Rank) -> I64:
    """The rank's positions of [S, B, L, K], in the order that its router sees them."""
    if len(batch) % (2 * rank.cp if rank.cp > 1 else 1):
        raise ValueError(f"seq_len {len(batch)} is no multiple of 2 * cp = {2 * rank.cp}")
    if rank.cp > 1:
        chunks = np.split(batch, 2 * rank.cp)
        batch = np.concatenate([chunks[rank.cp_rank], chunks[2 * rank.cp - 1 - rank.cp_rank]])
    if not rank.sequence_parallel:
        return batch
    if len(batch) % rank.tp:
        raise ValueError(f"{len(batch)} positions of a rank are no multiple of tp = {rank.tp}")
    return np.split(batch, rank.tp)[rank.tp_rank]


def _write(path: Path, samples: Sequence[Sample]) -> None:
    from safetensors.numpy import save_file

    lengths = [sample.meta.tokens for sample in samples]
    out: dict[str, npt.NDArray[Any]] = {
        "cu_seqlens": np.cumsum([0, *lengths], dtype=np.int32),
        "tokens": np.concatenate([sample.tokens for sample in samples]),
        "mask": np.concatenate([sample.mask for sample in samples]),
        "logprobs": np.concatenate([sample.logprobs for sample in samples]),
    }
    first = samples[0].routes
    if first is not None:
        total = sum(lengths)
        out["routes"] = np.zeros((total, *first.shape[1:]), first.dtype)
        out["routes_valid"] = np.zeros(total, np.bool_)
        for start, sample in zip(out["cu_seqlens"].tolist(), samples, strict=False):
            rows = slice(start, start + sample.meta.tokens - 1)
            out["routes"][rows], out["routes_valid"][rows] = sample.routes, sample.routes_valid
    save_file(out, path)


def _read(path: Path, metas: Sequence[SampleMeta]) -> list[Sample]:
    from safetensors.numpy import load_file

    data = load_file(path)
    starts = data["cu_seqlens"].tolist()
    found = []
    for meta, start, end in zip(metas, starts[:-1], starts[1:], strict=True):
        rows = slice(start, end - 1)
        found.append(
            sample_of(
                meta,
                data["tokens"][start:end],
                data["mask"][start:end],
                data["logprobs"][start:end],
                data["routes"][rows] if meta.routes else None,
                valid=data["routes_valid"][rows] if meta.routes else None,
            )
        )
    return found


FORMAT = Format(
    name="megatron",
    write=_write,
    read=_read,
    carries=all_routes,
    shard_name="shard-{:05d}.safetensors",
)

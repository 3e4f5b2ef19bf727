"""Run by `science.replayed` under torchrun: an export's routes, forced into a spread-out model.

``megatron``: Megatron-Core's own `RouterReplay`, filled with the arrays that `replay_data` gives
this rank, and minus its own vocab-parallel loss: of driftgate only the export and the loading of
weights. ``fsdp``: the adapter for a training job's model. Both write [n - 1] log-probabilities by
sample.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from driftgate.adapters import formats
from driftgate.adapters.export_base import read_export
from driftgate.adapters.hf import model_limit
from driftgate.samples import Sample
from driftgate.teacher.attached import AttachedBackend
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.megatron import layout_of, start
from driftgate.teacher.reference import load_model
from driftgate.teacher.sequences import Replay, Sequence, Slice
from driftgate.testing.megatron_cpu import megatron_on_cpu

Found = dict[str, list[float]]


def by_megatron(samples: list[Sample], config: TeacherConfig) -> Found:
    """Under the exported routes, by Megatron's own code."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    from driftgate.adapters.megatron_routes import Rank, replay_data
    from driftgate.adapters.megatron_weights import build

    start(config)
    plain = load_model(config)
    replaying = {"moe_enable_routing_replay": True}
    model = build(plain, layout_of(config) | replaying, model_limit(plain)).eval()
    tp = config.tensor_parallel
    rank = Rank(
        tp=tp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        sequence_parallel=config.sequence_parallel,
    )
    layers = plain.config.num_hidden_layers
    found: Found = {}
    for sample in samples:
        length = -(-sample.meta.tokens // tp) * tp
        rows = replay_data(
            [sample], seq_len=length, num_layers=layers, moe_layers=range(layers), rank=rank
        )
        RouterReplay.set_replay_data([torch.from_numpy(one) for one in rows])
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        ids = torch.zeros(1, length, dtype=torch.int64)
        ids[0, : sample.meta.tokens] = torch.from_numpy(sample.tokens).long()
        hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu_(1)
        with torch.no_grad():
            loss = model(ids, torch.arange(length)[None], hidden, labels=ids.roll(-1, 1))
        found[sample.meta.sample_id] = (-loss[0, : sample.meta.tokens - 1]).tolist()
    RouterReplay.clear_global_router_replay_instances()
    parallel_state.destroy_model_parallel()
    return found


def by_fsdp(samples: list[Sample], config: TeacherConfig) -> Found:
    """Under the exported routes, by the adapter of a job that called ``fully_shard``."""
    from torch.distributed.fsdp import fully_shard

    from driftgate.adapters.fsdp import attach

    model = load_model(config)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    backend = AttachedBackend(attach(model), name="job")
    results = backend.score_batch([_sequence(sample) for sample in samples])
    return {result.trace_id: result.logprobs.tolist() for result in results}


def _sequence(sample: Sample) -> Sequence:
    assert sample.routes is not None
    assert sample.routes_valid is not None
    whole = Slice(trace_id=sample.meta.sample_id, prompt_len=1, response_ids=sample.tokens[1:])
    layers = sample.routes.shape[1]
    given = np.repeat(sample.routes_valid[:, None], layers, 1)
    replay = Replay(routes=sample.routes, given=given)
    return Sequence(ids=sample.tokens[:-1], slices=(whole,), replay=replay)


def main(out: str, export: str, work: str) -> None:
    """Every named piece of ``work``: a `TeacherConfig`'s fields and ``by``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    samples = read_export(Path(export), formats.load("megatron"))
    ways: dict[str, Any] = {"megatron": by_megatron, "fsdp": by_fsdp}
    found = {}
    for name, fields in json.loads(work).items():
        config = msgspec.convert({"store": "unused", **fields}, TeacherConfig)
        found[name] = ways[config.backend](samples, config)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    with megatron_on_cpu():
        main(*sys.argv[1:])

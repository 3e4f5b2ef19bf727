"""Run by test_megatron under torchrun: scores the same sequences with Megatron-Core in many layouts
and with plain Hugging Face, and writes how far they are apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from driftgate.adapters.megatron import attach
from driftgate.teacher.attached import AttachedBackend
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.megatron import build_model
from driftgate.teacher.reference import ReferenceBackend
from driftgate.testing.megatron_cpu import megatron_on_cpu
from tests.teacher.fsdp_ranks import difference, sequences

NAMES = ("logprobs", "entropy", "at_temperature", "routes", "margins")


def compare(config: TeacherConfig, wanted: list[Any]) -> dict[str, float]:
    backend = AttachedBackend(attach(build_model(config)), name="tiny")
    ours = backend.score_batch(sequences())
    backend.close()
    parallel_state.destroy_model_parallel()
    if backend.rank:
        return {}
    assert [a.trace_id for a in ours] == [b.trace_id for b in wanted]
    assert all(a.layer_ids == b.layer_ids for a, b in zip(ours, wanted, strict=True))
    found = {name: difference(name, ours, wanted) for name in NAMES}
    return {"slices": len(ours), "ordered": backend.trainer.routes_ordered, **found}


def main(out: str, work: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, dict[str, float]] = {}
    references: dict[tuple[str, str], Any] = {}
    for name, given in json.loads(work).items():
        config = msgspec.convert({"store": "unused", "backend": "megatron", **given}, TeacherConfig)
        key = config.model, config.dtype
        if dist.get_rank() == 0 and key not in references:
            plain = TeacherConfig(store="unused", model=config.model, dtype=config.dtype)
            references[key] = ReferenceBackend.load(plain).score(sequences())
        found[name] = compare(config, references.get(key))
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    with megatron_on_cpu():
        main(*sys.argv[1:])

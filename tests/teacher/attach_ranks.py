"""Run by test_attach under torchrun: a training job of two FSDP2 ranks that is visited between two
steps, and writes what the visit found and what it changed."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from driftgate.adapters.fsdp import attach
from driftgate.errors import TeacherError
from driftgate.teacher.attached import AttachedBackend
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.reference import ReferenceBackend, load_model
from tests.teacher.fsdp_ranks import difference, sequences

NAMES = ("logprobs", "entropy", "at_temperature", "routes", "margins")


def job(model_dir: str) -> Any:
    """A model in the middle of training: gradients, training mode, one part of it frozen."""
    config = TeacherConfig(store="unused", model=model_dir, dtype="float32")
    model = load_model(config)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.train()
    model.model.layers[0].eval()
    step(model)
    return model


def step(model: Any) -> torch.Tensor:
    ids = torch.arange(400, 440)[None] + dist.get_rank()
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def state(model: torch.nn.Module) -> dict[str, str]:
    found = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is left gathered"
        found[f"parameter {name}"] = digest(parameter)
        found[f"gradient {name}"] = digest(parameter.grad)
    found |= {f"buffer {name}": digest(one) for name, one in model.named_buffers()}
    for name, module in model.named_modules():
        hooks = [len(v) for k, v in vars(module).items() if k.endswith("_hooks")]
        found[f"module {name}"] = f"{module.training} {hooks}"
    found["random"] = digest(torch.get_rng_state())
    found["grad mode"] = str(torch.is_grad_enabled())
    return found


def digest(tensor: Any) -> str:
    if tensor is None:
        return "none"
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    raw = local.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()


def visit(model_dir: str, store: str) -> dict[str, Any]:
    model = job(model_dir)
    before = state(model)
    backend = AttachedBackend(attach(model), name="policy")
    moe = backend.no_replay is None
    ours = backend.score_batch(sequences(replay=moe))
    report = backend.score_store(store, model=model_dir, weight_version="7")
    told = ""
    try:
        backend.score_store(store + "/nowhere", model="/nowhere")
    except (TeacherError, ValueError) as error:
        told = str(error)
    backend.close()
    after = state(model)
    step(model)
    here = {
        "changed": [key for key in before if before[key] != after[key]],
        "told": told,
        "trained_on": state(model) != after,
    }
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    if dist.get_rank():
        return {}
    config = TeacherConfig(store="unused", model=model_dir, dtype="float32")
    wanted = ReferenceBackend.load(config).score(sequences(replay=moe))
    assert report is not None
    return {
        "ranks": everywhere,
        "facts": len(before),
        "scored": report.scored,
        "no_replay": backend.no_replay,
        "trainer": backend.trainer.settings
        | {"dtype": backend.trainer.dtype, "ordered": str(backend.trainer.routes_ordered)},
        **{name: difference(name, ours, wanted) for name in NAMES},
    }


def main(out: str, *stores: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for given in stores:
        model_dir, store = given.split(":")
        found[Path(model_dir).name] = visit(model_dir, store)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

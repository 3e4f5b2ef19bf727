"""Run by test_megatron under torchrun: scores the same sequences with Megatron-Core in many layouts
and with plain Hugging Face, and writes how far they are apart.

The work is a JSON object of named layouts, each the fields of a ``TeacherConfig``, with ``also``
(more settings for Megatron's own config) and ``what``: ``compare``, ``replay`` (under given routes)
or ``leave`` (what of the model is different after a visit in the middle of a training job).
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from driftgate.adapters.hf import model_limit
from driftgate.adapters.megatron import MegatronModel, attach
from driftgate.adapters.megatron_weights import build
from driftgate.teacher.attached import AttachedBackend
from driftgate.teacher.base import SliceResult
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.megatron import layout_of, start
from driftgate.teacher.reference import ReferenceBackend, load_model
from driftgate.teacher.sequences import Replay, Sequence, Slice
from driftgate.testing.megatron_cpu import megatron_on_cpu
from tests.teacher.fsdp_ranks import difference

LENGTHS = (40, 333, 75, 9, 120)
"""An odd number of sequences of uneven lengths: copies of the model feed different ones at once,
one has to run a dummy, and most do not divide by two."""

NAMES = ("logprobs", "entropy", "at_temperature", "routes", "margins")


def sequences(model: Any) -> list[Sequence]:
    """Texts that the model itself samples: tokens of random texts have a logprob of -30, where
    float32 ends at 2e-6."""
    torch.manual_seed(0)
    fed = torch.arange(300, 300 + len(LENGTHS))[:, None]
    longest = max(LENGTHS)
    said = model.generate(fed, do_sample=True, max_new_tokens=longest, min_new_tokens=longest)
    made = []
    for length, row in zip(LENGTHS, said.numpy().astype(np.int32), strict=True):
        ids, half = row[:length], length // 2
        tail = Slice(
            trace_id=f"{length}.0", prompt_len=half, response_ids=ids[half:], temperature=0.7
        )
        head = Slice(trace_id=f"{length}.1", prompt_len=2, response_ids=ids[2:half], one_pass=True)
        made.append(Sequence(ids=ids[:-1], slices=(tail, head)))
    return made


def forced(sequence: Sequence, model: Any) -> Sequence:
    """The sequence with routes that nobody would choose, at two thirds of the cells."""
    generator = np.random.default_rng(len(sequence.ids))
    experts, k = model.config.num_experts, model.config.num_experts_per_tok
    shape = len(sequence.ids), sum(hasattr(one.mlp, "gate") for one in model.model.layers)
    routes = generator.random((*shape, experts)).argsort(-1)[..., :k].astype(np.uint8)
    return replace(sequence, replay=Replay(routes=routes, given=generator.random(shape) < 2 / 3))


def under_routes(model: Any, sequence: Sequence) -> npt.NDArray[np.float64]:
    """Logprobs of the first slice by Hugging Face with its routers' answers replaced; independent
    of the product's code, in float64 after the logits."""
    assert sequence.replay is not None
    hooks = []
    gates = [one.mlp.gate for one in model.model.layers if hasattr(one.mlp, "gate")]
    for index, gate in enumerate(gates):
        routes = torch.from_numpy(sequence.replay.routes[:, index].astype(np.int64))
        given = torch.from_numpy(sequence.replay.given[:, index])[:, None]

        def swap(_m: Any, _a: Any, out: Any, routes: Any = routes, given: Any = given) -> Any:
            logits, _, own = out
            used = torch.where(given, routes, own)
            return logits, logits.gather(-1, used).softmax(-1), used

        hooks.append(gate.register_forward_hook(swap))
    with torch.no_grad():
        logits = model(torch.from_numpy(sequence.ids).long()[None]).logits[0].double()
    for hook in hooks:
        hook.remove()
    part = sequence.slices[0]
    target = torch.from_numpy(part.response_ids).long()[:, None]
    rows = logits[part.first : part.last].log_softmax(-1)
    return np.asarray(rows.gather(-1, target)[:, 0], np.float64)


class Plain:
    """The reference in rank 0, once per model and precision."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[Any, list[Sequence], list[SliceResult]]] = {}

    def of(self, config: TeacherConfig) -> tuple[Any, list[Sequence], list[SliceResult]]:
        key = config.model, config.dtype
        if key not in self._known:
            model = load_model(config)
            made = sequences(model)
            self._known[key] = model, made, ReferenceBackend(model, name="tiny").score(made)
        return self._known[key]


def compare(model: Any, config: TeacherConfig, plain: Plain) -> dict[str, Any]:
    backend = AttachedBackend(attach(model), name="tiny")
    if backend.rank:
        backend.score_batch([])
        return {}
    _, made, wanted = plain.of(config)
    ours = backend.score_batch(made)
    assert [a.trace_id for a in ours] == [b.trace_id for b in wanted]
    assert all(a.layer_ids == b.layer_ids for a, b in zip(ours, wanted, strict=True))
    found = {name: difference(name, ours, wanted) for name in NAMES}
    settings = backend.trainer.settings
    return {"slices": len(ours), "ordered": backend.trainer.routes_ordered, **settings, **found}


def replay(model: Any, config: TeacherConfig, plain: Plain) -> dict[str, Any]:
    backend = AttachedBackend(attach(model), name="tiny")
    if backend.rank:
        backend.score_batch([])
        return {}
    reference, made, native = plain.of(config)
    given = [forced(one, reference) for one in made]
    ours = backend.score_batch(given)
    tails = ours[::2]
    wanted = [under_routes(reference, one) for one in given]
    errors = [abs(a.logprobs - b).max() for a, b in zip(tails, wanted, strict=True)]
    moved = [abs(a.logprobs - b.logprobs).max() for a, b in zip(tails, native[::2], strict=True)]
    used = []
    for one, result in zip(given, tails, strict=True):
        assert one.replay is not None
        assert result.routes is not None
        rows = slice(one.slices[0].first, one.slices[0].last)
        same = (result.routes == one.replay.routes[rows]).all(-1)
        used.append(bool(same[one.replay.given[rows]].all()))
    return {"logprobs": float(max(errors)), "moved": float(min(moved)), "used": all(used)}


def leave(model: Any, config: TeacherConfig, plain: Plain) -> dict[str, Any]:
    """A visit in the middle of a job: in training mode, with gradients, dropout, a recording of
    its own, and a second model whose routers are on the process-wide list too."""
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    wrapped.train()
    model.decoder.layers[0].mlp.eval()  # a frozen part
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    for number, one in enumerate(RouterReplay.global_router_replay_instances):
        one.record_indices(torch.tensor([[number]]))
    # Sampling them draws random numbers: not part of the visit.
    asked = plain.of(config)[1] if dist.get_rank() == 0 else []
    before = state(wrapped)
    backend = AttachedBackend(attach([wrapped]), name="tiny")
    results = backend.score_batch(asked)
    backend.close()
    after = state(wrapped)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, [key for key in before if before[key] != after[key]])
    changed = [key for keys in everywhere for key in keys]
    return {"changed": changed, "facts": len(before), "slices": len(results)}


def state(model: torch.nn.Module) -> dict[str, str]:
    """Everything that a visit could change, each as something comparable."""
    found = {f"parameter {name}": digest(one) for name, one in model.named_parameters()}
    found |= {f"gradient {n}": digest(p.grad) for n, p in model.named_parameters()}
    found |= {f"buffer {name}": digest(one) for name, one in model.named_buffers()}
    for name, module in model.named_modules():
        hooks = [len(v) for k, v in vars(module).items() if k.endswith("_hooks")]
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str | type(None))
        }
        found[f"module {name}"] = f"{plain} {hooks}"
    instances = RouterReplay.global_router_replay_instances
    said = [(id(one), one.router_replay_action, one.recorded_topk_idx) for one in instances]
    found["router replay"] = str(said)
    found["random"] = digest(torch.get_rng_state())
    found["tracker"] = str(tensor_parallel.get_cuda_rng_tracker().get_states())
    found["grad mode"] = str(torch.is_grad_enabled())
    return found


def digest(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "none"
    return hashlib.sha256(
        tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def broken(adapter: MegatronModel) -> None:
    """Swap the norms of queries and keys: a wrong mapping that only values can show."""
    attention = adapter._model.decoder.layers[0].self_attention
    query, key = attention.q_layernorm, attention.k_layernorm
    attention.q_layernorm, attention.k_layernorm = key, query


def made_model(config: TeacherConfig, also: dict[str, Any]) -> Any:
    start(config)
    plain = load_model(config)
    return build(plain, layout_of(config) | also, model_limit(plain))


def main(out: str, work: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, dict[str, Any]] = {}
    plain = Plain()
    actions: dict[str, Any] = {"compare": compare, "replay": replay, "leave": leave}
    for name, asked in json.loads(work).items():
        given = copy.copy(asked)
        what, also = given.pop("what", "compare"), given.pop("also", {})
        fault = given.pop("fault", False)
        config = msgspec.convert({"store": "unused", "backend": "megatron", **given}, TeacherConfig)
        model = made_model(config, also)
        if fault:
            broken(attach(model))
        found[name] = actions[what](model, config, plain)
        parallel_state.destroy_model_parallel()
        RouterReplay.clear_global_router_replay_instances()
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    with megatron_on_cpu():
        main(*sys.argv[1:])

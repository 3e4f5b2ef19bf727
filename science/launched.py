"""Layouts of the trainer: FSDP2 and Megatron-Core under torchrun against plain Hugging Face.

The same for `attach`, in the middle of a training job, which must be left as it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from driftgate.storage import Writer
from driftgate.testing.checkpoints import CheckpointKind, make_checkpoint
from examples.temperature_trap import Said, trace
from science.table import Row, exactly, worst
from tests.teacher.families import CONFIGS, make_family

__all__ = ["TIMEOUT_S", "attached", "driftgate", "layouts", "torchrun"]

FP32 = 1e-5
"""Nats. A wrong mapping of weights is 75 times as far off or more."""
TIMEOUT_S = 900
"""The longest launch takes a minute on a machine with nothing else to do."""

TP, PP, EP, SP = "tensor_parallel", "pipeline_parallel", "expert_parallel", "sequence_parallel"
DENSE: dict[str, dict[str, Any]] = {
    "data parallel 2": {},
    "TP 2": {TP: 2},
    "TP 2 + SP": {TP: 2, SP: True},
    "PP 2": {PP: 2},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "EP 2": {EP: 2},
    "EP 2, allgather": {EP: 2, "also": {"moe_token_dispatcher_type": "allgather"}},
    "TP 2 + EP 2": {TP: 2, EP: 2},
    "TP 2 + SP + EP 2": {TP: 2, EP: 2, SP: True},
}
FOUR = {"TP 2 + SP + EP 2 + PP 2": {TP: 2, PP: 2, EP: 2, SP: True}}
ALONE: dict[str, dict[str, Any]] = {"world 1": {}}
REPLAYED = ("TP 2 + SP", "PP 2", "EP 2")
Work = dict[str, dict[str, Any]]


def torchrun(module: str, processes: int, *arguments: str) -> None:
    """Run ``module`` in so many processes on this machine. Raises RuntimeError where one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command += ["-m", module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if done.returncode:
        raise RuntimeError(f"{module} failed:\n{done.stderr[-3000:]}")


def driftgate(*arguments: str | Path) -> None:
    """The command as a user runs it. Raises RuntimeError where it fails."""
    command = [sys.executable, "-m", "driftgate.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if done.returncode:
        raise RuntimeError(f"driftgate {arguments[0]} failed:\n{done.stderr[-3000:]}")


def layouts(part: str, root: Path) -> Iterator[Row]:
    """Log-probabilities, entropy and routes of every layout, dense and MoE."""
    kinds: tuple[CheckpointKind, ...] = ("dense", "moe")
    yield from _fsdp(part, root, [str(make_checkpoint(root / kind, kind)) for kind in kinds])
    models = {kind: str(make_family(root / "families", kind)) for kind in CONFIGS}

    def placed(kind: str, layouts: Mapping[str, Mapping[str, Any]], **more: Any) -> Work:
        named = "MoE" if kind == "moe" else kind
        named += " under given routes" if more.get("what") == "replay" else ""
        return {f"{named}, {name}": {"model": models[kind], **one, **more}
                for name, one in layouts.items()}  # fmt: skip

    replay = {"what": "replay"}
    one = placed("dense", ALONE) | placed("moe", ALONE)
    two = placed("dense", DENSE) | placed("moe", DENSE | EXPERTS)
    two |= placed("moe", {name: (DENSE | EXPERTS)[name] for name in REPLAYED}, **replay)
    for kind in [name for name in CONFIGS if name not in ("dense", "moe")]:
        two |= placed(kind, {"TP 2": {TP: 2}})
    two["dense, norms swapped on purpose"] = {"model": models["dense"], "fault": True}
    four = placed("dense", {"TP 2 + SP + PP 2": {TP: 2, PP: 2, SP: True}})
    four |= placed("moe", FOUR) | placed("moe", FOUR, **replay)
    for processes, work in ((1, one), (2, two), (4, four)):
        yield from _megatron(part, root / f"megatron-{processes}.json", processes, work)


def attached(part: str, root: Path) -> Iterator[Row]:
    """A visit between two steps of a job: right numbers, and nothing of it is different after."""
    given = []
    for kind in ("dense", "moe"):
        with closing(Writer(root / f"visited-{kind}")) as writer:
            for n in range(3):
                said = Said([400, 401, 402], [403, 404 + n], {"raw": [-1.0, -1.0]})
                writer.submit(trace(said, n, "raw", "raw_logprobs")).result(timeout=30)
        checkpoint = make_checkpoint(root / kind, "dense" if kind == "dense" else "moe")
        given.append(f"{checkpoint}:{root / f'visited-{kind}'}")
    out = root / "attached.json"
    torchrun("tests.teacher.attach_ranks", 2, str(out), *given)
    for name, seen in json.loads(out.read_text()).items():
        what = f"fsdp.attach, {name}"
        apart = max(seen[key] for key in ("logprobs", "entropy", "at_temperature", "margins"))
        yield worst(part, what, apart, FP32, "Hugging Face")
        yield worst(part, f"{what}: expert ids", seen["routes"], 0.0, "Hugging Face")
        changed = sum(len(rank["changed"]) for rank in seen["ranks"])
        yield exactly(part, f"{what}: of {seen['facts']} facts a rank, changed", changed, 0)
        trained = sum(rank["trained_on"] for rank in seen["ranks"])
        yield exactly(part, f"{what}: ranks that trained on", trained, 2)
        yield exactly(part, f"{what}: traces of a store, scored in place", seen["scored"], 3)
    noisy = {"hidden_dropout": 0.1, "moe_enable_routing_replay": True}
    model = str(make_family(root / "families", "moe"))
    work = {"leave": {"model": model, TP: 2, SP: True, "also": noisy, "what": "leave"}}
    left = _ran(root / "left.json", 2, work)["leave"]
    what = "megatron.attach, MoE, TP 2 + SP, in a job with dropout"
    yield exactly(part, f"{what}: slices scored", left["slices"], 10)
    facts = f"{what}: of {left['facts']} facts a rank, changed"
    yield exactly(part, facts, len(left["changed"]), 0)


def _fsdp(part: str, root: Path, models: Sequence[str]) -> Iterator[Row]:
    out = root / "fsdp.json"
    torchrun("tests.teacher.fsdp_ranks", 2, str(out), *models)
    for name, seen in json.loads(out.read_text()).items():
        apart = max(seen[key] for key in ("logprobs", "entropy", "at_temperature", "margins"))
        yield worst(part, f"FSDP2 x 2, {name}", apart, 0.0, "Hugging Face")
        what = f"FSDP2 x 2, {name}: expert ids"
        yield worst(part, what, seen["routes"], 0.0, "Hugging Face")


def _megatron(
    part: str, out: Path, processes: int, work: Mapping[str, Mapping[str, Any]]
) -> Iterator[Row]:
    for name, seen in _ran(out, processes, work).items():
        if work[name].get("fault"):
            yield exactly(part, f"Megatron, {name}: is seen", seen["logprobs"] > 1e3 * FP32, True)
            continue
        if work[name].get("what") == "replay":
            yield worst(part, f"Megatron, {name}", seen["logprobs"], FP32, "Hugging Face")
            yield exactly(part, f"Megatron, {name}: the given experts ran", seen["used"], True)
            continue
        apart = max(seen[key] for key in ("logprobs", "entropy", "at_temperature", "margins"))
        yield worst(part, f"Megatron, {name}", apart, FP32, "Hugging Face")
        if seen["ordered"]:
            yield worst(part, f"Megatron, {name}: expert ids", seen["routes"], 0.0, "Hugging Face")


def _ran(out: Path, processes: int, work: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    given = {name: {"nproc": processes, "dtype": "float32", **one} for name, one in work.items()}
    torchrun("tests.teacher.megatron_ranks", processes, str(out), json.dumps(given))
    found: dict[str, Any] = json.loads(out.read_text())
    return found

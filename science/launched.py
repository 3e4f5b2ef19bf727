"""Layouts of the trainer: FSDP2 and Megatron-Core under torchrun against plain Hugging Face."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from driftgate.testing.checkpoints import CheckpointKind, make_checkpoint
from science.table import Row, exactly, worst
from tests.teacher.families import make_family

__all__ = ["layouts", "torchrun"]

FP32 = 1e-5
"""Nats. A wrong mapping of weights is 75 times as far off or more."""
TIMEOUT_S = 300

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


def layouts(part: str, root: Path) -> Iterator[Row]:
    """Log-probabilities, entropy and routes of every layout, dense and MoE."""
    kinds: tuple[CheckpointKind, ...] = ("dense", "moe")
    yield from _fsdp(part, root, [str(make_checkpoint(root / kind, kind)) for kind in kinds])
    models = {kind: str(make_family(root / "families", kind)) for kind in kinds}
    two = {f"dense, {name}": {"model": models["dense"], **one} for name, one in DENSE.items()}
    two |= {
        f"MoE, {name}": {"model": models["moe"], **one} for name, one in (DENSE | EXPERTS).items()
    }
    routed = {f"MoE under given routes, {name}": DENSE[name] for name in ("TP 2 + SP", "PP 2")}
    two |= {name: {"model": models["moe"], "what": "replay", **one} for name, one in routed.items()}
    two["dense, norms swapped on purpose"] = {"model": models["dense"], "fault": True}
    four = {f"MoE, {name}": {"model": models["moe"], **one} for name, one in FOUR.items()}
    for processes, work in ((2, two), (4, four)):
        yield from _megatron(part, root / f"megatron-{processes}.json", processes, work)


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
    given = {name: {"nproc": processes, "dtype": "float32", **one} for name, one in work.items()}
    torchrun("tests.teacher.megatron_ranks", processes, str(out), json.dumps(given))
    for name, seen in json.loads(out.read_text()).items():
        if given[name].get("fault"):
            yield exactly(part, f"Megatron, {name}: is seen", seen["logprobs"] > 1e3 * FP32, True)
            continue
        if given[name].get("what") == "replay":
            yield worst(part, f"Megatron, {name}", seen["logprobs"], FP32, "Hugging Face")
            continue
        apart = max(seen[key] for key in ("logprobs", "entropy", "at_temperature"))
        yield worst(part, f"Megatron, {name}", apart, FP32, "Hugging Face")
        if name.startswith("MoE"):
            yield worst(part, f"Megatron, {name}: expert ids", seen["routes"], 0.0, "Hugging Face")

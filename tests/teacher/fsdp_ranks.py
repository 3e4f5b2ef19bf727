"""Run by test_fsdp under torchrun: scores the same sequences sharded and not, and compares."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from driftgate.teacher.base import SliceResult
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.fsdp import FsdpBackend
from driftgate.teacher.reference import ReferenceBackend, load_model
from driftgate.teacher.sequences import Replay, Sequence, Slice

LENGTHS = (40, 333, 75, 9, 120)
"""An odd number of sequences of uneven lengths: one rank has to run a dummy."""


def sequences(*, replay: bool) -> list[Sequence]:
    """``replay``: every second one under routes of its own, so that a rank has one and its
    neighbour none."""
    generator = np.random.default_rng(0)
    made: list[Sequence] = []
    for length in LENGTHS:
        ids = generator.integers(0, 1990, length).astype(np.int32)
        half = length // 2
        tail = Slice(
            trace_id=f"{length}.0", prompt_len=half, response_ids=ids[half:], temperature=0.7
        )
        head = Slice(trace_id=f"{length}.1", prompt_len=2, response_ids=ids[2:half], one_pass=True)
        under = None
        if replay and len(made) % 2:
            routes = generator.random((length - 1, 4, 16)).argsort(-1)[..., :4].astype(np.uint8)
            under = Replay(routes=routes, given=generator.random((length - 1, 4)) < 0.9)
        made.append(Sequence(ids=ids[:-1], slices=(tail, head), replay=under))
    return made


def difference(name: str, ours: Seq[SliceResult], wanted: Seq[SliceResult]) -> float:
    worst = 0.0
    for a, b in zip(ours, wanted, strict=True):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            worst = max(worst, float(np.abs(x.astype(np.float64) - y.astype(np.float64)).max()))
    return worst


def main(out: str, *model_dirs: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, dict[str, float]] = {}
    for model_dir in model_dirs:
        for dtype in ("float32", "bfloat16"):
            config = TeacherConfig(
                store="unused",
                model=model_dir,
                backend="fsdp",
                nproc=2,
                dtype="float32" if dtype == "float32" else "bfloat16",
            )
            backend = FsdpBackend(
                load_model(config), name="tiny", checkpoint=None, device=torch.device("cpu")
            )
            if backend.rank > 0:
                backend.serve()
                continue
            moe = backend.no_replay is None
            ours = backend.score(sequences(replay=moe))
            backend.dismiss()
            wanted = ReferenceBackend.load(config).score(sequences(replay=moe))
            assert [a.trace_id for a in ours] == [b.trace_id for b in wanted]
            names = ("logprobs", "entropy", "at_temperature", "routes", "margins")
            found[f"{Path(model_dir).name} {dtype}"] = {
                "slices": float(len(ours)),
                "replays": float(moe),
                **{name: difference(name, ours, wanted) for name in names},
            }
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

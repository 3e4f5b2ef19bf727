"""R3: routes captured from vLLM, exported and forced into trainers, give the D_replay told.

The worker stored each trace's log-probabilities under the rollout's routes. Here the store is
exported as a user exports it (``driftgate export --format megatron``), read back, and run by plain
Hugging Face with its routers' answers replaced, by an FSDP2 job, and by Megatron-Core under its own
``RouterReplay``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from driftgate.adapters import formats
from driftgate.adapters.export_base import read_export
from driftgate.samples import Sample
from science.launched import EP, SP, TP, driftgate, torchrun
from science.rollouts import Rollouts
from science.table import Row, exactly, near, worst

__all__ = ["replayed"]

F64 = npt.NDArray[np.float64]
HUGGING_FACE = 1e-5
"""Nats, float32: the same operations, one forward for each sample."""
MEGATRON = 4e-5
"""Nats, float32: other operations in another order. This checkpoint's hidden values are so large
that float32 itself is off by about half of this, which a row measures in float64; on the
checkpoints of the layouts, whose values are small, 1e-5 holds."""
MOVED = 1e-3
"""Nats: what replay must change of some token, or nothing was proven."""

JOBS: dict[str, dict[str, Any]] = {
    "FSDP2 x 2, attached": {"backend": "fsdp"},
    "Megatron, EP 2": {"backend": "megatron", EP: 2},
    "Megatron, TP 2 + SP": {"backend": "megatron", TP: 2, SP: True},
}


def replayed(part: str, made: Rollouts, root: Path) -> Iterator[Row]:
    """Every sampled token of every exported sample."""
    out = root / "export"
    driftgate("export", "--format", "megatron", "--store", made.store, "--output", out)
    samples = read_export(out, formats.load("megatron"))
    whole = [one for one in samples if one.routes_valid is not None and one.routes_valid.all()]
    yield exactly(part, "exported samples with every route", len(whole), len(samples))
    told = {
        trace: score.logprobs_replay.astype(np.float64)
        for trace, score in made.scores.items()
        if score.logprobs_replay is not None
    }
    native = {trace: made.scores[trace].logprobs.astype(np.float64) for trace in told}
    moved = max(float(np.abs(told[trace] - native[trace]).max()) for trace in told)
    yield exactly(part, f"replay moves some token by more than {MOVED:g}", moved > MOVED, True)
    plain = _by_hugging_face(made.checkpoint, samples)
    fine = _by_hugging_face(made.checkpoint, samples, torch.float64)
    yield from _compared(part, "Hugging Face in float64", samples, fine, told, MEGATRON / 2)
    yield from _compared(part, "Hugging Face, routers replaced", samples, plain, told, HUGGING_FACE)
    work = {
        name: {"nproc": 2, "model": str(made.checkpoint), "dtype": "float32", **job}
        for name, job in JOBS.items()
    }
    found = root / "replayed.json"
    torchrun("science.ranks", 2, str(found), str(out), json.dumps(work))
    for name, values in json.loads(found.read_text()).items():
        theirs = {key: np.asarray(row) for key, row in values.items()}
        bound = MEGATRON if JOBS[name]["backend"] == "megatron" else HUGGING_FACE
        yield from _compared(part, name, samples, theirs, told, bound)


def _compared(
    part: str,
    name: str,
    samples: list[Sample],
    found: Mapping[str, F64],
    told: Mapping[str, F64],
    tolerance: float,
) -> Iterator[Row]:
    apart, ours, wanted = 0.0, list[F64](), list[F64]()
    for sample in samples:
        for span in sample.meta.spans:
            theirs = found[sample.meta.sample_id][span.start - 1 : span.end - 1]
            apart = max(apart, float(np.abs(theirs - told[span.trace_id]).max()))
            rollout = sample.logprobs[span.start : span.end].astype(np.float64)
            ours.append(theirs - rollout)
            wanted.append(told[span.trace_id] - rollout)
    tokens = sum(map(len, ours))
    yield worst(part, f"{name}: {tokens} tokens", apart, tolerance, "logprobs_replay as stored")
    mean = [float(np.abs(np.concatenate(one)).mean()) for one in (ours, wanted)]
    yield near(part, f"{name}: mean|D_replay|", *mean, rel=HUGGING_FACE)


def _by_hugging_face(
    checkpoint: Path, samples: list[Sample], dtype: torch.dtype = torch.float32
) -> dict[str, F64]:
    """[n - 1] nats by sample: softmax in float64 over whole logits, experts from the export."""
    # The grouped kernel takes no float64.
    experts = {"experts_implementation": "eager"} if dtype is torch.float64 else {}
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, **experts).eval()
    gates = [layer.mlp.gate for layer in model.model.layers]
    found = {}
    for sample in samples:
        assert sample.routes is not None
        hooks = []
        for index, gate in enumerate(gates):
            forced = torch.from_numpy(sample.routes[:, index].astype(np.int64))

            def swap(_m: Any, _a: Any, out: Any, forced: Any = forced) -> Any:
                logits, _, own = out
                # The same set in the model's own order, so that equal sets add up equally.
                same = (own.sort(-1)[0] == forced.sort(-1)[0]).all(-1, keepdim=True)
                used = torch.where(same, own, forced)
                return logits, logits.gather(-1, used).softmax(-1), used

            hooks.append(gate.register_forward_hook(swap))
        ids = torch.from_numpy(sample.tokens).long()
        with torch.no_grad():
            rows = model(ids[None, :-1]).logits[0].double().log_softmax(-1)
        for hook in hooks:
            hook.remove()
        found[sample.meta.sample_id] = rows.gather(-1, ids[1:, None])[:, 0].numpy()
    return found

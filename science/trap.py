"""`examples/temperature_trap`: a bias of nats that is only a convention, and how it is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from driftgate.testing.checkpoints import make_checkpoint
from examples.temperature_trap import run, sample
from science.table import Row, exactly, near, worst

__all__ = ["trap"]

CLOSE = 1e-5
"""Nats a token, float32: sampled with a cache, scored without."""
BIAS = 1e-3
"""Nats an answer of 48 tokens, summed in float32."""

SAID = {
    "records before T, says so": "converted: raw_logprobs_not_sampling_density",
    "records after T, taken for raw": "no: logprob_convention_mismatch",
    "records after T, says so": "converted: scored_at_temperature",
    "records after T, says nothing": "converted: logprobs_mode_inferred",
}


def trap(part: str, root: Path) -> Iterator[Row]:
    """The bias of the naive comparison, from the sampler's own two columns; and the verdicts."""
    answers = sample(make_checkpoint(root / "model", "dense", dtype="float32"))
    columns = [one.logprobs["raw"].astype(np.float64) - one.logprobs["scaled"] for one in answers]
    bias = float(np.mean([one.sum() for one in columns]))
    for found in run(root):
        scaled = "after" in found.name
        what = f"an engine that {found.name}: bias an answer at T = 1"
        yield near(part, what, found.naive_bias, bias if scaled else 0.0, rel=BIAS)
        wanted = SAID[found.name]
        code = wanted.partition(": ")[2]
        (verdict,) = found.verdicts
        ours = f"{verdict}: {code if code in found.reasons else ', '.join(found.reasons)}"
        yield exactly(part, f"an engine that {found.name}", ours, wanted)
        if verdict != "no":
            what = f"an engine that {found.name}: mean|D| as driftgate compares it"
            yield worst(part, what, found.mean_abs, CLOSE, "no drift")
    yield exactly(part, "the bias is several nats an answer", bias < -4, True)

"""``driftgate floor`` on a live engine and a trainer, and the same asked for by hand.

The command runs each side twice and stores what it finds. By hand is the engine's own JSON: the
answer read back as a prompt, and the same request again, without driftgate's code.
"""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from driftgate.floor import label_of
from driftgate.testing.engine import EngineProcess
from driftgate.trace import Engine, Trace, Trainer
from science.by_hand import F64
from science.launched import driftgate
from science.table import Row, exactly, near
from tests.e2e.support import stored_scores, stored_traces

__all__ = ["Floors", "floors", "measure"]

TRACES = 6
STORED = 1e-12
"""Relative: both sides subtract the same float32 numbers."""


@dataclass(frozen=True, slots=True)
class Floors:
    """A store with floors, and the engine's second numbers by label and trace, [R] nats."""

    store: Path
    second: dict[tuple[str, str], F64]


def measure(engine: EngineProcess, unscored: Path, checkpoint: Path, root: Path) -> Floors:
    """Run the command for both sides, then ask the engine by hand. RuntimeError if it fails."""
    store = Path(shutil.copytree(unscored, root / "floors"))
    arguments = ("floor", "--store", store, "--traces", str(TRACES))
    for side in (
        ("--engine", engine.url, "--concurrency", "1"),
        ("--model", checkpoint, "--dtype", "float32"),
    ):
        driftgate(*arguments, *side)
    traces = {one.meta.trace_id: one for one in stored_traces(store)}
    second = {}
    for floor in stored_scores(store, kind="noise_floor"):
        if isinstance(floor.meta.engine, Engine):
            label, trace = label_of(floor.meta.trainer), traces[floor.meta.trace_id]
            asked = _read_back(engine, trace) if label != "repeat" else _again(engine, trace)
            second[label, trace.meta.trace_id] = asked
    return Floors(store, second)


def floors(part: str, found: Floors) -> Iterator[Row]:
    """Every stored floor of the engine by value; the trainer twice is 0 to the last bit."""
    traces = {one.meta.trace_id: one for one in stored_traces(found.store)}
    kinds, trainer = Counter[str](), list[float]()
    for floor in stored_scores(found.store, kind="noise_floor"):
        assert floor.meta.bucket is not None
        values = floor.meta.bucket.metrics()
        if isinstance(floor.meta.engine, Trainer):
            largest = values["abs_log_ratio_max"]
            assert largest is not None
            trainer.append(largest)
            continue
        label, trace = label_of(floor.meta.trainer), traces[floor.meta.trace_id]
        kinds[label] += 1
        assert trace.logprobs is not None
        d = found.second[label, trace.meta.trace_id] - trace.logprobs[: len(floor.logprobs)]
        run = f"{trace.meta.trajectory}, step {trace.meta.step}, choice {trace.meta.choice}"
        what = f"engine {label}, {run}: mean|D|"
        yield near(part, what, values["abs_log_ratio_mean"], np.abs(d).mean(), rel=STORED)
        yield near(part, f"{what[:-7]}max|D|", values["abs_log_ratio_max"], np.abs(d).max(),
                   rel=STORED)  # fmt: skip
    yield exactly(part, "engine decode_vs_prefill: answers", kinds["decode_vs_prefill"], TRACES)
    yield exactly(
        part, "engine repeat: answers with a seed of their own", kinds["repeat"] > 0, True
    )
    yield exactly(part, "trainer repeat: answers", len(trainer), TRACES)
    yield exactly(part, "trainer repeat: largest |D| of one forward twice", max(trainer), 0.0)


def _asked(engine: EngineProcess, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{engine.url}/v1/completions",
        data=json.dumps({"model": engine.model, **body}).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]


def _ids(trace: Trace) -> tuple[list[int], list[int]]:
    assert trace.prompt_ids is not None
    assert trace.response_ids is not None
    return trace.prompt_ids.tolist(), trace.response_ids.tolist()


def _read_back(engine: EngineProcess, trace: Trace) -> F64:
    """The engine's logprobs of an answer that it is given as a prompt."""
    prompt, response = _ids(trace)
    body = {"prompt": prompt + response, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0}
    rows = _asked(engine, body)["prompt_logprobs"][len(prompt) :]
    said = [row[str(token)]["logprob"] for row, token in zip(rows, response, strict=True)]
    return np.asarray(said, np.float32).astype(np.float64)


def _again(engine: EngineProcess, trace: Trace) -> F64:
    """The same request with the same seed."""
    prompt, response = _ids(trace)
    asked = trace.meta.sampling
    body = {"prompt": prompt, "max_tokens": len(response), "seed": asked.seed, "logprobs": 0,
            "temperature": asked.temperature, "ignore_eos": True}  # fmt: skip
    said = _asked(engine, body)["logprobs"]["token_logprobs"]
    return np.asarray(said, np.float32).astype(np.float64)

"""What leaves driftgate, and what works beside it: exports read back, two workers on one queue."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np

from driftgate.adapters import formats
from driftgate.adapters.export_base import read_export, write_export
from driftgate.adapters.export_select import Selection
from driftgate.adapters.jsonl import rows as json_rows
from driftgate.adapters.jsonl import trace_of
from driftgate.commands.export import FormatOption
from driftgate.samples import Sample
from driftgate.storage import Reader
from science.launched import TIMEOUT_S
from science.rollouts import Rollouts
from science.table import Row, exactly
from tests.e2e.support import stored_scores

__all__ = ["exports", "two_workers"]


def exports(part: str, made: Rollouts, root: Path) -> Iterator[Row]:
    """Every format: samples that come back bit for bit as what the layout can hold."""
    with closing(Reader(made.store)) as reader:
        samples = list(Selection(reader).samples())
        back = [trace_of(row) for row in json_rows(reader)]
    same = sum(
        np.array_equal(a.logprobs, b.logprobs) and np.array_equal(a.routes, b.routes)  # type: ignore[arg-type]
        for a, b in zip(
            sorted(made.traces, key=lambda one: one.meta.trace_id),
            sorted(back, key=lambda one: one.meta.trace_id),
            strict=True,
        )
    )
    yield exactly(part, "jsonl: traces that come back", same, len(made.traces))
    for name in get_args(FormatOption):
        if name == "jsonl":
            continue
        fmt = formats.load(name)
        out = root / "exports" / name
        write_export(samples, out, fmt, left_out={}, damaged=[])
        found = read_export(out, fmt)
        same = sum(_same(a, fmt.carries(b)) for a, b in zip(found, samples, strict=True))
        yield exactly(part, f"{name}: samples that come back", same, len(samples))
    sampled = sum(int(one.mask.sum()) for one in samples)
    exported = {span.trace_id for one in samples for span in one.meta.spans}
    kept = [one for one in made.traces if one.meta.trace_id in exported]
    tokens = sum(len(one.response_ids) for one in kept if one.response_ids is not None)
    yield exactly(part, "sampled tokens under the masks, each once", sampled, tokens)


def _same(a: Sample, b: Sample) -> bool:
    for name in (field.name for field in fields(Sample)):
        x, y = getattr(a, name), getattr(b, name)
        arrays = isinstance(x, np.ndarray) and isinstance(y, np.ndarray)
        if not ((x.dtype == y.dtype and np.array_equal(x, y)) if arrays else x == y):
            return False
    return True


def two_workers(part: str, made: Rollouts, root: Path) -> Iterator[Row]:
    """Two processes on one store: nothing twice, nothing left when either of them has ended."""
    store = Path(shutil.copytree(made.unscored, root / "two"))
    command = [sys.executable, "-m", "driftgate.cli", "teach", "--store", str(store)]
    command += ["--model", str(made.checkpoint), "--dtype", "float32", "--weight-version", "step-7"]
    # As many threads as the single worker has here: sums of other threads differ in the last bit.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    first = [process.communicate(timeout=TIMEOUT_S) for process in running]
    del first
    yield exactly(part, "workers that ended well", [p.returncode for p in running].count(0), 2)
    scores = stored_scores(store, made.trainer.digest)
    times = Counter(score.meta.trace_id for score in scores)
    yield exactly(part, "traces scored", len(times), len(made.traces))
    yield exactly(part, "traces scored twice", sum(n > 1 for n in times.values()), 0)
    equal = sum(
        np.array_equal(score.logprobs, made.scores[score.meta.trace_id].logprobs)
        for score in scores
    )
    yield exactly(part, "scores with the single worker's numbers", equal, len(made.traces))

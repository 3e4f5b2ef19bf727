"""Bytes on disk and write speed of the store against JSON lines in one zstd stream."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pybase64
import zstandard

from benchmarks.report import Goal, Section, Table
from benchmarks.trajectories import Growth, trajectory
from driftgate.storage import Reader, Writer
from driftgate.trace import Trace

__all__ = ["run"]

BEFORE, RESPONSE = 500, 500
"""New tokens of a turn: tool output and template, then sampled ones."""

GOALS = {10: 5.0, 50: 20.0}
"""Times smaller than JSON lines, by turns."""

LEVEL = 3
"""zstd's own default, over the whole file as one stream."""


@dataclass(frozen=True, slots=True)
class Written:
    """What one way of storing cost."""

    size_bytes: int
    seconds: float


def logical_bytes(traces: Sequence[Trace]) -> int:
    """Memory of all arrays and bodies of all traces, as they come from the engine."""
    return sum(
        array.nbytes
        for trace in traces
        for array in (trace.prompt_ids, trace.response_ids, trace.logprobs, trace.routes)
        if array is not None
    ) + sum(len(trace.request) + len(trace.response) for trace in traces)


def json_line(trace: Trace) -> bytes:
    """What a straightforward logger writes for a call: everything, whole, as JSON."""
    assert trace.prompt_ids is not None
    assert trace.response_ids is not None
    assert trace.logprobs is not None
    line = {
        "meta": trace.meta,
        "prompt_token_ids": trace.prompt_ids.tolist(),
        "token_ids": trace.response_ids.tolist(),
        "logprobs": trace.logprobs.tolist(),
        "request": msgspec.Raw(trace.request),
        "response": msgspec.Raw(trace.response),
    }
    if trace.routes is not None:
        line["routed_experts"] = pybase64.b64encode_as_string(trace.routes.data)
        line["routed_experts_shape"] = trace.routes.shape
    return msgspec.json.encode(line) + b"\n"


def write_json_lines(traces: Sequence[Trace], path: Path) -> Written:
    """One line a call, one zstd stream, synced at the end."""
    started = time.perf_counter()
    with path.open("wb") as file:
        with zstandard.ZstdCompressor(level=LEVEL).stream_writer(file, closefd=False) as stream:
            for trace in traces:
                stream.write(json_line(trace))
        file.flush()
        os.fsync(file.fileno())
    return Written(path.stat().st_size, time.perf_counter() - started)


def write_store(traces: Sequence[Trace], root: Path) -> Written:
    """A fresh store, each trace durable before the next comes, as with an agent's calls.

    The size is that of the segments: the index can be rebuilt from them.
    """
    writer = Writer(root, durability="strict")
    try:
        started = time.perf_counter()
        for trace in traces:
            writer.submit(trace).result()
        seconds = time.perf_counter() - started
    finally:
        writer.close()
    return Written(sum(path.stat().st_size for path in (root / "segments").iterdir()), seconds)


def check(traces: Sequence[Trace], root: Path) -> None:
    """The last trace comes back bit for bit."""
    wanted = traces[-1]
    found = Reader(root).trace(wanted.meta.trace_id)
    for name in ("prompt_ids", "response_ids", "logprobs", "routes"):
        assert np.array_equal(getattr(wanted, name), getattr(found, name)), name
    assert (wanted.request, wanted.response) == (found.request, found.response)


def run(log: Callable[[str], None]) -> Section:
    """Both ways, for a short and a long trajectory."""
    rows, goals = [], []
    for turns, goal in GOALS.items():
        traces = trajectory(Growth(turns, BEFORE, RESPONSE, routes=True))
        logical = logical_bytes(traces)
        with tempfile.TemporaryDirectory(prefix="driftgate-bench-") as folder:
            lines = write_json_lines(traces, Path(folder) / "calls.jsonl.zst")
            log(f"{turns} turns: JSON lines {lines.size_bytes:,} bytes in {lines.seconds:.1f} s")
            store = write_store(traces, Path(folder) / "store")
            log(f"{turns} turns: store {store.size_bytes:,} bytes in {store.seconds:.1f} s")
            check(traces, Path(folder) / "store")
        for name, written in (("JSON lines + zstd", lines), ("driftgate", store)):
            rows.append(
                [
                    f"{turns} turns, {name}",
                    f"{logical / 1e6:,.1f}",
                    f"{written.size_bytes / 1e6:,.1f}",
                    f"{lines.size_bytes / written.size_bytes:.1f}",
                    f"{logical / 1e6 / written.seconds:,.0f}",
                    f"{lines.seconds / written.seconds:.1f}",
                ]
            )
        ratio = lines.size_bytes / store.size_bytes
        goals.append(
            Goal(
                f"bytes on disk of {turns} turns against JSON lines + zstd",
                f"at most 1/{goal:.0f}",
                f"1/{ratio:.1f}",
                ratio >= goal,
            )
        )
    columns = ["way", "logical MB", "MB on disk", "times smaller", "MB/s", "times faster"]
    caption = "A MoE trajectory (48 layers, 8 of 128 experts, 1,000 new tokens a turn)"
    return Section(
        name="storage",
        title="Storage",
        how=HOW,
        tables=[Table(caption, columns, rows)],
        goals=goals,
    )


HOW = f"""\
Random routes (the worst case: they hardly compress), ids distributed roughly as a tokenizer's,
random words. The JSON lines hold whole calls (ids, logprobs, base64 of the routes, request,
response) in one zstd stream of level {LEVEL}, written with msgspec and pybase64 and synced once at
the end. driftgate writes in `strict`: each trace is synced and indexed before the next is given;
bytes are those of its segments, the index is derived. *Logical* is the memory of all arrays and
bodies of all calls; MB/s are logical megabytes a second."""

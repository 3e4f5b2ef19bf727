"""A thousand streams for minutes, and what is left behind after thousands of calls."""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import numpy as np

from benchmarks.load import SPREAD_S, Agents, call, paced
from benchmarks.payloads import PACED, SMALL, Episode
from benchmarks.report import Goal, Section, Table
from benchmarks.stage import Cores, Stage, pinned, resident_bytes
from benchmarks.targets import Gateway, start_gateway, start_standin

__all__ = ["run"]

STREAMS, EVENTS_A_SECOND = 1000, 20
SAMPLE_S = 2.0
LEAK_ROUND = 200
CONNECTIONS = 16
WARM_S = SPREAD_S + PACED.steps * PACED.response / EVENTS_A_SECOND
"""Until every stream has been through a whole trajectory: caches of traces, ids and conversations
have bounds, and fill up to them on the way."""

RSS_GROWTH = 1.10
"""From then to the end."""

RSS_AT_S = (0, 60, 120, 240, 600)
SETTLE_S = 5.0
"""Idle connections to the engine are closed after three."""

BUCKET_US = 100
BUCKETS = 600_000

HOW = f"""\
One `driftgate serve` on a core of its own, capture on, group commit; a stand-in for the engine and
the load share the rest. {STREAMS:,} streams at once with {EVENTS_A_SECOND} events a second each,
one answer of 250 events after the other, in trajectories of 8. Memory is judged after
{WARM_S:.0f} s, when every stream has been through a trajectory, in runs of twice that. *Added* is
against the same load sent to the stand-in directly. Loop lag is the gateway's own
`driftgate_loop_lag_seconds`. The leak test makes small calls and looks, when all is stored and
idle, at resident memory, file descriptors and tasks."""


@dataclass(slots=True)
class Delays:
    """A histogram of ages, so that hours of events fit."""

    counts: np.ndarray[tuple[int], np.dtype[np.int64]] = field(
        default_factory=lambda: np.zeros(BUCKETS, np.int64)
    )

    def take(self, seen: list[int]) -> None:
        """Empty ``seen``, which another thread appends to."""
        count = len(seen)
        ages = np.array(seen[:count]) // BUCKET_US
        del seen[:count]
        np.add.at(self.counts, np.minimum(ages, BUCKETS - 1).astype(np.int64), 1)

    def percentile_ms(self, percent: float) -> float:
        """Upper edge of the bucket."""
        total = np.cumsum(self.counts)
        at = int(np.searchsorted(total, total[-1] * percent / 100))
        return (at + 1) * BUCKET_US / 1000


@dataclass(slots=True)
class Sampled:
    """What a thread beside the load reads."""

    delays: Delays = field(default_factory=Delays)
    resident: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the start, bytes."""
    answered: int = 0
    failure: str = ""


def streams(url: str, pid: int | None, seconds: float, cores: Cores) -> Sampled:
    """The load, sampled."""
    agents, sampled, seen = Agents(Episode(PACED), stream=True), Sampled(), list[int]()

    def load() -> None:
        try:
            sampled.answered = paced(
                agents,
                url,
                STREAMS,
                pace_ms=1000 / EVENTS_A_SECOND,
                seconds=seconds,
                seen=seen,
            )
        except (ConnectionError, TimeoutError) as error:
            sampled.failure = str(error)[:200] or type(error).__name__

    started = time.monotonic()
    if pid is not None:
        sampled.resident.append((0.0, resident_bytes(pid)))
    with pinned(cores.rest):
        thread = threading.Thread(target=load)
        thread.start()
        while thread.is_alive():
            thread.join(SAMPLE_S)
            sampled.delays.take(seen)
            if pid is not None:
                sampled.resident.append((time.monotonic() - started, resident_bytes(pid)))
    return sampled


def metrics(gateway: Gateway) -> str:
    """The gateway's."""
    with urlopen(f"{gateway.url}/metrics", timeout=60) as answer:
        return bytes(answer.read()).decode()


def lag_p99_ms(text: str) -> float:
    """Upper bound of the bucket that the 99th percentile lies in."""
    found = re.findall(r'^driftgate_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)', text, re.M)
    total = float(found[-1][1])
    return next(float(le) for le, count in found if float(count) >= 0.99 * total) * 1000


def number(text: str, name: str) -> int:
    """A gauge."""
    found = re.search(rf"^{name} (\S+)$", text, re.M)
    assert found is not None, name
    return int(float(found.group(1)))


@dataclass(frozen=True, slots=True)
class Left:
    """What a process holds."""

    calls: int
    resident: int
    files: int
    tasks: int


def left(calls: int, pid: int, gateway: Gateway) -> Left:
    """When it is idle."""
    time.sleep(SETTLE_S)
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Left(calls, resident_bytes(pid), files, number(metrics(gateway), "driftgate_tasks"))


def leaks(folder: Path, cores: Cores, total: int) -> list[Left]:
    """After a tenth of the calls and after all of them."""
    agents, made, seen = Agents(Episode(SMALL), stream=True), 0, list[Left]()
    with Stage(folder) as stage:
        upstream = start_standin(stage, SMALL, cores)
        gateway = start_gateway(stage, upstream, cores)
        for goal in (total // 10, total):
            while made < goal:
                with pinned(cores.rest):
                    call(agents, gateway.url, CONNECTIONS, calls=min(LEAK_ROUND, goal - made))
                gateway.answered = made = min(made + LEAK_ROUND, goal)
                gateway.drain()
            seen.append(left(made, stage.pid("driftgate"), gateway))
    return seen


def at(resident: list[tuple[float, int]], seconds: float) -> int | None:
    """Bytes at the first sample from then on; None where the run was over before."""
    return next((size for when, size in resident if when >= seconds), None)


def memory(resident: list[tuple[float, int]]) -> tuple[list[str], list[list[str]]]:
    """Columns and the row of the table: at some moments, and what a stream costs."""
    found = {f"{when} s": at(resident, when) for when in RSS_AT_S}
    sizes = [size for size in found.values() if size is not None]
    most = max(size for _, size in resident)
    cells = ["" if size is None else f"{size / 1e6:.0f}" for size in found.values()]
    each_kb = (most - sizes[0]) / STREAMS / 1e3
    return [*found, "most", "kB a stream"], [[*cells, f"{most / 1e6:.0f}", f"{each_kb:.0f}"]]


def flat(resident: list[tuple[float, int]]) -> list[Goal]:
    """Growth after the warm-up; nothing where the run was hardly longer than that."""
    warm, last = at(resident, WARM_S), resident[-1][1]
    if warm is None or resident[-1][0] < 2 * WARM_S:
        return []
    growth, wanted = last / warm, f"at most {RSS_GROWTH:.2f}"
    what = f"memory after {WARM_S:.0f} s of warm-up"
    return [Goal(what, wanted, f"{growth:.2f}", growth <= RSS_GROWTH)]


def run(folder: Path, *, full: bool) -> Section:
    """Directly, through the gateway, then the leak test."""
    cores, seconds = Cores.here(), 600.0 if full else 20.0
    pace_ms = 1000 / EVENTS_A_SECOND
    (folder / "streams").mkdir()
    (folder / "leaks").mkdir()
    with Stage(folder / "streams") as stage:
        upstream = start_standin(stage, PACED, cores, pace_ms=pace_ms)
        direct = streams(upstream, None, 20.0, cores)
        gateway = start_gateway(stage, upstream, cores)
        ours = streams(gateway.url, stage.pid("driftgate"), seconds, cores)
        gateway.answered = ours.answered
        gateway.drain()
        lag_ms = lag_p99_ms(metrics(gateway))
    first, last = leaks(folder / "leaks", cores, 20_000 if full else 2_000)
    rows = [
        [name, f"{one.answered:,}", f"{int(one.delays.counts.sum()):,}", one.failure or "0"]
        + [f"{one.delays.percentile_ms(p):.1f}" for p in (50, 99)]
        for name, one in (("direct", direct), ("driftgate", ours))
    ]
    added_ms = ours.delays.percentile_ms(99) - direct.delays.percentile_ms(99)
    after = [
        [f"{one.calls:,}", f"{one.resident / 1e6:.0f}", str(one.files), str(one.tasks)]
        for one in (first, last)
    ]
    return Section(
        name="soak",
        title="Load",
        how=HOW,
        tables=[
            Table("Streams", ["way", "answers", "events", "failed", "p50 ms", "p99 ms"], rows),
            Table("Resident MB of the gateway under streams", *memory(ours.resident)),
            Table("Left behind", ["calls", "resident MB", "files", "tasks"], after),
        ],
        goals=[
            Goal("failed streams", "0", ours.failure or "0", not ours.failure),
            Goal("answers without a trace", "0", str(gateway.lost), gateway.lost == 0),
            *flat(ours.resident),
            Goal(
                "files and tasks left",
                "no more",
                f"{last.files - first.files}, {last.tasks - first.tasks}",
                last.files <= first.files and last.tasks <= first.tasks,
            ),
        ],
        notes=[
            f"Added delay of an event: p99 {added_ms:+.1f} ms.",
            f"Loop lag: p99 at most {lag_ms:.0f} ms.",
            f"Streams for {seconds:.0f} s through the gateway, 20 s directly.",
        ],
    )

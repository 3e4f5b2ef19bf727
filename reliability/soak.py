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
from benchmarks.payloads import PACED, SMALL, Episode, Shape
from benchmarks.report import Goal, Section, Table
from benchmarks.stage import Cores, Stage, cpu_seconds, pinned, resident_bytes
from benchmarks.targets import Gateway, start_gateway, start_standin
from driftgate.storage import Reader

__all__ = ["run"]

STREAMS, EVENTS_A_SECOND = 1000, 20
GATEWAYS = 2
"""Processes on one store, each with its share of the streams: one Python process has one core."""

SAMPLE_S = 1.0
LEAK_ROUND = 200
CONNECTIONS = 16
WARM_S = SPREAD_S + PACED.steps * PACED.response / EVENTS_A_SECOND
"""Until every stream has been through a whole trajectory: caches of traces, ids and conversations
have bounds, and fill up to them on the way."""

RSS_GROWTH = 1.10
"""From then to the end."""

RSS_AT_S = (0, 60, 120, 240, 600)
COLUMNS = ["way", "answers", "events", "failed", "p50 ms", "p99 ms", "CPU us an event"]
SETTLED_S = 120.0
"""For what is queued at the end."""

SETTLE_S = 5.0
"""Idle connections to the engine are closed after three."""

SLACK = 8
"""Files and tasks that come and go: a thread that reads the index opens it for itself, and the look
is a task too. What is left by each of thousands of calls is more."""

BUCKET_US = 100
BUCKETS = 600_000


@dataclass(frozen=True, slots=True)
class Size:
    """Of a run."""

    seconds: float
    """Of streams through the gateways."""
    leak_calls: int
    direct_s: float = 20.0
    streams: int = STREAMS
    shape: Shape = PACED
    spread_s: float = SPREAD_S


FULL = Size(seconds=600.0, leak_calls=20_000)
SHORT = Size(seconds=20.0, leak_calls=2_000)

HOW = f"""\
{GATEWAYS} `driftgate serve` on one store, capture on, group commit; a stand-in for the engine and
the load beside them, none pinned. {STREAMS:,} streams at once with {EVENTS_A_SECOND} events a
second each, one answer of {PACED.response} events after the other, in trajectories of
{PACED.steps}. Memory is judged after {WARM_S:.0f} s, when every stream has been through a
trajectory, in runs of twice that. *Added* is against the same load sent to the stand-in directly.
The processor's time is that of each process over all its events. Loop lag is the gateways' own
`driftgate_loop_lag_seconds`. The leak test makes small calls and looks, when all is stored and
idle, at resident memory, file descriptors and tasks."""


@dataclass(slots=True)
class Delays:
    """A histogram of ages, so that hours of events fit."""

    counts: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def append(self, late_us: int) -> None:
        """One event."""
        self.counts[min(late_us // BUCKET_US, BUCKETS - 1)] += 1

    @property
    def events(self) -> int:
        """How many."""
        return sum(self.counts)

    def percentile_ms(self, percent: float) -> float:
        """Upper edge of the bucket."""
        total = np.cumsum(self.counts)
        at = int(np.searchsorted(total, total[-1] * percent / 100))
        return (at + 1) * BUCKET_US / 1000


@dataclass(slots=True)
class Load:
    """The streams, on a thread, and what was seen meanwhile."""

    size: Size
    delays: Delays = field(default_factory=Delays)
    resident: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the start, bytes of all gateways."""
    cpu_s: dict[str, float] = field(default_factory=dict)
    """Processor time of each process."""
    answered: int = 0
    failure: str = ""

    def send(self, urls: list[str], seconds: float) -> None:
        """On the thread."""
        agents, before = Agents(Episode(self.size.shape), stream=True), time.thread_time()
        try:
            self.answered = paced(
                agents,
                urls,
                self.size.streams,
                pace_ms=1000 / EVENTS_A_SECOND,
                seconds=seconds,
                seen=self.delays,
                spread_s=self.size.spread_s,
            )
        except (ConnectionError, TimeoutError) as error:
            self.failure = str(error)[:200] or type(error).__name__
        self.cpu_s["load"] = time.thread_time() - before

    def run(self, urls: list[str], pids: dict[str, int], seconds: float) -> None:
        """Send, and look at the processes."""
        gateways = [pid for name, pid in pids.items() if name != "engine"]
        thread = threading.Thread(target=self.send, args=(urls, seconds))
        before, started = {name: cpu_seconds(pid) for name, pid in pids.items()}, time.monotonic()
        thread.start()
        while thread.is_alive():
            if gateways:
                age_s = time.monotonic() - started
                self.resident.append((age_s, sum(map(resident_bytes, gateways))))
            thread.join(SAMPLE_S)
        for name, pid in pids.items():
            self.cpu_s[name] = cpu_seconds(pid) - before[name]

    def cpu_us(self) -> dict[str, float]:
        """Of each process, for an event."""
        events = max(1, self.delays.events)
        return {name: cpu_s * 1e6 / events for name, cpu_s in sorted(self.cpu_s.items())}


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


def unrecorded(gateways: list[Gateway], answered: int) -> int:
    """Answers without a whole trace, once nothing waits for storage."""
    deadline = time.monotonic() + SETTLED_S
    while any(number(metrics(one), "driftgate_store_queued_records") for one in gateways):
        if time.monotonic() > deadline:
            break
        time.sleep(SAMPLE_S / 10)
    reader = Reader(gateways[0].store)
    counts = reader.counts()
    reader.close()
    return max(answered - counts.traces, counts.trajectories - counts.complete)


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


def memory(resident: list[tuple[float, int]], streams: int) -> tuple[list[str], list[list[str]]]:
    """Columns and the row of the table: at some moments, and what a stream costs."""
    found = {f"{when} s": at(resident, when) for when in RSS_AT_S}
    most = max(size for _, size in resident)
    cells = ["" if size is None else f"{size / 1e6:.0f}" for size in found.values()]
    each_kb = (most - resident[0][1]) / streams / 1e3
    return [*found, "most", "kB a stream"], [[*cells, f"{most / 1e6:.0f}", f"{each_kb:.0f}"]]


def flat(resident: list[tuple[float, int]]) -> list[Goal]:
    """Growth after the warm-up; nothing where the run was hardly longer than that."""
    warm, last = at(resident, WARM_S), resident[-1][1]
    if warm is None or resident[-1][0] < 2 * WARM_S:
        return []
    growth, wanted = last / warm, f"at most {RSS_GROWTH:.2f}"
    what = f"memory after {WARM_S:.0f} s of warm-up"
    return [Goal(what, wanted, f"{growth:.2f}", growth <= RSS_GROWTH)]


def row(way: str, load: Load) -> list[str]:
    """Of the table of streams."""
    late = [f"{load.delays.percentile_ms(p):.1f}" for p in (50, 99)]
    busy = ", ".join(f"{name} {us:.0f}" for name, us in load.cpu_us().items())
    return [way, f"{load.answered:,}", f"{load.delays.events:,}", load.failure or "0", *late, busy]


def run(folder: Path, *, full: bool) -> Section:
    """As long as the document says, or a minute."""
    return measure(folder, FULL if full else SHORT)


def measure(folder: Path, size: Size) -> Section:
    """Directly, through the gateways, then the leak test."""
    everywhere = os.sched_getaffinity(0)
    cores = Cores(everywhere, everywhere)
    (folder / "streams").mkdir()
    (folder / "leaks").mkdir()
    direct, ours = Load(size), Load(size)
    with Stage(folder / "streams") as stage:
        upstream = start_standin(stage, size.shape, cores, pace_ms=1000 / EVENTS_A_SECOND)
        pids = {"engine": stage.pid("standin")}
        direct.run([upstream], pids, size.direct_s)
        names = [f"gateway {number}" for number in range(GATEWAYS)]
        gateways = [start_gateway(stage, upstream, cores, name=name) for name in names]
        pids |= {name: stage.pid(name) for name in names}
        ours.run([gateway.url for gateway in gateways], pids, size.seconds)
        lost = unrecorded(gateways, ours.answered)
        lag_ms = max(lag_p99_ms(metrics(gateway)) for gateway in gateways)
    cores_needed = sum(ours.cpu_us().values()) * size.streams * EVENTS_A_SECOND / 1e6
    held = memory(ours.resident, size.streams)
    first, last = leaks(folder / "leaks", Cores.here(), size.leak_calls)
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
            Table("Streams", COLUMNS, [row("direct", direct), row("driftgate", ours)]),
            Table("Resident MB of the gateways under streams", *held),
            Table("Left behind", ["calls", "resident MB", "files", "tasks"], after),
        ],
        goals=[
            Goal("failed streams", "0", ours.failure or "0", not ours.failure),
            Goal("answers without a trace", "0", str(lost), lost == 0),
            *flat(ours.resident),
            Goal(
                "files and tasks left",
                f"at most {SLACK} more",
                f"{last.files - first.files}, {last.tasks - first.tasks}",
                max(last.files - first.files, last.tasks - first.tasks) <= SLACK,
            ),
            reported("p99 added delay of an event", f"{added_ms:+.1f} ms"),
            reported("cores that all of it needs at this rate", f"{cores_needed:.2f}"),
            reported("p99 loop lag", f"at most {lag_ms:.0f} ms"),
        ],
        notes=[f"Streams for {size.seconds:.0f} s, directly for {size.direct_s:.0f} s."],
    )


def reported(what: str, measured: str) -> Goal:
    """A figure without a goal, which the list of runs has as well."""
    return Goal(what, "to be known", measured, met=True)

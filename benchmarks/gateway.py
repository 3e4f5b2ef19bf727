"""Requests a second and added delay of the gateway against aiohttp forwarding bytes and nginx."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import Request, urlopen

import msgspec
import numpy as np

from benchmarks.load import Agents, Rate, delays_us, drive
from benchmarks.payloads import ROUTES, TYPICAL, Episode, Shape
from benchmarks.report import Goal, Section, Table
from benchmarks.stage import Cores, Stage, pinned
from benchmarks.targets import (
    Gateway,
    start_forward,
    start_gateway,
    start_nginx,
    start_standin,
)

__all__ = ["run"]

CONNECTIONS = (1, 32, 256)
WINDOW_S = 1.5
WARM_S = 0.4
ROUNDS = 2
"""The ways are measured in turns, so that a change of the machine's mood meets all of them."""

STREAMS = 256
PACE_MS = 20.0

REFERENCE = "aiohttp bytes"
OURS = "driftgate"


@dataclass(slots=True)
class Way:
    """One way to the engine and what was measured on it, by number of connections."""

    name: str
    url: str
    gateway: Gateway | None = None
    done: dict[int, int] = field(default_factory=dict)
    window_s: dict[int, float] = field(default_factory=dict)
    latencies_s: dict[int, list[float]] = field(default_factory=dict)
    answered: dict[int, int] = field(default_factory=dict)
    durable_s: dict[int, float] = field(default_factory=dict)
    """From the first request until every trace of the run was on disk and indexed."""

    def add(self, connections: int, rate: Rate) -> None:
        """Count one run; for driftgate also wait for its store."""
        for sums, value in ((self.done, rate.in_window), (self.answered, rate.answered)):
            sums[connections] = sums.get(connections, 0) + value
        self.window_s[connections] = self.window_s.get(connections, 0.0) + rate.window_s
        self.latencies_s.setdefault(connections, []).extend(rate.latencies_s)
        if self.gateway is not None:
            self.gateway.answered += rate.answered
            took_s = self.gateway.drain() - rate.started
            self.durable_s[connections] = self.durable_s.get(connections, 0.0) + took_s

    def rate(self, connections: int) -> float:
        """Answers a second."""
        return self.done[connections] / self.window_s[connections]

    def durable_rate(self, connections: int) -> float | None:
        """Answers a second, the time to drain the queue counted; None where nothing is stored."""
        if connections not in self.durable_s:
            return None
        return self.answered[connections] / self.durable_s[connections]


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked for."""

    name: str
    shape: Shape
    stream: bool


WORKLOADS = (
    Workload("JSON, 8k prompt tokens, 500 out", TYPICAL, stream=False),
    Workload("SSE, the same, 500 events sent at once", TYPICAL, stream=True),
    Workload("JSON with routes, 4.4 MB", ROUTES, stream=False),
)


def start_ways(stage: Stage, upstream: str, cores: Cores, *, stream: bool) -> list[Way]:
    """Everything that is compared, running."""
    ways = [Way("engine directly", upstream), Way(REFERENCE, start_forward(stage, upstream, cores))]
    nginx = start_nginx(stage, upstream, cores, buffering=not stream)
    if nginx is not None:
        ways.append(Way("nginx", nginx))
    gateway = start_gateway(stage, upstream, cores)
    return [*ways, Way(OURS, gateway.url, gateway)]


def check(way: Way, episode: Episode, *, stream: bool) -> None:
    """One answer through ``way`` has the text that the engine sent, or ``AssertionError``."""
    body = b"".join(episode.request(0, stream=stream).fill(b"10000000"))
    head = {"content-type": "application/json"}
    with urlopen(Request(f"{way.url}/v1/chat/completions", body, head)) as answer:
        data = answer.read()
    if stream:
        events = data.decode().strip().split("\n\n")
        assert events[-1] == "data: [DONE]", events[-1]
        chunks = [msgspec.json.decode(event[len("data: ") :]) for event in events[:-1]]
        content = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    else:
        content = msgspec.json.decode(data)["choices"][0]["message"]["content"]
    assert content == episode.contents[0], f"{way.name} changed the answer"
    if way.gateway is not None:
        way.gateway.answered += 1


def measure(workload: Workload, cores: Cores, log: Callable[[str], None]) -> list[Way]:
    """Requests a second of every way at every number of connections."""
    episode = Episode(workload.shape)
    agents = Agents(episode, stream=workload.stream)
    with (
        tempfile.TemporaryDirectory(prefix="driftgate-bench-") as folder,
        Stage(Path(folder)) as stage,
    ):
        upstream = start_standin(stage, workload.shape, cores)
        ways = start_ways(stage, upstream, cores, stream=workload.stream)
        for way in ways:
            check(way, episode, stream=workload.stream)
        for connections in CONNECTIONS:
            for _ in range(ROUNDS):
                for way in ways:
                    with pinned(cores.rest):
                        rate = drive(agents, way.url, connections, warm_s=WARM_S, window_s=WINDOW_S)
                    log(f"{workload.name}: {way.name}, {connections}: {rate.per_second:.0f}/s")
                    way.add(connections, rate)
        return ways


def measure_delays(cores: Cores, log: Callable[[str], None]) -> list[tuple[str, list[int]]]:
    """Age of events on arrival, in us, by way."""
    agents = Agents(Episode(TYPICAL), stream=True)
    delays = []
    with (
        tempfile.TemporaryDirectory(prefix="driftgate-bench-") as folder,
        Stage(Path(folder)) as stage,
    ):
        upstream = start_standin(stage, TYPICAL, cores, pace_ms=PACE_MS)
        for way in start_ways(stage, upstream, cores, stream=True):
            with pinned(cores.rest):
                seen = delays_us(agents, way.url, STREAMS, spread_s=PACE_MS / 1000)
            log(f"{way.name}: {len(seen)} events")
            delays.append((way.name, seen))
            if way.gateway is not None:
                way.gateway.answered += STREAMS
                way.gateway.drain()
    return delays


def rate_table(workload: Workload, ways: list[Way]) -> Table:
    """One row for each way: requests a second and the ratio to the reference."""
    reference = next(way for way in ways if way.name == REFERENCE)
    rows = []
    for way in ways:
        row = [way.name]
        for connections in CONNECTIONS:
            rate = way.rate(connections)
            p99_ms = 1000 * float(np.percentile(way.latencies_s[connections], 99))
            row += [f"{rate:,.0f}", f"{rate / reference.rate(connections):.2f}", f"{p99_ms:.1f}"]
        rows.append(row)
        if way.gateway is not None:
            row = [f"{way.name}, until all is durable"]
            for connections in CONNECTIONS:
                durable = way.durable_rate(connections) or 0.0
                row += [f"{durable:,.0f}", f"{durable / reference.rate(connections):.2f}", ""]
            rows.append(row)
    if not any(way.name == "nginx" for way in ways):
        rows.append(["nginx: not installed", *[""] * 3 * len(CONNECTIONS)])
    columns = ["way"]
    for connections in CONNECTIONS:
        columns += [f"{connections} conn: req/s", "ratio", "p99 ms"]
    return Table(workload.name, columns, rows)


def delay_table(delays: list[tuple[str, list[int]]]) -> Table:
    """p50 and p99 of every way and what it adds to the direct one."""
    ms = {name: np.percentile(seen, [50, 99]) / 1000 for name, seen in delays}
    direct = ms[delays[0][0]]
    rows = [
        [name, f"{p50:.2f}", f"{p99:.2f}", f"{p50 - direct[0]:+.2f}", f"{p99 - direct[1]:+.2f}"]
        for name, (p50, p99) in ms.items()
    ]
    caption = f"{STREAMS} SSE streams with an event every {PACE_MS:.0f} ms: delay of an event"
    return Table(caption, ["way", "p50 ms", "p99 ms", "added p50", "added p99"], rows)


def run(log: Callable[[str], None]) -> Section:
    """Measure all workloads."""
    cores = Cores.here()
    measured = [(workload, measure(workload, cores, log)) for workload in WORKLOADS]
    delays = measure_delays(cores, log)
    first = {way.name: way for way in measured[0][1]}
    gateways = [way.gateway for _, ways in measured for way in ways if way.gateway is not None]
    lost, answered = sum(g.lost for g in gateways), sum(g.answered for g in gateways)
    ratio = first[OURS].rate(32) / first[REFERENCE].rate(32)
    return Section(
        name="gateway",
        title="Gateway",
        how=HOW,
        tables=[*(rate_table(*pair) for pair in measured), delay_table(delays)],
        goals=[
            Goal(
                "answers without a trace, over all runs", "0", f"{lost} of {answered:,}", lost == 0
            ),
            Goal(
                "driftgate with capture against aiohttp forwarding bytes, JSON at 32 connections",
                "at least 0.5",
                f"{ratio:.2f}",
                ratio >= 0.5,
            ),
        ],
        notes=[
            f"Cores of each proxy: {sorted(cores.proxy)}; "
            f"of load and stand-in together: {sorted(cores.rest)}."
        ],
    )


HOW = """\
A closed loop of keep-alive connections; each plays agents whose history grows over 8 steps (6k to
10k prompt tokens, 500 out, bodies of 26 to 50 kB), and no two trajectories are alike. Every proxy
is one process on one core (driftgate with its writer thread, capture on, group commit); the
stand-in for the engine and the load generator share the rest, so the first row is the ceiling.
*Until all is durable* counts the time until the last trace of each run was synced and indexed;
every answer must have a trace by then, and every trace all of its parts. *p99* is of the whole
call."""

"""Requests a second and added delay of the gateway against aiohttp forwarding bytes and nginx."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import Request, urlopen

import msgspec
import numpy as np

from benchmarks.load import Agents, delays_us, drive
from benchmarks.payloads import PACED, ROUTES, TYPICAL, Episode, Shape
from benchmarks.report import Goal, Section, Table
from benchmarks.stage import Cores, Stage, cpu_seconds, pinned
from benchmarks.targets import (
    Gateway,
    start_forward,
    start_gateway,
    start_nginx,
    start_standin,
)

__all__ = ["run"]

CONNECTIONS = (1, 32, 256)
WINDOW_S = 1.2
WARM_S = 0.3
STREAMS = 256
PACE_MS = 20.0
SPREAD_S = 2.5
"""The streams do not start, and so do not end, all at once."""

TWO_ROUNDS = 3
TWO_WINDOW_S = 3.0
TWO_GOAL = 1.6
"""Of one: the load and the stand-in take a tenth of the second core where there are two."""

REFERENCE = "aiohttp bytes"
OURS = "driftgate"


@dataclass(slots=True)
class Sums:
    """What was measured on one way with one number of connections."""

    in_window: int = 0
    window_s: float = 0.0
    answered: int = 0
    """Also before and after the windows."""
    cpu_s: float = 0.0
    """Of the proxy; for driftgate until its store was drained."""
    durable_s: float = 0.0
    """From the first request until every trace of the run was on disk and indexed."""

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.in_window / self.window_s

    @property
    def durable_rate(self) -> float:
        """Answers a second, the time to drain the store counted."""
        return self.answered / self.durable_s

    @property
    def cpu_us(self) -> float:
        """Processor time of one answer in the proxy."""
        return 1e6 * self.cpu_s / self.answered


@dataclass(slots=True)
class Way:
    """One way to the engine and what was measured on it."""

    name: str
    url: str
    pid: int | None = None
    """The proxy's process; None for the direct way."""
    gateway: Gateway | None = None
    sums: dict[int, Sums] = field(default_factory=lambda: {n: Sums() for n in CONNECTIONS})

    def measure(self, agents: Agents, connections: int, cores: Cores) -> float:
        """One run, added to the sums; for driftgate it ends when the store is drained."""
        sums, cpu_s = self.sums[connections], self._cpu_s()
        with pinned(cores.rest):
            rate = drive(agents, self.url, connections, warm_s=WARM_S, window_s=WINDOW_S)
        sums.in_window += rate.in_window
        sums.window_s += rate.window_s
        sums.answered += rate.answered
        if self.gateway is not None:
            self.gateway.answered += rate.answered
            sums.durable_s += self.gateway.drain() - rate.started
        sums.cpu_s += self._cpu_s() - cpu_s
        return rate.per_second

    def _cpu_s(self) -> float:
        return 0.0 if self.pid is None else cpu_seconds(self.pid)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked for."""

    name: str
    shape: Shape
    stream: bool
    rounds: int = 1
    """The ways are measured in turns, so that a change of the machine's mood meets all of them."""


WORKLOADS = (
    Workload("JSON, 8k prompt tokens, 500 out", TYPICAL, stream=False, rounds=2),
    Workload("SSE, the same, 500 events sent at once", TYPICAL, stream=True),
    Workload("JSON with routes, 4.4 MB", ROUTES, stream=False),
)


def start_ways(stage: Stage, upstream: str, cores: Cores, *, stream: bool) -> list[Way]:
    """Everything that is compared, running."""
    forward = start_forward(stage, upstream, cores)
    ways = [Way("engine directly", upstream), Way(REFERENCE, forward, stage.pid("forward"))]
    nginx = start_nginx(stage, upstream, cores, buffering=not stream)
    if nginx is not None:
        ways.append(Way("nginx", nginx, stage.pid("nginx")))
    gateway = start_gateway(stage, upstream, cores)
    return [*ways, Way(OURS, gateway.url, stage.pid("driftgate"), gateway)]


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
            for _ in range(workload.rounds):
                for way in ways:
                    rate = way.measure(agents, connections, cores)
                    log(f"{workload.name}: {way.name}, {connections}: {rate:.0f}/s")
        return ways


def measure_delays(cores: Cores, log: Callable[[str], None]) -> list[tuple[str, list[int]]]:
    """Age of events on arrival, in us, by way."""
    agents = Agents(Episode(PACED), stream=True)
    delays = []
    with (
        tempfile.TemporaryDirectory(prefix="driftgate-bench-") as folder,
        Stage(Path(folder)) as stage,
    ):
        upstream = start_standin(stage, PACED, cores, pace_ms=PACE_MS)
        for way in start_ways(stage, upstream, cores, stream=True):
            with pinned(cores.rest):
                seen = delays_us(agents, way.url, STREAMS, pace_ms=PACE_MS, spread_s=SPREAD_S)
            log(f"{way.name}: {len(seen)} events")
            delays.append((way.name, seen))
            if way.gateway is not None:
                way.gateway.answered += STREAMS
                way.gateway.drain()
    return delays


def measure_two(log: Callable[[str], None]) -> tuple[float, float]:
    """Answers a second that one gateway, and two on one store, answer and store; each on a core."""
    first, second, rest = spread_cores()
    agents, durable = Agents(Episode(TYPICAL), stream=False), (Sums(), Sums())
    with (
        tempfile.TemporaryDirectory(prefix="driftgate-bench-") as folder,
        Stage(Path(folder)) as stage,
    ):
        upstream = start_standin(stage, TYPICAL, Cores(first, rest))
        one = start_gateway(stage, upstream, Cores(first, rest))
        two = start_gateway(stage, upstream, Cores(second, rest), name="second")
        one.beside = two.url
        for _ in range(TWO_ROUNDS):
            for sums, urls in zip(durable, ([one.url], [one.url, two.url]), strict=True):
                with pinned(rest):
                    rate = drive(agents, urls, 32 * len(urls), warm_s=WARM_S, window_s=TWO_WINDOW_S)
                one.answered += rate.answered
                sums.answered += rate.answered
                sums.durable_s += one.drain() - rate.started
                log(f"gateways on one store: {len(urls)}: {sums.durable_rate:.0f}/s")
        assert not one.lost, f"{one.lost} answers without a trace"
    return durable[0].durable_rate, durable[1].durable_rate


def spread_cores() -> tuple[set[int], set[int], set[int]]:
    """A core for each of two gateways, and those of the load and the stand-in: the others, or the
    second one too where there are two."""
    usable = sorted(os.sched_getaffinity(0))
    second = {usable[min(1, len(usable) - 1)]}
    return {usable[0]}, second, set(usable[2:]) or second


def rate_table(workload: Workload, ways: list[Way]) -> Table:
    """One row for each way: requests a second, the ratio to the reference, processor time."""
    reference = next(way for way in ways if way.name == REFERENCE)
    rows = []
    for way in ways:
        row, durable = [way.name], [f"{way.name}, until all is durable"]
        for connections, sums in way.sums.items():
            base = reference.sums[connections].rate
            cpu = "" if way.pid is None else f"{sums.cpu_us:,.0f}"
            row += [f"{sums.rate:,.0f}", f"{sums.rate / base:.2f}", cpu]
            if way.gateway is not None:
                rate = sums.durable_rate
                durable += [f"{rate:,.0f}", f"{rate / base:.2f}", ""]
        rows += [row] if way.gateway is None else [row, durable]
    if not any(way.name == "nginx" for way in ways):
        rows.append(["nginx: not installed", *[""] * 3 * len(CONNECTIONS)])
    columns = ["way"]
    for connections in CONNECTIONS:
        columns += [f"{connections} conn: req/s", "ratio", "CPU µs"]
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
    one, two = measure_two(log)
    first = {way.name: way for way in measured[0][1]}
    gateways = [way.gateway for _, ways in measured for way in ways if way.gateway is not None]
    lost, answered = sum(g.lost for g in gateways), sum(g.answered for g in gateways)
    ratio = first[OURS].sums[32].rate / first[REFERENCE].sums[32].rate
    return Section(
        name="gateway",
        title="Gateway",
        how=HOW,
        tables=[
            *(rate_table(*pair) for pair in measured),
            delay_table(delays),
            Table(
                "JSON, gateways on one store, 32 connections each, until all is durable",
                ["gateways", "req/s", "ratio"],
                [["1", f"{one:,.0f}", "1.00"], ["2", f"{two:,.0f}", f"{two / one:.2f}"]],
            ),
        ],
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
            Goal(
                "two gateways on one store against one",
                f"at least {TWO_GOAL}",
                f"{two / one:.2f}",
                two >= TWO_GOAL * one,
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
every answer must have a trace by then, and every trace all of its parts. *Ratio* is to
aiohttp; *CPU µs* is the processor time of one answer in the proxy, all of its threads. The paced
streams last 5 s each and start one after another. *Gateways on one store* have a core each; the
load shares the second one's where there are two cores."""

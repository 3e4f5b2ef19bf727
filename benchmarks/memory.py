"""Resident memory of one gateway process after 1,000 and after 10,000 calls."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.load import Agents, call
from benchmarks.payloads import SMALL, TYPICAL, Episode, Shape
from benchmarks.report import Goal, Section, Table
from benchmarks.stage import Cores, Stage, pinned, resident_bytes
from benchmarks.targets import start_gateway, start_standin

__all__ = ["run"]

CALLS = (0, 1_000, 2_000, 5_000, 10_000)
FIRST, LAST = 1_000, 10_000
GOAL = 1.20
ROUND = 200
"""Calls between two looks at the store: this is about what stays, not about a full queue."""
CONNECTIONS = 16
SHAPES = ((SMALL, "small answers (20 tokens)"), (TYPICAL, "agent-typical answers (8k/500)"))


def measure(shape: Shape, cores: Cores, log: Callable[[str], None]) -> dict[int, int]:
    """Resident bytes by number of calls; each reading is taken when the store is drained."""
    agents, resident, made = Agents(Episode(shape), stream=False), {}, 0
    with (
        tempfile.TemporaryDirectory(prefix="driftgate-bench-") as folder,
        Stage(Path(folder)) as stage,
    ):
        upstream = start_standin(stage, shape, cores)
        gateway = start_gateway(stage, upstream, cores)
        for calls in CALLS:
            while made < calls:
                with pinned(cores.rest):
                    call(agents, gateway.url, CONNECTIONS, calls=min(ROUND, calls - made))
                gateway.answered = made = min(made + ROUND, calls)
                gateway.drain()
            if gateway.lost:
                raise RuntimeError(f"{gateway.lost} of {calls} answers have no trace")
            resident[calls] = resident_bytes(stage.pid("driftgate"))
            log(f"{shape.name}: {resident[calls] / 1e6:.0f} MB after {calls} calls")
    return resident


def run(log: Callable[[str], None]) -> Section:
    """Small answers, where every byte a call leaves behind shows, and agent-typical ones."""
    cores, rows, goals = Cores.here(), [], []
    for shape, words in SHAPES:
        resident = measure(shape, cores, log)
        ratio = resident[LAST] / resident[FIRST]
        rows.append([words, *(f"{resident[n] / 1e6:,.0f}" for n in CALLS), f"{ratio:.2f}"])
        goals.append(Goal(f"memory, {words}", f"at most {GOAL:.2f}", f"{ratio:.2f}", ratio <= GOAL))
    return Section(
        name="memory",
        title="Memory of the gateway",
        how=HOW,
        tables=[
            Table(
                "Resident MB of one process after so many calls",
                ["calls", *(f"{n:,}" for n in CALLS), f"{LAST:,} / {FIRST:,}"],
                rows,
            )
        ],
        goals=goals,
    )


HOW = f"""\
One `driftgate serve` process with capture on, {CONNECTIONS} connections; agents of several steps
each, no two alike. The load rests whenever {ROUND} calls are on their way to the store, and memory
is read from /proc when every trace is on disk and indexed."""

"""``kill -9`` of the trainer's worker at random moments, alone and together with the gateway.

A real ``driftgate teach`` scores a tiny checkpoint; each worker is killed at a random moment of its
work, and a last one finishes. Lost is a trace without a score; wrong is one that counts twice.
"""

from __future__ import annotations

import asyncio
import collections
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from driftgate.storage import Reader, Writer
from driftgate.teacher.worker import MAX_CRASHES
from driftgate.testing.engine import process_log, stop
from reliability.answers import Spell
from reliability.engine import Engine, serve_engine
from reliability.gateway import ROOT, start, until
from reliability.kills import SCRIPTS, Load, judge
from reliability.verdict import Row

__all__ = ["run"]

LEASE_S = 1.0
"""A killed worker's trajectory is free again after this; users have two minutes."""

AGENTS, PAUSE_S = 3, 0.2
"""A few calls a second, while a worker takes seconds to start: all of them are scored."""
LATEST_KILL_S = 1.5
"""After a worker's first score, or its first lease."""

SCORED_TIMEOUT_S = 240.0


def teach(store: Path, model: Path, number: int) -> subprocess.Popen[bytes]:
    """A worker that follows the store."""
    options = ("--store", str(store), "--model", str(model), "--backend", "reference", "--follow")
    with process_log(store.parent / f"teach-{store.name}-{number}.log") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "driftgate.cli", "teach", *options, "--lease-s", str(LEASE_S)],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def speller(model: Path) -> Spell:
    """How the checkpoint spells an id: the engine must do the same, or nothing is scored."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda token: str(tokenizer.decode([token]))


def scored(store: Path) -> int:
    """Traces with a score."""
    reader = Reader(store)
    found = reader.counts().scored
    reader.close()
    return found


async def killed_at_work(
    store: Path, model: Path, number: int, source: random.Random, row: Row
) -> None:
    """One worker, killed some time after it has begun to score."""
    before = scored(store)
    worker = teach(store, model, number)
    await until(
        lambda: scored(store) > before or worker.poll() is not None, timeout_s=SCORED_TIMEOUT_S
    )
    row.check(scored(store) > before, f"worker {number} scored nothing")
    await asyncio.sleep(source.uniform(0, LATEST_KILL_S))
    kill(worker)


def kill(worker: subprocess.Popen[bytes]) -> None:
    """kill -9, and wait."""
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


async def finish(store: Path, model: Path, row: Row) -> None:
    """The last worker scores what is left."""
    worker = teach(store, model, -1)
    reader = Reader(store)
    await until(
        lambda: reader.counts().scored >= reader.counts().scorable, timeout_s=SCORED_TIMEOUT_S
    )
    reader.close()
    await asyncio.to_thread(stop, worker)
    count(store, row)


def count(store: Path, row: Row) -> None:
    """Each trace that can be scored has one score, and each cell counts it once."""
    reader = Reader(store)
    counts = reader.counts()
    scores = collections.Counter[str]()
    refused = after = 0
    while page := reader.scores(after=after, kind="drift"):
        after = page[-1].seq
        scores.update(one.meta.trace_id for one in page)
        refused += sum(one.meta.bucket is None for one in page)
    in_cells = sum(cell.n_seqs for cell in reader.cells() if cell.kind == "drift")
    reader.close()
    row.lost += counts.scorable - len(scores)
    row.check(set(scores.values()) <= {1}, "a trace was scored twice")
    row.check(in_cells == len(scores) - refused, f"{in_cells} in averages of {len(scores)}")
    row.saw += f"{len(scores):,} scored once, {refused} of them refused after {MAX_CRASHES} crashes"


async def worker_alone(engine: Engine, folder: Path, model: Path, tries: int) -> Row:
    """The gateway stays, and goes on being called."""
    row, source, store = Row("kill -9 of the trainer's worker"), random.Random(0), folder / "taught"
    gateway = await start(engine.url, store)
    load = Load(gateway, engine, "taught", pause_s=PAUSE_S)
    async with load.running(AGENTS):
        for number in range(tries):
            await killed_at_work(store, model, number, source, row)
            row.tries += 1
    await gateway.end()
    await finish(store, model, row)
    row.judge(store, load.calls)
    return row


async def both(engine: Engine, folder: Path, model: Path, tries: int) -> Row:
    """Gateway and worker are killed at the same moment, in the middle of their work."""
    row, source, store = (
        Row("kill -9 of gateway and worker at once"),
        random.Random(1),
        folder / "both",
    )
    for number in range(tries):
        gateway = await start(engine.url, store, "--durability", "strict")
        worker = teach(store, model, number)
        load = Load(gateway, engine, f"both{number}", pause_s=PAUSE_S)
        async with load.running(AGENTS):
            before = scored(store)
            begun = await until(
                lambda before=before: scored(store) > before,  # type: ignore[misc]
                timeout_s=SCORED_TIMEOUT_S,
            )
            row.check(begun, f"worker {number} scored nothing")
            await asyncio.sleep(source.uniform(0, LATEST_KILL_S))
            killed_at = time.monotonic()
            gateway.kill()
            kill(worker)
        await asyncio.to_thread(lambda: Writer(store).close())
        judge(row, store, load, killed_at, "strict")
        row.tries += 1
    await finish(store, model, row)
    return row


async def run(folder: Path, *, full: bool) -> list[Row]:
    """The worker alone, then both."""
    from driftgate.testing.checkpoints import make_checkpoint

    model = make_checkpoint(folder / "checkpoint", "dense")
    tries = 100 if full else 1  # each starts a worker: seconds, half a minute on a busy machine
    async with serve_engine(SCRIPTS, speller(model)) as engine:
        return [
            await worker_alone(engine, folder, model, tries),
            await both(engine, folder, model, tries),
        ]

"""The disk is full, read-only, refuses every write, or is stuck or slow.

Full and read-only at the start are a tmpfs in a namespace of the gateway's own; refused writes are
a limit on the running process (``RLIMIT_FSIZE``); a slow disk and one that turns read-only are a
library preloaded into the gateway, where there is a C compiler; a locked index is another process
that holds its write lock. ``/healthz`` is asked all the while, and the worst of its answers is in
the table: a writer that waits must not make the loop wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from driftgate.storage import Reader
from reliability.agent import Seen, ask, get, path_of
from reliability.answers import request, say
from reliability.engine import Engine, serve_engine
from reliability.gateway import Gateway, held_up_s, running
from reliability.slowdisk import SlowDisk, compiler
from reliability.verdict import Call, Row, read_call

__all__ = ["run"]

SMALL_DISK = 6 << 20
"""Bytes; an index with its log and a segment need one or two."""

BLOCKED_LOOP_S = 0.5
"""A healthz that takes longer was held up; this machine may be busy."""

STUCK_S = 1.5
SLOW_SYNC_MS, SLOW_WRITE_MS = 300, 2
"""A network disk on a bad day."""
FILLER_BLOCK, PAGE = 1 << 16, 1 << 12

Fault = Callable[[Gateway], AbstractContextManager[None]]


@contextlib.contextmanager
def full(gateway: Gateway) -> Iterator[None]:
    """Another file takes all the space."""
    filler = _inside(gateway) / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            for size in (FILLER_BLOCK, PAGE):
                with contextlib.suppress(OSError):
                    while file.write(b"x" * size) == size:
                        pass
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def refusing(gateway: Gateway) -> Iterator[None]:
    """Every write fails with EFBIG."""
    before = resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def stuck(gateway: Gateway) -> Iterator[None]:
    """Nothing can be indexed."""
    connection = sqlite3.connect(gateway.store / "index.sqlite", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


def turned_read_only(_gateway: Gateway) -> AbstractContextManager[None]:
    """Stands for the disk below the store, which is made when the store is known."""
    raise AssertionError("failing() makes it")


def _inside(gateway: Gateway) -> Path:
    """The store as the gateway's own namespace has it."""
    return Path(f"/proc/{gateway.pid}/root{gateway.store}")


def small_disk(store: Path, *more: str) -> tuple[str, ...]:
    """A command that gives the gateway a small file system of its own at ``store``."""
    store.mkdir(parents=True, exist_ok=True)
    script = f'mount -t tmpfs -o size={SMALL_DISK} none "$0" && {"".join(more)}exec "$@"'
    return ("unshare", "-rm", "sh", "-c", script, str(store))


class Pulse:
    """The slowest answer of /healthz while a block runs, less what the machine held it up."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self.slowest_s = 0.0

    def _clock_s(self) -> float:
        return time.monotonic() - held_up_s(self._gateway.pid, os.getpid())

    @contextlib.asynccontextmanager
    async def felt(self) -> AsyncIterator[None]:
        """Ask ten times a second."""
        over = asyncio.Event()

        async def ask_on() -> None:
            while not over.is_set():
                started_s = self._clock_s()
                seen = await get(self._gateway.url, "/healthz")
                assert seen.status == 200, seen
                self.slowest_s = max(self.slowest_s, self._clock_s() - started_s)
                await asyncio.sleep(0.1)

        asking = asyncio.create_task(ask_on())
        try:
            yield
        finally:
            over.set()
            await asking


async def call(gateway: Gateway, name: str, number: int) -> Call:
    """One, streamed or not."""
    body = request("well", name, stream=bool(number % 2))
    seen = await ask(gateway.url, body, path=path_of(name))
    return Call(say(name, asked=True), name, body, seen)


async def failing(
    engine: Engine, folder: Path, policy: str, fault: Fault, title: str, tries: int
) -> Row:
    """Calls before, while and after a disk that does not take records."""
    row = Row(f"{title}, policy {policy}")
    store = folder / f"{title.replace(' ', '-')}-{policy}"
    options = ("--on-capture-failure", policy)
    wrap: tuple[str, ...] = small_disk(store) if fault is full else ()
    if fault is turned_read_only:
        disk = SlowDisk(store)
        wrap, fault = disk.wrap, lambda _: disk.read_only()
    async with running(engine.url, store, *options, wrap=wrap) as gateway:
        pulse = Pulse(gateway)
        async with pulse.felt():
            before = [await call(gateway, f"before{n}", n) for n in range(4)]
            await gateway.drained()
            with fault(gateway):
                during = []
                for number in range(tries):
                    during.append(await call(gateway, f"during{number}", number))
                    await gateway.drained()
            after = [await call(gateway, f"after{n}", n) for n in range(4)]
            after += await _until_whole(gateway, row)
            await gateway.drained()
        lost = await gateway.metric("driftgate_capture_lost_total", '{record="trace"}')
        judge_failing(row, gateway, policy, before, during, after, lost)
        row.check(pulse.slowest_s < BLOCKED_LOOP_S, f"healthz took {pulse.slowest_s:.2f} s")
    row.tries = tries
    row.worst = pulse.slowest_s * 1000
    return row


async def _until_whole(gateway: Gateway, row: Row) -> list[Call]:
    """Calls until one is answered again: in ``refuse`` the first one finds out that it works."""
    made: list[Call] = []
    for number in range(10):
        made.append(await call(gateway, f"again{number}", number))
        if made[-1].seen.answered:
            return made
    row.check(False, "no recovery: ten calls after the fault were refused")
    return made


def judge_failing(
    row: Row,
    gateway: Gateway,
    policy: str,
    before: list[Call],
    during: list[Call],
    after: list[Call],
    lost: float,
) -> None:
    """Outside the fault nothing is lost; inside it every loss is counted, named or refused."""
    # A copy: SQLite follows /proc/PID/root back into this process's own namespace.
    store = gateway.store.with_name(f"{gateway.store.name}-copy")
    shutil.copytree(_inside(gateway), store)
    row.judge(store, before)
    if policy == "serve":
        row.judge(store, after)
    reader = Reader(store)
    unnamed = missing = 0
    for one in during:
        stored = read_call(reader, one)
        row.wrong += stored.wrong(one)
        if one.seen.answered and not stored.has(one):
            missing += 1
            unnamed += not stored.outcomes
    reader.close()
    refused = [one.seen for one in during if one.seen.status == 503]
    row.saw = f"{sum(one.seen.answered for one in during)} answered, {len(refused)} refused"
    if policy == "serve":
        row.check(not refused, "serve refused a call")
        row.check(missing == int(lost), f"{missing} answers not stored, {lost:.0f} counted")
        row.check(not unnamed, f"{unnamed} of {missing} losses are not said in their trajectory")
        row.saw += f", {missing} counted as lost"
    else:
        row.check(bool(refused), "refuse refused nothing")
        row.check(all(_says_when(seen) for seen in refused), "a 503 without Retry-After")


def _says_when(seen: Seen) -> bool:
    return int(seen.headers.get("retry-after", "0")) > 0


async def waiting(engine: Engine, folder: Path, *, slow: bool) -> Row:
    """A writer that waits: calls are answered meanwhile, and all is stored when it goes on."""
    row = Row("the index is locked 9/10 of the time" if slow else "the index is locked")
    async with running(engine.url, folder / f"waiting-{slow}") as gateway:
        pulse = Pulse(gateway)
        await call(gateway, "first", 0)
        await gateway.drained()
        calls: list[Call] = []
        async with pulse.felt():
            until = time.monotonic() + STUCK_S
            while time.monotonic() < until:
                with stuck(gateway):
                    for _ in range(5 if slow else 50):
                        calls.append(await call(gateway, f"waiting{len(calls)}", len(calls)))
                    await asyncio.sleep(0.2 if slow else STUCK_S / 2)
                await asyncio.sleep(0.02)
            await gateway.drained()
        row.judge(gateway.store, calls)
        row.check(pulse.slowest_s < BLOCKED_LOOP_S, f"healthz took {pulse.slowest_s:.2f} s")
        row.check(all(one.seen.answered for one in calls), "a call was not answered")
        row.tries = len(calls)
        row.worst, row.saw = pulse.slowest_s * 1000, "200"
    return row


async def slow_disk(engine: Engine, folder: Path, tries: int) -> Row:
    """Every sync takes long: no agent waits for it, and all is stored in the end."""
    row = Row(f"slow disk: each sync takes {SLOW_SYNC_MS} ms, each write {SLOW_WRITE_MS} ms")
    store = folder / "slow-disk"
    disk = SlowDisk(store)
    async with running(engine.url, store, wrap=disk.wrap) as gateway:
        pulse = Pulse(gateway)
        disk.be(sync_ms=SLOW_SYNC_MS, write_ms=SLOW_WRITE_MS)
        async with pulse.felt():
            calls = [await call(gateway, f"slow{number}", number) for number in range(tries)]
            await gateway.drained()
        disk.be()
        row.judge(store, calls)
        row.check(pulse.slowest_s < BLOCKED_LOOP_S, f"healthz took {pulse.slowest_s:.2f} s")
        row.check(all(one.seen.answered for one in calls), "a call was not answered")
    row.tries, row.worst, row.saw = tries, pulse.slowest_s * 1000, "200"
    return row


async def read_only(engine: Engine, folder: Path) -> Row:
    """A store that cannot be written at the start is refused in words."""
    row = Row("read-only store at the start", tries=1)
    store = folder / "read-only"
    wrap = small_disk(store, 'mount -o remount,ro "$0" && ')
    try:
        async with running(engine.url, store, wrap=wrap):
            row.check(False, "it started")
    except Exception as error:  # of the start, in the harness's words
        said = str(error)
        row.check("Read-only" in said and "--store" in said, said)
        row.check("Traceback" not in said, said)
        row.saw = "no gateway: says why and what to do"
    return row


async def run(folder: Path, *, full: bool) -> list[Row]:
    """Every fault under every policy that it matters for."""
    tries = 200 if full else 20
    rows = []
    async with serve_engine({}) as engine:
        for policy in ("serve", "refuse"):
            for fault, title in FAULTS:
                if fault is turned_read_only and compiler() is None:
                    continue
                rows.append(await failing(engine, folder, policy, fault, title, tries))
        rows.append(await waiting(engine, folder, slow=False))
        rows.append(await waiting(engine, folder, slow=True))
        if compiler() is not None:
            rows.append(await slow_disk(engine, folder, tries))
        rows.append(await read_only(engine, folder))
    return rows


FAULTS: tuple[tuple[Fault, str], ...] = (
    (full, "disk full"),
    (refusing, "every write fails"),
    (turned_read_only, "turns read-only while it runs"),
)

"""The gateway as its users run it: ``python -m driftgate.cli serve`` in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from driftgate.testing.engine import free_port, process_log, stop, wait_for_http

__all__ = ["Gateway", "held_up_s", "running", "start", "until"]

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = DRAIN_TIMEOUT_S = 60.0
POLL_S = 0.01
COMMAND = ("-m", "driftgate.cli")


@dataclass(slots=True)
class Gateway:
    """A running one."""

    url: str
    store: Path
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def kill(self) -> None:
        """kill -9, and wait."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()

    async def end(self, timeout_s: float = 30.0) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, timeout_s)

    async def metric(self, name: str, labels: str = "") -> float:
        """A number of /metrics; 0 where it is not there."""
        found = re.search(
            rf"^{re.escape(name + labels)} (\S+)$", await self.metrics(), re.MULTILINE
        )
        return float(found.group(1)) if found else 0.0

    async def metrics(self) -> str:
        """The text of /metrics."""

        def read() -> str:
            with urlopen(f"{self.url}/metrics", timeout=START_TIMEOUT_S) as answer:
                return bytes(answer.read()).decode()

        return await asyncio.to_thread(read)

    async def drained(self) -> None:
        """Wait until nothing waits for storage."""
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while await self.metric("driftgate_store_queued_records"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"records still wait for storage; see {self.log}")
            await asyncio.sleep(POLL_S)


async def start(
    upstream: str,
    store: Path,
    *options: str,
    port: int | None = None,
    wrap: tuple[str, ...] = (),
    command: tuple[str, ...] = COMMAND,
    ready: str = "/readyz",
) -> Gateway:
    """Start one and wait until it is ready."""
    port = port or free_port()
    arguments = ["serve", "--upstream", upstream, "--store", str(store), "--port", str(port)]
    log = store.parent / f"gateway-{port}.log"
    process = _spawn([*wrap, sys.executable, *command, *arguments, *options], log)
    gateway = Gateway(f"http://127.0.0.1:{port}", store, process, log)
    try:
        url = gateway.url + ready
        await asyncio.to_thread(wait_for_http, url, process, log, timeout_s=START_TIMEOUT_S)
    except BaseException:
        stop(process)
        raise
    return gateway


def _spawn(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with process_log(log) as out:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def held_up_s(*pids: int) -> float:
    """How long threads of these processes have waited for a processor, in all: what the machine
    takes is not the gateway's. 0 where the system does not say."""
    waited_ns = 0
    for pid in pids:
        for stat in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):  # it has ended
                waited_ns += int(stat.read_text().split()[1])
    return waited_ns / 1e9


async def until(holds: Callable[[], bool], *, timeout_s: float = START_TIMEOUT_S) -> bool:
    """Wait until ``holds``; False where it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(POLL_S)
    return True


@contextlib.asynccontextmanager
async def running(
    upstream: str,
    store: Path,
    *options: str,
    ready: str = "/readyz",
    command: tuple[str, ...] = COMMAND,
    wrap: tuple[str, ...] = (),
) -> AsyncIterator[Gateway]:
    """One for the length of the block."""
    gateway = await start(upstream, store, *options, ready=ready, command=command, wrap=wrap)
    try:
        yield gateway
    finally:
        await asyncio.to_thread(stop, gateway.process)

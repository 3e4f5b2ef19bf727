"""Child processes of a benchmark: pinned, each in a process group of its own, gone at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from driftgate.testing.engine import process_log, stop, wait_for_http

__all__ = ["Cores", "Stage", "cpu_seconds", "pinned", "resident_bytes"]

ROOT = Path(__file__).resolve().parent.parent
"""Where ``python -m benchmarks.…`` finds itself."""

START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Cores:
    """Which core the process under test gets, and which ones the load and the stand-in share."""

    proxy: set[int]
    rest: set[int]

    @classmethod
    def here(cls) -> Cores:
        """The first usable core for the proxy, the others for the rest (the same one if alone)."""
        usable = sorted(os.sched_getaffinity(0))
        return cls(proxy={usable[0]}, rest=set(usable[1:]) or {usable[0]})


@contextmanager
def pinned(cores: set[int]) -> Iterator[None]:
    """This thread, and the children that it starts meanwhile, on ``cores``."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(slots=True)
class Stage:
    """Children by name; leaving the ``with`` block ends all of them, the last started first."""

    logs: Path
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name in reversed(list(self.children)):
            self.end(name)

    def start(self, name: str, command: list[str], *, cores: set[int], ready: str) -> None:
        """Start ``command`` on ``cores`` and return when the URL ``ready`` answers 200."""
        log = self.logs / f"{name}.log"
        with process_log(log) as out, pinned(cores):
            self.children[name] = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_for_http(ready, self.children[name], log, timeout_s=START_TIMEOUT_S)

    def module(self, name: str, module: str, *arguments: str, cores: set[int], ready: str) -> None:
        """Start a module of this environment."""
        self.start(name, [sys.executable, "-m", module, *arguments], cores=cores, ready=ready)

    def end(self, name: str) -> None:
        """End one child and all that it started."""
        stop(self.children.pop(name))

    def pid(self, name: str) -> int:
        """Process id of a child."""
        return self.children[name].pid


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and its children, from /proc."""
    own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return own + sum(map(resident_bytes, _children(pid)))


def cpu_seconds(pid: int) -> float:
    """Processor time that a process and its children have used, all threads, from /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(map(cpu_seconds, _children(pid)))


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]

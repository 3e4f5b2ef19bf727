"""Starts a teacher: in this process for the reference, under torchrun for FSDP and Megatron.

Rank 0 is the one that is asked to stop: it finishes what it has in hand, stores it, gives its
leases back and sends the other ranks home. torchrun itself is only signalled when that takes too
long, or when there is no rank 0 yet.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Literal

import msgspec

from driftgate.teacher.config import TeacherConfig

__all__ = ["CONFIG_ENV", "REPORT_ENV", "launch"]

log = logging.getLogger(__name__)

CONFIG_ENV = "DRIFTGATE_TEACHER_CONFIG"
"""JSON of the ``TeacherConfig``, for the ranks."""
REPORT_ENV = "DRIFTGATE_TEACHER_REPORT"
"""Directory where rank 0 puts its pid, and the ranks how they ended."""

GRACE_S = 60.0
"""A trajectory of 32k tokens takes about this long on a slow machine; after it torchrun is told."""

POLL_S = 0.1

RANK_MODULE = "driftgate.teacher.rank"
"""What torchrun starts."""


def launch(config: TeacherConfig, *, rank_module: str = RANK_MODULE) -> int:
    """Run a teacher until it is done or told to stop; the exit status.

    0 also after SIGTERM or SIGINT, at any time, unless what was in hand took more than ``GRACE_S``.
    Else 1, or torchrun's own status, and one line in the log that says why.

    Installs handlers for SIGTERM and SIGINT while it runs: call it from the main thread.
    ``rank_module`` stands in for the ranks' own where they need more than this machine has.
    """
    if config.backend == "reference":
        from driftgate.teacher.rank import run_reference

        return run_reference(config)
    with tempfile.TemporaryDirectory(prefix="driftgate-teacher-") as scratch:
        return _torchrun(config, Path(scratch), rank_module)


def _torchrun(config: TeacherConfig, scratch: Path, rank_module: str) -> int:
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node", str(config.nproc), "--max-restarts", "0"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        *("-m", rank_module),
    ]
    stopped_at: list[float] = []

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopped_at.append(time.monotonic())

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        # A session of its own: Ctrl-C reaches this process only, which then asks rank 0.
        process = subprocess.Popen(
            command, env=_environment(config, scratch), start_new_session=True
        )
        how = _wait(process, scratch, stopped_at)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if how == "not begun":
        return 0
    if how == "killed":
        log.error("the teacher did not stop within %.0f s and was ended", GRACE_S)
        return 1
    return _ended(process.returncode, scratch)


def _wait(
    process: subprocess.Popen[bytes], scratch: Path, stopped_at: list[float]
) -> Literal["ended", "not begun", "killed"]:
    """Wait for torchrun and pass a stop on: to rank 0, or to torchrun where there was none yet
    (``not begun``) or it did not obey in time (``killed``). torchrun is gone afterwards."""
    told = False
    try:
        while process.poll() is None:
            if stopped_at and not told:
                told = True
                if not _signal_rank_0(scratch):
                    return "not begun"
            if stopped_at and time.monotonic() - stopped_at[0] > GRACE_S:
                return "killed"
            time.sleep(POLL_S)
        return "ended"
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _environment(config: TeacherConfig, scratch: Path) -> dict[str, str]:
    environment = dict(os.environ)
    environment[CONFIG_ENV] = msgspec.json.encode(config).decode()
    environment[REPORT_ENV] = str(scratch)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // config.nproc)))
    if sys.platform == "linux":
        # All ranks are on this machine, whose host name may not resolve to an address it has.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _signal_rank_0(scratch: Path) -> bool:
    """Ask rank 0 to stop; False where it has not said yet who it is."""
    try:
        pid = int((scratch / "pid").read_text())
    except (OSError, ValueError):
        return False
    with suppress(ProcessLookupError):  # it has just ended by itself
        os.kill(pid, signal.SIGTERM)
    return True


def _ended(returncode: int, scratch: Path) -> int:
    """Exit status from what the ranks left behind; logs one clear line where one failed."""
    report = scratch / "report"
    if report.is_file():
        message = report.read_text()
        if message:
            log.error("the teacher stopped: %s", message)
        return 1 if message else 0
    log.error("a trainer process died (torchrun exit status %d); its output is above", returncode)
    return returncode or 1

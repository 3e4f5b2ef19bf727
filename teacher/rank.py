"""A teacher's process: the reference in the caller's, or one rank of those that torchrun starts.

Only rank 0 touches storage and obeys SIGTERM; the others do what it sends until it sends them home.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path

import msgspec

from driftgate.errors import DriftgateError, TeacherError
from driftgate.teacher.base import Backend
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.launch import CONFIG_ENV, REPORT_ENV
from driftgate.teacher.worker import Worker

__all__ = ["main", "run_reference"]

log = logging.getLogger(__name__)


def run_reference(config: TeacherConfig) -> int:
    """Score with the reference backend in this process; the exit status.

    Installs handlers for SIGTERM and SIGINT while it runs: call it from the main thread.
    """
    from driftgate.teacher.reference import ReferenceBackend

    stop = threading.Event()
    previous = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        _work(config, ReferenceBackend.load(config), stop)
    except DriftgateError as error:
        log.error("the teacher stopped: %s", error)
        return 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def main() -> int:
    """One rank under torchrun; its settings come in the environment
    (``driftgate.teacher.launch``)."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    config = msgspec.json.decode(os.environ[CONFIG_ENV], type=TeacherConfig)
    reports = Path(os.environ[REPORT_ENV]) if REPORT_ENV in os.environ else None
    if int(os.environ["RANK"]) > 0:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        return _status(_serve(config), reports)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if reports is not None:
        (reports / "pid").write_text(str(os.getpid()))
    message = ""
    try:
        from driftgate.teacher.fsdp import FsdpBackend

        _work(config, FsdpBackend.load(config), stop)
    except DriftgateError as error:
        message = str(error)
        log.info("stopped: %s", message)
    if reports is not None:
        (reports / "report").write_text(message)
    return _status(message, reports)


def _status(message: str, reports: Path | None) -> int:
    """A rank's exit status. With a report it is 0: torchrun would bury its line under its own."""
    return 1 if message and reports is None else 0


def _serve(config: TeacherConfig) -> str:
    """Do what rank 0 sends; why that was not possible, which rank 0 has met as well."""
    from driftgate.teacher.fsdp import FsdpBackend

    try:
        backend = FsdpBackend.load(config)
    except TeacherError as error:
        log.info("stopped: %s", error)
        return str(error)
    backend.serve()
    backend.close()
    return ""


def _work(config: TeacherConfig, backend: Backend, stop: threading.Event) -> None:
    """Run a worker to its end. Raises what it raises, after the others were sent home."""
    try:
        for finding in backend.findings:
            log.warning("%s: %s; %s", finding.code, finding.detail, finding.fix)
        log.info("trainer %s: %s", backend.trainer.digest, backend.trainer)
        worker = Worker(config, backend)
        try:
            log.info("%s", worker.run(stop))
        finally:
            worker.close()
    finally:
        backend.close()


if __name__ == "__main__":
    sys.exit(main())

"""A teacher's process: the reference in the caller's, or one rank of those that torchrun starts.

Only rank 0 touches storage and obeys SIGTERM; the others do what it sends until it sends them home.
A rank that fails says why and is gone at once, without a word to the others: they may be waiting
for its part of a forward, and only its closed connections end that wait.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec

from driftgate import logs
from driftgate.errors import DriftgateError, StorageError, TeacherError
from driftgate.teacher.base import Backend
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.launch import CONFIG_ENV, REPORT_ENV
from driftgate.teacher.worker import Worker

if TYPE_CHECKING:
    from driftgate.teacher.fsdp import FsdpBackend
    from driftgate.teacher.megatron import MegatronBackend

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
    except Exception as error:
        log.exception("the teacher stopped: %s", _line(error))
        return 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def main() -> int:
    """One rank under torchrun; its settings come in the environment
    (``driftgate.teacher.launch``)."""
    config = msgspec.json.decode(os.environ[CONFIG_ENV], type=TeacherConfig)
    logs.configure(config.log_format)
    reports = Path(os.environ[REPORT_ENV]) if REPORT_ENV in os.environ else None
    try:
        if int(os.environ["RANK"]) > 0:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            message = _serve(config)
        else:
            message = _lead(config, reports)
    except Exception as error:
        log.exception("this rank failed")
        _report(reports, _line(error))
        _die()
    _report(reports, message)
    # With a report the status is 0: torchrun would bury its line under its own.
    return 1 if message and reports is None else 0


def _lead(config: TeacherConfig, reports: Path | None) -> str:
    """Rank 0: work until there is nothing left; why it could not, where that is no fault of a
    forward, or ''."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if reports is not None:
        (reports / "pid").write_text(str(os.getpid()))
    try:
        backend = _load(config)
    except TeacherError as error:
        return str(error)
    try:
        _work(config, backend, stop)
    except StorageError as error:
        backend.close()  # the others wait for orders: only between forwards is anything stored
        return str(error)
    return ""


def _serve(config: TeacherConfig) -> str:
    """Other ranks: do what rank 0 sends; why the model could not be loaded, or ''."""
    try:
        backend = _load(config)
    except TeacherError as error:
        return str(error)
    backend.serve()
    backend.close()
    return ""


def _load(config: TeacherConfig) -> FsdpBackend | MegatronBackend:
    """This rank's part of the backend that ``config`` names."""
    if config.backend == "megatron":
        try:
            from driftgate.teacher.megatron import MegatronBackend
        except ModuleNotFoundError as error:
            raise TeacherError(
                f"--backend megatron needs {error.name}: pip install 'driftgate[teacher,megatron]'"
            ) from error
        return MegatronBackend.load(config)
    from driftgate.teacher.fsdp import FsdpBackend

    return FsdpBackend.load(config)


def _report(reports: Path | None, message: str) -> None:
    """Leave ``message`` for the launcher. Of several failures the first one counts: the others
    follow from it. That all went well ('') is for rank 0 to say."""
    if message:
        log.info("stopped: %s", message)
    if reports is None or (not message and int(os.environ["RANK"]) > 0):
        return
    with suppress(FileExistsError), (reports / "report").open("x") as file:
        file.write(message)


def _die() -> NoReturn:
    """End this process without its exit handlers, which would wait for the other ranks."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _line(error: Exception) -> str:
    """The first line of what ``error`` says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def _work(config: TeacherConfig, backend: Backend, stop: threading.Event) -> None:
    """Run a worker to its end and close the backend. Raises what the worker raises; then what it
    stored is durable, and the backend is left as it is."""
    for finding in backend.findings:
        log.warning("%s: %s; %s", finding.code, finding.detail, finding.fix)
    log.info("trainer %s: %s", backend.trainer.digest, backend.trainer)
    worker = Worker(config, backend)
    try:
        log.info("%s", worker.run(stop))
    finally:
        worker.close()
    backend.close()


if __name__ == "__main__":
    sys.exit(main())

"""A real vLLM on CPU as a child process, for the demo and the end-to-end tests.

The engine listens on loopback only, reads nothing from the network, and ends with the ``with``
block.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from driftgate.errors import UpstreamError

__all__ = ["EngineProcess", "free_port", "process_log", "start_vllm", "stop", "wait_for_http"]

START_TIMEOUT_S = 240.0
"""vLLM is ready in about 30 s on two idle cores; a busy machine takes longer."""

STOP_TIMEOUT_S = 15.0
"""vLLM's API server waits for its engine process, which ends within seconds."""

POLL_S = 0.2

FIRST_PORT, PORTS = 10_240, 20_000
"""Below 32,768, from where Linux gives ports to outgoing connections; other systems begin later."""

VLLM_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
}


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """A running engine."""

    url: str
    model: str
    process: subprocess.Popen[bytes]
    log: Path


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago, and that no outgoing connection is given
    meanwhile: thousands of them come and go under load, and one took a gateway's port."""
    while True:
        port = FIRST_PORT + secrets.randbelow(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def process_log(path: Path) -> IO[bytes]:
    """Open ``path`` for a child's output, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("wb")


def wait_for_http(
    url: str,
    process: subprocess.Popen[bytes],
    log: Path,
    *,
    timeout_s: float,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Return when ``url`` answers 200; UpstreamError with the log's end if the child died."""
    started = time.monotonic()
    while (waited := time.monotonic() - started) < timeout_s:
        if process.poll() is not None:
            raise UpstreamError(
                f"{process.args!s} exited with {process.returncode}; the end of {log}:\n{tail(log)}"
            )
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(url, timeout=2) as answer,
        ):
            if answer.status == 200:
                return
        if progress is not None:
            progress(waited)
        time.sleep(POLL_S)
    raise UpstreamError(
        f"{url} did not answer in {timeout_s:.0f} s; the end of {log}:\n{tail(log)}"
    )


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log, for an error message."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a child and everything it started: SIGTERM to its group, then SIGKILL."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_TIMEOUT_S)
            if sign is signal.SIGKILL:
                return


def launch_vllm(
    checkpoint: Path,
    *,
    name: str,
    log: Path,
    routes: bool,
    port: int | None = None,
    extra: tuple[str, ...] = (),
) -> EngineProcess:
    """Start vLLM on ``checkpoint`` and return at once; wait for its ``/health`` yourself."""
    port = port or free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(checkpoint), "--served-model-name", name,
        "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", "4096", "--max-num-seqs", "16", "--enforce-eager", "--seed", "0",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        "--disable-access-log-for-endpoints", "/health",
        # A random model likes blanks, and a grammar that allows them between all tokens of JSON
        # lets it run into the length limit.
        "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
        *(["--enable-return-routed-experts"] if routes else []),
        *extra,
    ]  # fmt: skip
    with process_log(log) as out:
        process = subprocess.Popen(
            command,
            env=os.environ | VLLM_ENV,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return EngineProcess(f"http://127.0.0.1:{port}", name, process, log)


@contextlib.contextmanager
def start_vllm(
    checkpoint: Path, *, name: str, log: Path, routes: bool, extra: tuple[str, ...] = ()
) -> Iterator[EngineProcess]:
    """Run vLLM on ``checkpoint`` for the length of the block, ready to serve."""
    engine = launch_vllm(checkpoint, name=name, log=log, routes=routes, extra=extra)
    try:
        wait_for_http(f"{engine.url}/health", engine.process, log, timeout_s=START_TIMEOUT_S)
        yield engine
    finally:
        stop(engine.process)

"""The ways from the load generator to the engine stand-in that are compared."""

from __future__ import annotations

import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from benchmarks.payloads import Shape
from benchmarks.stage import Cores, Stage
from driftgate.storage import Reader
from driftgate.testing.engine import free_port

__all__ = ["Gateway", "start_forward", "start_gateway", "start_nginx", "start_standin"]

DRAIN_TIMEOUT_S = 120.0
POLL_S = 0.02
IDLE_POLLS = 25
"""Half a second with an empty queue and traces still missing: they are lost."""

QUEUED = re.compile(rb"^driftgate_store_queued_records (\S+)$", re.MULTILINE)

NGINX = """\
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {folder};
    proxy_temp_path {folder};
    fastcgi_temp_path {folder};
    uwsgi_temp_path {folder};
    scgi_temp_path {folder};
    keepalive_requests 100000000;
    client_max_body_size 1g;
    client_body_buffer_size 1m;
    upstream engine {{ server {upstream}; keepalive 1024; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        location / {{
            proxy_pass http://engine;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering {buffering};
            proxy_buffer_size 64k;
            proxy_buffers 128 64k;
            proxy_busy_buffers_size 1m;
            proxy_max_temp_file_size 0;
            proxy_read_timeout 300s;
        }}
    }}
}}
"""


def start_standin(stage: Stage, shape: Shape, cores: Cores, *, pace_ms: float | None = None) -> str:
    """The engine stand-in; returns its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    pace = () if pace_ms is None else ("--pace-ms", str(pace_ms))
    stage.module(
        "standin",
        "benchmarks.standin",
        *("--port", str(port), "--shape", shape.name, *pace),
        cores=cores.rest,
        ready=f"{url}/health",
    )
    return url


def start_forward(stage: Stage, upstream: str, cores: Cores) -> str:
    """aiohttp that forwards bytes; returns its address."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    stage.module(
        "forward",
        "benchmarks.forward",
        *("--port", str(port), "--upstream", upstream),
        cores=cores.proxy,
        ready=f"{url}/health",
    )
    return url


def start_nginx(stage: Stage, upstream: str, cores: Cores, *, buffering: bool) -> str | None:
    """nginx with one worker; None where it is not installed."""
    binary = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if binary is None:
        return None
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    folder = stage.logs / "nginx"
    folder.mkdir()
    config = folder / "nginx.conf"
    config.write_text(
        NGINX.format(
            folder=folder,
            upstream=upstream.removeprefix("http://"),
            port=port,
            buffering="on" if buffering else "off",
        )
    )
    stage.start(
        "nginx",
        [binary, "-p", str(folder), "-e", "stderr", "-c", str(config)],
        cores=cores.proxy,
        ready=f"{url}/health",
    )
    return url


@dataclass(slots=True)
class Gateway:
    """A running driftgate with capture on: what it answered and what it stored."""

    url: str
    store: Path
    beside: str | None = None
    """Address of another one on the same store, whose answers are counted here too."""
    answered: int = 0
    """Whole answers that came back through it; whoever sends a call adds it."""
    lost: int = 0
    """Answers that never got a trace; as of the last ``drain``."""

    def drain(self) -> float:
        """Wait until nothing is queued; ``time.monotonic()`` of when the last trace was indexed.

        Raises ``RuntimeError`` where it takes too long, or where a trace misses something.
        """
        reader, deadline = Reader(self.store), time.monotonic() + DRAIN_TIMEOUT_S
        idle, now = 0, time.monotonic()
        while (traces := reader.counts().traces) < self.answered - self.lost:
            idle = idle + 1 if self._queued() == 0 else 0
            if idle == IDLE_POLLS:
                self.lost = self.answered - traces
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.answered - traces} answers still wait for storage")
            time.sleep(POLL_S)
            now = time.monotonic() if not idle else now
        counts = reader.counts()
        reader.close()
        if counts.traces > self.answered - self.lost:
            raise RuntimeError(f"{counts.traces} traces for {self.answered} answers")
        if not self.lost and counts.complete != counts.trajectories:
            raise RuntimeError(f"{counts.trajectories - counts.complete} trajectories have gaps")
        return now

    def _queued(self) -> int:
        """Records that wait for storage, from ``/metrics``."""
        return sum(map(_queued, [self.url, *([self.beside] if self.beside else [])]))


def _queued(url: str) -> int:
    with urlopen(f"{url}/metrics", timeout=DRAIN_TIMEOUT_S) as answer:
        found = QUEUED.search(answer.read())
    assert found is not None
    return int(float(found.group(1)))


def start_gateway(stage: Stage, upstream: str, cores: Cores, *, name: str = "driftgate") -> Gateway:
    """driftgate as ``driftgate serve`` starts it, with a store that all of this stage share."""
    port = free_port()
    url, store = f"http://127.0.0.1:{port}", stage.logs / "store"
    command = [sys.executable, "-c", "from driftgate.cli import main; main()", "serve"]
    stage.start(
        name,
        [*command, "--upstream", upstream, "--store", str(store), "--port", str(port)],
        cores=cores.proxy,
        ready=f"{url}/readyz",
    )
    return Gateway(url, store)

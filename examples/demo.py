"""The main job, for real, on a machine without a GPU: ``make demo``.

Two tiny checkpoints (dense and MoE), a real vLLM and a gateway for each, a real agent on the
OpenAI SDK, and an FSDP2 teacher on two ranks that scores the traces while the agent runs.
``driftgate tail`` prints every scored step; at the end come the matrix, the worst token in its
text, and where to look next.

Everything is written below ``runs/demo``; its ``summary.json`` is counted from storage.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from driftgate.testing.checkpoints import CheckpointKind, make_checkpoint
from driftgate.testing.engine import (
    START_TIMEOUT_S,
    EngineProcess,
    free_port,
    launch_vllm,
    process_log,
    stop,
    wait_for_http,
)
from examples.summary import finish, pending

RUNS = Path("runs/demo")
KINDS: tuple[CheckpointKind, ...] = ("dense", "moe")
AGENT_RUNS = 6
"""Conversations per model; one more repeats the first for the noise floor."""

WEIGHTS = "step-0"
"""The policy version that both sides hold."""

SCORING_TIMEOUT_S = 180.0
POLL_S = 0.3


@dataclass(slots=True)
class Stage:
    """Processes by name and the seconds that each part took."""

    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    elapsed_s: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def part(self, console: Console, name: str, words: str) -> Iterator[None]:
        """Time one part of the demo and show that it goes on."""
        started = time.monotonic()
        with console.status(words):
            yield
        self.elapsed_s[name] = round(time.monotonic() - started, 1)
        console.print(f"[green]✓[/] {words} [dim]{self.elapsed_s[name]:.1f} s[/]")

    def start(self, name: str, *command: str, log: Path | None = None, **env: str) -> None:
        """Start ``command`` in a process group of its own; its output goes to ``log`` or here."""
        with contextlib.ExitStack() as files:
            out = files.enter_context(process_log(log)) if log else None
            self.children[name] = subprocess.Popen(
                command,
                env=os.environ | env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT if out else None,
                start_new_session=True,
            )

    def end(self, name: str) -> None:
        """Stop one child and all that it started."""
        if (child := self.children.pop(name, None)) is not None:
            stop(child)

    def stop(self) -> None:
        """Stop what is left, the last started first."""
        for name in reversed(list(self.children)):
            self.end(name)


def driftgate(*words: str) -> tuple[str, ...]:
    """The command line ``driftgate …`` of this very environment."""
    return (sys.executable, "-m", "driftgate.cli", *words)


def start_engines(stage: Stage, checkpoints: dict[str, Path]) -> dict[str, EngineProcess]:
    """Both engines start side by side; most of their start is imports."""
    engines = {}
    for kind, path in checkpoints.items():
        log = RUNS / "logs" / f"vllm-{kind}.log"
        engines[kind] = launch_vllm(path, name=f"tiny-{kind}", log=log, routes=kind == "moe")
        stage.children[f"vllm-{kind}"] = engines[kind].process
    for engine in engines.values():
        wait_for_http(f"{engine.url}/health", engine.process, engine.log, timeout_s=START_TIMEOUT_S)
    return engines


def start_gateways(stage: Stage, engines: dict[str, EngineProcess], store: Path) -> dict[str, str]:
    """One gateway for each engine, both on one store; returns their addresses."""
    urls = {}
    for kind, engine in engines.items():
        port = free_port()
        log = RUNS / "logs" / f"gateway-{kind}.log"
        urls[kind] = f"http://127.0.0.1:{port}"
        stage.start(
            f"gateway-{kind}",
            *driftgate("serve", "--upstream", engine.url, "--store", str(store)),
            *("--port", str(port), "--weight-version", WEIGHTS),
            log=log,
        )
        wait_for_http(f"{urls[kind]}/readyz", stage.children[f"gateway-{kind}"], log, timeout_s=60)
    return urls


def start_teachers(stage: Stage, checkpoints: dict[str, Path], store: Path) -> None:
    """An FSDP2 teacher on two ranks for each model; it scores what it finds, as it comes."""
    for kind, path in checkpoints.items():
        stage.start(
            f"teacher-{kind}",
            *driftgate("teach", "--model", str(path), "--served-model", f"tiny-{kind}"),
            *("--backend", "fsdp", "--nproc", "2", "--follow", "--store", str(store)),
            *("--weight-version", WEIGHTS),
            log=RUNS / "logs" / f"teacher-{kind}.log",
            OMP_NUM_THREADS="1",
        )


def run_agents(stage: Stage, urls: dict[str, str]) -> None:
    """The agent, once for each model, as a process that knows only a base URL."""
    for kind, url in urls.items():
        stage.start(
            f"agent-{kind}",
            *(sys.executable, "-m", "examples.agent", "--model", f"tiny-{kind}"),
            *("--runs", str(AGENT_RUNS), "--workspace", "examples"),
            log=RUNS / "logs" / f"agent-{kind}.log",
            OPENAI_BASE_URL=f"{url}/v1",
            OPENAI_API_KEY="none-needed",
        )
    for kind in urls:
        agent = stage.children.pop(f"agent-{kind}")
        if agent.wait() != 0:
            log = RUNS / "logs" / f"agent-{kind}.log"
            raise SystemExit(f"the agent failed:\n{log.read_text()}")


def wait_for_scores(stage: Stage, store: Path) -> None:
    """Until every trace has its score and the noise floors are there."""
    deadline = time.monotonic() + SCORING_TIMEOUT_S
    while left := pending(store, models=len(KINDS)):
        for name, child in stage.children.items():
            if child.poll() is not None:
                log = RUNS / "logs" / f"{name}.log"
                raise SystemExit(f"{name} ended by itself:\n{log.read_text()[-3000:]}")
        if time.monotonic() > deadline:
            raise SystemExit(f"not scored in {SCORING_TIMEOUT_S:.0f} s: {left}; see {RUNS}/logs")
        time.sleep(POLL_S)


def keep_running(console: Console, urls: dict[str, str], store: Path) -> None:
    """Leave everything up until the user ends it."""
    console.print("\nStill running; Ctrl-C ends it.")
    for kind, url in urls.items():
        console.print(f"  {kind:5}  export OPENAI_BASE_URL={url}/v1   [dim]dashboard {url}/[/]")
    console.print(f"  driftgate tail --url {urls['moe']}")
    console.print(f"  driftgate export --store {store}")
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


def main() -> None:
    """Run the demo; exit 0 when everything was captured and scored."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--keep", action="store_true", help="leave it running to explore")
    parser.add_argument("--svg", type=Path, help="save the closing tables as a picture")
    options = parser.parse_args()
    console = Console(record=True, width=None if sys.stdout.isatty() else 140)
    started, stage, store = time.monotonic(), Stage(), RUNS / "store"
    shutil.rmtree(store, ignore_errors=True)
    try:
        with stage.part(console, "checkpoints", "make a tiny dense and a tiny MoE checkpoint"):
            checkpoints: dict[str, Path] = {
                kind: make_checkpoint(RUNS / kind, kind) for kind in KINDS
            }
        with stage.part(console, "engines", "start vLLM on CPU, twice"):
            engines = start_engines(stage, checkpoints)
        with stage.part(console, "gateways", "start the gateways and probe the engines"):
            urls = start_gateways(stage, engines, store)
        start_teachers(stage, checkpoints, store)
        stage.start("tail", *driftgate("tail", "--url", urls["dense"], "--after", "0"))
        with stage.part(console, "agent", "run the agent: tools, streams, n=2"):
            run_agents(stage, urls)
        with stage.part(console, "scoring", "score with FSDP2 on two ranks"):
            wait_for_scores(stage, store)
        stage.end("tail")
        stage.elapsed_s["total"] = round(time.monotonic() - started, 1)
        finish(console, store, RUNS / "summary.json", stage.elapsed_s, svg=options.svg)
        if options.keep:
            keep_running(console, urls, store)
    finally:
        stage.stop()


if __name__ == "__main__":
    main()

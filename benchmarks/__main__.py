"""``python -m benchmarks [NAME …] [--write]``: run benchmarks one after another."""

from __future__ import annotations

import argparse
import importlib
import sys
import time

from benchmarks.report import Section, write_section

NAMES = ("storage", "teacher", "scaling", "gateway", "streams", "memory", "page")


def main() -> None:
    """Run the benchmarks that were named, or all; exit 1 where a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; default: all"
    )
    parser.add_argument(
        "--write", action="store_true", help="put the tables into docs/benchmarks.md"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    missed = 0
    for name in options.names or NAMES:
        started = time.monotonic()
        section: Section = importlib.import_module(f"benchmarks.{name}").run(progress)
        print(f"\n{section.markdown()}\n", flush=True)
        progress(f"{name} took {time.monotonic() - started:.0f} s")
        missed += sum(not goal.met for goal in section.goals)
        if options.write:
            write_section(section)
    sys.exit(1 if missed else 0)


def progress(line: str) -> None:
    """What is going on, beside the result."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

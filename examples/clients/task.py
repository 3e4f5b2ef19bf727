"""What every client here does: a question, a tool that really runs, an answer, one more question.

The model behind the tests is tiny and random. It never decides to call a tool, so each client
forces its first call by an ordinary setting of its own; all else is sampled freely. A run's number
seeds the sampling, and is all that two runs differ in.

A client prints what its library says that the model said, one item a model call, as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeAlias

__all__ = [
    "AGAIN",
    "FIRST_TOKENS",
    "MIN_TOKENS",
    "QUESTION",
    "SYSTEM",
    "TOKENS",
    "Factor",
    "Options",
    "call",
    "list_files",
    "main",
    "product",
    "said",
]

SYSTEM = "You are a careful assistant with tools."
QUESTION = "How many files would seven such folders hold?"
AGAIN = "Say it in other words."

FIRST_TOKENS = 128
"""Enough for a forced call, whose arguments a grammar bounds."""
TOKENS = 512
"""A random answer ends after 50 on average; this far it hardly ever comes."""
MIN_TOKENS = 4
"""No answer of a random model is empty: some clients take an empty one for an error."""

Factor = Literal[2, 3, 5, 6, 7]
"""A random model ends a list of choices; of digits it need not."""


def product(left: Factor, right: Factor) -> str:
    """Multiply two numbers."""
    return str(left * right)


def list_files(suffix: Literal[".py", ".md", ""]) -> str:
    """List the files of the workspace."""
    names = sorted(path.name for path in Path(__file__).parent.iterdir())
    return "\n".join(name for name in names if name.endswith(suffix))[:200] or "no such file"


Variant: TypeAlias = "Callable[[Options], list[Any] | Coroutine[Any, Any, list[Any]]]"
"""Runs to the end on a thread, or on the event loop that all runs of a program share."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is told."""

    variant: str
    model: str
    run: int
    """Seeds the sampling."""


def main(packages: tuple[str, ...], variants: Mapping[str, Variant]) -> None:
    """``VARIANT:RUN … --model NAME``: the runs of a variant side by side, one variant after
    another; each prints a line with the client's packages and what was said."""
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", nargs="+", metavar="VARIANT:RUN", help=", ".join(variants))
    parser.add_argument("--model", required=True)
    given = parser.parse_args()
    client = " on ".join(f"{name} {version(name)}" for name in packages)
    named = [job.partition(":") for job in given.jobs]
    jobs = [Options(variant, given.model, int(run or 0)) for variant, _, run in named]
    asyncio.run(_run(jobs, client, variants))


async def _run(jobs: list[Options], client: str, variants: Mapping[str, Variant]) -> None:
    for variant, group in groupby(jobs, key=lambda job: job.variant):
        chosen = list(group)
        for options, said in zip(
            chosen,
            await asyncio.gather(*(_one(variants[variant], options) for options in chosen)),
            strict=True,
        ):
            done = {"variant": variant, "run": options.run, "client": client, "said": said}
            print(json.dumps(done), flush=True)


async def _one(variant: Variant, options: Options) -> list[Any]:
    found = await asyncio.to_thread(variant, options)
    return found if isinstance(found, list) else await found


def call(name: str, arguments: Any) -> list[Any]:
    """A tool call in a transcript; ``arguments`` as JSON or as what it spells."""
    return [name, json.loads(arguments or "{}") if isinstance(arguments, str) else arguments]


def said(text: str | None, calls: Iterable[list[Any]] = ()) -> dict[str, Any]:
    """One answer in a transcript."""
    return {"text": text or "", "calls": list(calls)}

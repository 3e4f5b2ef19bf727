"""What every client here does: a question, a tool that really runs, an answer, one more question.

The model behind the tests is tiny and random. It never decides to call a tool, so each client
forces its first call by an ordinary setting of its own; all else is sampled freely. ``--run`` seeds
the sampling, and is all that two runs differ in.

A client prints what its library says that the model said, one item a model call, as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "AGAIN",
    "FIRST_TOKENS",
    "MIN_TOKENS",
    "QUESTION",
    "SYSTEM",
    "TOKENS",
    "Factor",
    "call",
    "list_files",
    "options",
    "product",
    "report",
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


def options(*variants: str) -> argparse.Namespace:
    """``VARIANT --model NAME --run N``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=variants)
    parser.add_argument("--model", required=True)
    parser.add_argument("--run", type=int, default=0)
    return parser.parse_args()


def call(name: str, arguments: Any) -> list[Any]:
    """A tool call in a transcript; ``arguments`` as JSON or as what it spells."""
    return [name, json.loads(arguments or "{}") if isinstance(arguments, str) else arguments]


def said(text: str | None, calls: Iterable[list[Any]] = ()) -> dict[str, Any]:
    """One answer in a transcript."""
    return {"text": text or "", "calls": list(calls)}


def report(packages: tuple[str, ...], transcript: list[dict[str, Any]]) -> None:
    """Print the client's packages with their versions, and the transcript, as the last line."""
    versions = " on ".join(f"{name} {version(name)}" for name in packages)
    print(json.dumps({"client": versions, "said": transcript}))

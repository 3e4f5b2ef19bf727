"""Where a command's answers come from (a gateway, a store) and go to (a terminal, a file)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import msgspec
import typer

from driftgate.client import Client
from driftgate.errors import DriftgateError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from driftgate.gateway.answers import Answers
    from driftgate.gateway.probe import ProbeReport

__all__ = ["ask", "console", "existing", "indented", "read_or_ask", "report_text", "show", "sink"]

T = TypeVar("T")

PLAIN_WIDTH = 160
"""Columns where the output is not a terminal: tables are not squeezed into 80."""


def ask(url: str, key: str | None, question: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
    """The answer of the gateway at ``url``."""

    async def run() -> T:
        async with Client(url, key=key) as client:
            return await question(client)

    return asyncio.run(run())


def read_or_ask(
    store: Path | None,
    url: str,
    key: str | None,
    read: Callable[[Answers], T],
    question: Callable[[Client], Coroutine[Any, Any, T]],
) -> T:
    """The same view from a store on this machine, or from a gateway."""
    if store is None:
        return ask(url, key, question)
    from driftgate.gateway.answers import Answers
    from driftgate.storage import Reader

    with contextlib.closing(Reader(existing(store))) as reader:
        return read(Answers(reader))


def existing(store: Path) -> Path:
    """``store``, if it is there; else a usage error."""
    if not store.is_dir():
        raise typer.BadParameter(f"there is no store at {store}", param_hint="--store")
    return store


@contextlib.contextmanager
def sink(output: Path | None) -> Iterator[BinaryIO]:
    """stdout, or a file that has its name only once it is whole. DriftgateError where it cannot be
    written."""
    if output is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    partial = output.with_name(output.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(output)
    except OSError as error:
        raise DriftgateError(f"cannot write {output}: {error}; choose another --output") from error


def show(view: msgspec.Struct, as_json: bool, draw: Callable[[Any], RenderableType]) -> None:
    """``view`` as JSON, or as ``draw`` draws it with ``driftgate.render``."""
    if as_json:
        print(indented(view))
        return
    from driftgate import render

    console().print(draw(render))


def indented(view: object) -> str:
    """JSON for people."""
    return msgspec.json.format(msgspec.json.encode(view), indent=2).decode()


def console() -> Console:
    """stdout, as wide as the terminal."""
    from rich.console import Console

    sized = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if sized else PLAIN_WIDTH, highlight=False)


def report_text(report: ProbeReport) -> str:
    """What an engine gives, a line each, then what to do about the rest."""
    lines = [f"{report.engine} {report.version} at {report.url} serves {report.model}"]
    for label, given in (
        ("token ids", report.token_ids),
        ("logprobs", report.logprobs),
        ("both when streamed", report.streaming),
        ("routed experts", report.routes),
        ("routed experts when streamed", report.streaming_routes),
    ):
        lines.append(f"  {label:<30}{'yes' if given else 'no'}")
    lines.append(f"  {'logprobs mode':<30}{report.logprobs_mode}")
    return "\n".join([*lines, *report.notes])

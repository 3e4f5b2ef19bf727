"""``driftgate export``: the store's traces for whoever learns from them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from driftgate import cli_io
from driftgate.commands.options import DEFAULT_STORE, StoreOption

__all__ = ["export"]

CHUNK_BYTES = 1 << 20
"""The export is written in pieces of about this size."""


def export(
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="JSON lines: the only format so far.")
    ] = True,
    store: StoreOption = DEFAULT_STORE,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; else stdout.")
    ] = None,
    trajectory: Annotated[str | None, typer.Option(help="Only this trajectory.")] = None,
    include_uncertain: Annotated[
        bool,
        typer.Option(
            "--include-uncertain",
            help="Also traces whose client left before the end of the answer (delivery uncertain).",
        ),
    ] = False,
) -> None:
    """Write every delivered trace as state, action and reward.

    One JSON object a line, complete: nothing is truncated.
    """
    from driftgate.adapters.jsonl import rows
    from driftgate.storage import Reader

    lines = msgspec.json.Encoder()
    with contextlib.closing(Reader(cli_io.existing(store))) as reader, cli_io.sink(output) as sink:
        pending = bytearray()
        for row in rows(reader, trajectory, uncertain=include_uncertain):
            pending += lines.encode(row) + b"\n"
            if len(pending) > CHUNK_BYTES:
                sink.write(pending)
                pending.clear()
        sink.write(pending)

"""``driftgate report``: the dashboard as a folder of files that needs no gateway."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Annotated

import typer

from driftgate import cli_io
from driftgate.client import DEFAULT_URL, Client
from driftgate.commands.options import DAMAGED_STATUS, KeyOption, StoreInstead, UrlOption

__all__ = ["report"]


def report(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder: new, empty, or an earlier report.")
    ],
    store: StoreInstead = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    top: Annotated[
        int, typer.Option(min=0, help="Trajectories in full, the largest |D| first.")
    ] = 20,
    max_mb: Annotated[int, typer.Option(min=1, help="No larger than this, in MB.")] = 100,
    text: Annotated[
        bool, typer.Option(help="With the texts of messages and tokens; else numbers alone.")
    ] = True,
) -> None:
    """Write the dashboard as a static site that opens from a file.

    The same views and numbers as the gateway's page, with the glossary, as they are now. Open
    index.html, or put the folder on any web server. What it leaves out it says; status 1 where
    that is a record that could not be read.
    """
    from driftgate.gateway.report import Limits, Written, write_report
    from driftgate.gateway.report_source import StoreSource
    from driftgate.storage import Reader

    limits = Limits(top=top, size_bytes=max_mb << 20, text=text)

    async def ask(client: Client) -> Written:
        return await write_report(client, output, of="a gateway's store", limits=limits)

    if store is None:
        written = cli_io.ask(url, key, ask)
    else:
        with contextlib.closing(Reader(cli_io.existing(store))) as reader:
            source = StoreSource(reader)
            written = asyncio.run(write_report(source, output, of="a store", limits=limits))
    typer.echo(
        f"{output / 'index.html'}: {written.in_full} of {written.listed} in full, ", nl=False
    )
    typer.echo(f"{written.size_bytes / (1 << 20):.1f} MB")
    for line in written.left_out:
        typer.echo(f"left out: {line}")
    for line in written.damaged:
        typer.echo(f"damaged: {line}", err=True)
    if written.damaged:
        raise typer.Exit(DAMAGED_STATUS)

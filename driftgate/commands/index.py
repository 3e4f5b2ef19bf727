"""``driftgate index``: the store's index."""

from __future__ import annotations

import msgspec
import typer

from driftgate import cli_io
from driftgate.commands.options import DAMAGED_STATUS, DEFAULT_STORE, StoreOption

__all__ = ["index_app"]

index_app = typer.Typer(help="The store's index.", no_args_is_help=True)


@index_app.command("rebuild")
def rebuild(store: StoreOption = DEFAULT_STORE) -> None:
    """Make the index anew from the segments, and say what is lost.

    No gateway or teacher may be writing to the store. Status 1 where something is damaged or
    missing; the rest is kept.
    """
    from driftgate.storage import rebuild_index

    report = rebuild_index(cli_io.existing(store))
    counts = {n: v for n, v in msgspec.structs.asdict(report).items() if isinstance(v, int)}
    print(", ".join(f"{name} {value}" for name, value in counts.items()))
    for line in report.unreadable:
        typer.echo(f"unreadable: {line}", err=True)
    for line in report.lost:
        typer.echo(f"lost: {line}", err=True)
    if report.damaged_bytes or report.unreadable or report.lost:
        raise typer.Exit(DAMAGED_STATUS)

"""``driftgate index``: the store's index."""

from __future__ import annotations

import msgspec
import typer

from driftgate import cli_io
from driftgate.commands.options import DEFAULT_STORE, StoreOption

__all__ = ["index_app"]

index_app = typer.Typer(help="The store's index.", no_args_is_help=True)


@index_app.command("rebuild")
def rebuild(store: StoreOption = DEFAULT_STORE) -> None:
    """Make the index anew from the segments.

    No gateway or teacher may be writing to the store.
    """
    from driftgate.storage import rebuild_index

    report = rebuild_index(cli_io.existing(store))
    print(", ".join(f"{name} {value}" for name, value in msgspec.structs.asdict(report).items()))

"""The ``driftgate`` command: a thin edge that turns arguments into calls and errors into one line.

The commands are in ``driftgate.commands``. What a command needs is imported inside it, so that
``driftgate --help`` is quick and torch is loaded only by ``teach``.
"""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import NoReturn

import typer

from driftgate.commands.ask import cells, show
from driftgate.commands.export import export
from driftgate.commands.floor import floor
from driftgate.commands.index import index_app
from driftgate.commands.judge import explain, feedback, verdict
from driftgate.commands.key import key
from driftgate.commands.report import report
from driftgate.commands.serve import probe, serve
from driftgate.commands.tail import tail
from driftgate.commands.teach import teach
from driftgate.errors import DriftgateError

__all__ = ["app", "main"]

app = typer.Typer(
    name="driftgate",
    help="Records what a rollout engine sampled, scores it with the trainer, and says where they "
    "differ.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(serve)
app.command()(key)
app.command()(probe)
app.command()(teach)
app.command()(floor)
app.command()(tail)
app.command()(show)
app.command()(cells)
app.command()(explain)
app.command()(verdict)
app.command()(feedback)
app.command()(export)
app.command()(report)
app.add_typer(index_app, name="index")


def main() -> NoReturn:
    """Entry point. Errors made on purpose, and a disk, pipe or argument that is not well, are one
    line on stderr and status 1; wrong usage is 2."""
    output = sys.stdout if isinstance(sys.stdout, TextIOWrapper) else None  # None: it is closed
    if output is not None:
        output.reconfigure(errors="replace")  # a locale without the signs of our tables
    try:
        try:
            app()
        finally:
            if output is not None:
                output.flush()
    except DriftgateError as error:
        sys.exit(f"driftgate: {error}")
    except UnicodeEncodeError as error:
        sys.exit(f"driftgate: {error.object[:200]!a} is not UTF-8")
    except OSError as error:
        if output is not None:
            _drop(output)
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"driftgate: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _drop(output: TextIOWrapper) -> None:
    """What it did not take would be tried again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output.fileno())
    os.close(nowhere)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as version_of

    print(version_of("driftgate"))


if __name__ == "__main__":
    main()

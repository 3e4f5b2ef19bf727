"""Command lines that documents show, parsed as the command would and not run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer.main

from driftgate.cli import app

__all__ = ["parse"]


def parse(words: Sequence[str]) -> None:
    """Parse ``driftgate``'s arguments; typer's UsageError where they are wrong."""
    command: Any = typer.main.get_command(app)
    rest, path = list(words), ["driftgate"]
    while hasattr(command, "commands") and rest:
        path.append(rest[0])
        assert rest[0] in command.commands, " ".join(path)
        command = command.commands[rest.pop(0)]
    if "--help" in rest:
        return
    context = command.context_class(command, info_name=" ".join(path))
    command.parse_args(context, rest)

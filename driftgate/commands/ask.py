"""``driftgate show`` and ``cells``: ask a gateway, or a store directly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from driftgate import cli_io
from driftgate.client import DEFAULT_URL
from driftgate.commands.options import JsonOption, KeyOption, StoreInstead, UrlOption

if TYPE_CHECKING:
    from driftgate.gateway.answers import Answers
    from driftgate.tree import Tree

__all__ = ["cells", "show"]


def show(
    trajectory: Annotated[str, typer.Argument(help="Name of the trajectory.")],
    step: Annotated[int | None, typer.Option(help="This step in full, token by token.")] = None,
    as_json: JsonOption = False,
    store: StoreInstead = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
) -> None:
    """Show a trajectory, or one step of it in full.

    Its steps, what is missing, which call continues which, and where trainer and engine differ.
    """
    if step is not None:
        in_full = cli_io.read_or_ask(
            store, url, key, lambda a: a.step(trajectory, step), lambda c: c.step(trajectory, step)
        )
        cli_io.show(in_full, as_json, lambda render: render.step(in_full))
        return
    detail = cli_io.read_or_ask(
        store, url, key, lambda a: a.trajectory(trajectory), lambda c: c.trajectory(trajectory)
    )
    cli_io.show(detail, as_json, lambda render: render.trajectory(detail))
    if not as_json:
        _show_tree(trajectory, store, url, key)
        found = cli_io.read_or_ask(
            store, url, key, lambda a: a.mismatch(trajectory), lambda c: c.mismatch(trajectory)
        )
        cli_io.show(found, False, lambda render: render.mismatch(found))


def _show_tree(trajectory: str, store: Path | None, url: str, key: str | None) -> None:
    from driftgate.render_tree import tree

    def read(answers: Answers) -> Tree:
        from driftgate.gateway.api_tree import read_tree

        return read_tree(answers.reader, trajectory)

    found = cli_io.read_or_ask(store, url, key, read, lambda client: client.tree(trajectory))
    cli_io.console().print(tree(found))


def cells(
    as_json: JsonOption = False,
    store: StoreInstead = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
) -> None:
    """Print the matrix of engines against trainers.

    Each number has its 95 % interval and, beside it, the noise floor.
    """
    found = cli_io.read_or_ask(
        store, url, key, lambda answers: answers.cells(), lambda client: client.cells()
    )
    cli_io.show(found, as_json, lambda render: render.matrix(found.items))

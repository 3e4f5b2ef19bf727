"""``driftgate tail``, ``show`` and ``cells``: ask a gateway, or a store directly."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

from driftgate import cli_io
from driftgate.client import DEFAULT_URL, Client
from driftgate.commands.options import JsonOption, KeyOption, StoreInstead, UrlOption

if TYPE_CHECKING:
    from driftgate.gateway.answers import Answers
    from driftgate.tree import Tree

__all__ = ["cells", "show", "tail"]


def tail(
    url: UrlOption = DEFAULT_URL,
    trajectory: Annotated[str | None, typer.Option(help="Only this trajectory.")] = None,
    after: Annotated[
        str, typer.Option(help="Cursor to go on behind: 0 for all there is, `now` for what comes.")
    ] = "now",
    follow: Annotated[bool, typer.Option(help="Stay for what comes.")] = True,
    as_json: JsonOption = False,
    key: KeyOption = None,
) -> None:
    """Print a line for each scored step as it arrives.

    Green, amber and red are METRICS' bands; grey is what is not comparable.
    """
    if after != "now" and not (after.isascii() and after.isdigit()):
        raise typer.BadParameter(f"{after!r} is neither a cursor nor `now`", param_hint="--after")
    start: int | Literal["now"] = "now" if after == "now" else int(after)

    async def run(client: Client) -> None:
        from driftgate.render import drift_line

        console = cli_io.console()
        events = client.drift(after=start, follow=follow, trajectory=trajectory)
        async with contextlib.aclosing(events):
            async for event in events:
                if as_json:
                    print(msgspec.json.encode(event).decode(), flush=True)
                else:
                    console.print(drift_line(event), soft_wrap=True)

    cli_io.ask(url, key, run)


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

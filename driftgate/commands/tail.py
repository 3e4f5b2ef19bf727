"""``driftgate tail``: scored steps as they arrive."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

from driftgate import cli_io
from driftgate.bands import Colour
from driftgate.client import DEFAULT_URL, Client
from driftgate.commands.options import JsonOption, KeyOption, UrlOption
from driftgate.views import DriftEvent, Kind

if TYPE_CHECKING:
    from rich.console import Console

    from driftgate.tailing import Tail

__all__ = ["tail"]


def tail(
    url: UrlOption = DEFAULT_URL,
    trajectory: Annotated[str | None, typer.Option(help="Only this trajectory.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    band: Annotated[
        Colour | None,
        typer.Option(help="Only what is comparable and in this band of METRICS or a worse one."),
    ] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only scores of this kind.")] = None,
    after: Annotated[
        str, typer.Option(help="Cursor to go on behind: 0 for all there is, `now` for what comes.")
    ] = "now",
    follow: Annotated[bool, typer.Option(help="Stay for what comes.")] = True,
    web: Annotated[
        bool, typer.Option("--web", help="Print the address of this on the dashboard, and end.")
    ] = False,
    as_json: JsonOption = False,
    key: KeyOption = None,
) -> None:
    """Print a line for each scored step as it arrives.

    Green, amber and red are METRICS' bands; grey is what is not comparable. On a terminal, p pauses
    and goes on, q ends.
    """
    from driftgate.tailing import Tail, Wanted

    if after != "now" and not (after.isascii() and after.isdigit()):
        raise typer.BadParameter(f"{after!r} is neither a cursor nor `now`", param_hint="--after")
    start: int | Literal["now"] = "now" if after == "now" else int(after)
    wanted = Wanted(trajectory=trajectory, model=model, band=band, kind=kind)
    if web:
        typer.echo(wanted.address(url))
        return
    console = cli_io.console()
    shown = Tail(wanted, _as_json if as_json else _as_line(console))

    async def run(client: Client) -> None:
        events = client.drift(
            after=start, follow=follow, trajectory=trajectory, kind=kind, reached=shown.reach
        )
        async with contextlib.aclosing(events), _terminal(shown, console, as_json or not follow):
            async for event in events:
                shown.take(event)

    cli_io.ask(url, key, run)


def _as_json(event: DriftEvent) -> None:
    print(msgspec.json.encode(event).decode(), flush=True)


def _as_line(console: Console) -> Callable[[DriftEvent], None]:
    from driftgate.render import drift_line

    return lambda event: console.print(drift_line(event), soft_wrap=True)


@contextlib.asynccontextmanager
async def _terminal(tail: Tail, console: Console, quiet: bool) -> AsyncIterator[None]:
    """Keys and a line of status where a person sits before it; q ends the block."""
    if quiet or not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield
        return
    from rich.live import Live
    from rich.text import Text

    status = Text(tail.status(), "dim", no_wrap=True, overflow="ellipsis")
    task = asyncio.current_task()
    assert task is not None
    ended = False
    live = Live(status, console=console, auto_refresh=False, transient=True)

    def refresh() -> None:
        status.plain = tail.status()
        live.refresh()

    def pressed(keys: str) -> None:
        nonlocal ended
        for key in keys:
            if key in "pP ":
                tail.toggle()
            elif key in "qQ":
                ended = True
                task.cancel()

    tail.changed = refresh
    with _keys(pressed), live:  # keys pressed before them are lost
        refresh()
        try:
            yield
        except asyncio.CancelledError:
            if not ended:
                raise
            task.uncancel()


@contextlib.contextmanager
def _keys(pressed: Callable[[str], None]) -> Iterator[None]:
    """Each key as it is pressed, unseen; the terminal is as before when this ends."""
    import os
    import termios
    import tty

    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)
    loop = asyncio.get_running_loop()
    tty.setcbreak(file)
    loop.add_reader(file, lambda: pressed(os.read(file, 64).decode(errors="ignore")))
    try:
        yield
    finally:
        loop.remove_reader(file)
        termios.tcsetattr(file, termios.TCSADRAIN, before)

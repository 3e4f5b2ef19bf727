"""Tables that are whole at any width of the terminal: a number is never cut in the middle.

Rich squeezes columns until a table fits, down to an ellipsis: ``9.33…`` for 9.33e-04. Here columns
are left out instead, and said so; where that is not enough each row becomes a block of lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

__all__ = ["Fitted"]

ROOM = 10_000
"""Characters of a line in which every table fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A table by its columns and rows."""

    columns: Sequence[tuple[str, JustifyMethod]]
    """Names, and where their values stand."""
    rows: Sequence[Sequence[RenderableType]]
    spare: Sequence[str] = ()
    """Columns that may be left out, the first one first."""
    title: str | None = None
    head_rows: int = 0
    """Rows above a rule; 0: there is none."""

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        for count in range(len(self.spare) + 1):
            shown = [
                at for at, (name, _) in enumerate(self.columns) if name not in self.spare[:count]
            ]
            widths = self._widths(shown, console, options)
            if widths is not None:
                yield self._table(shown, widths)
                if count:
                    left = ", ".join(self.spare[:count])
                    yield Text(f"a wider terminal also shows: {left}", "dim")
                return
        yield from self._blocks()

    def fits(self, console: Console, options: ConsoleOptions) -> bool:
        """As a whole."""
        return self._widths(range(len(self.columns)), console, options) is not None

    def _widths(
        self, shown: Sequence[int], console: Console, options: ConsoleOptions
    ) -> list[int] | None:
        """Of the values of each column, in characters; None where a word would be cut."""
        room = options.update_width(ROOM)
        least, most = list[int](), list[int]()
        for at in shown:
            values = [Text(self.columns[at][0]), *(row[at] for row in self.rows)]
            sizes = [Measurement.get(console, room, value) for value in values]
            least.append(max(size.minimum for size in sizes))
            most.append(max(size.maximum for size in sizes))
        # A rule on either side of each, and a blank between it and the value, but at the edges.
        left = options.max_width - sum(least) - (3 * len(shown) - 1)
        if left < 0:
            return None
        widths = least
        by_need = sorted(range(len(shown)), key=lambda column: most[column] - least[column])
        for done, column in enumerate(by_need):
            more = min(most[column] - least[column], left // (len(shown) - done))
            widths[column] += more
            left -= more
        return widths

    def _table(self, shown: Sequence[int], widths: Sequence[int]) -> Table:
        table = Table(title=self.title, title_justify="left", pad_edge=False)
        for at, width in zip(shown, widths, strict=True):
            name, justify = self.columns[at]
            table.add_column(Text(name), justify=justify, width=width)
        for number, row in enumerate(self.rows, 1):
            table.add_row(*(row[at] for at in shown), end_section=number == self.head_rows)
        return table

    def _blocks(self) -> Iterator[RenderableType]:
        if self.title is not None:
            yield Text(self.title, "italic")
        for row in self.rows:
            for (name, _), value in zip(self.columns, row, strict=True):
                if name:
                    yield Text(f"{name} ", "dim", end="")
                yield value
            yield ""

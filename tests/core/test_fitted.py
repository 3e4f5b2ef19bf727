"""Tables at any width: what is shown is whole, what is not is named."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from driftgate.fitted import Fitted

COLUMNS = ("step", "finish", "k3", "mean|D|", "worst")
ROWS = (
    ("0.0", "stop", "1.08e-03", "0.0312", '" the" +0.120'),
    ("12.0", "tool_calls", "9.33e-04", "0.0298", '"\\n\\n" -1.250'),
)


def drawn(width: int, *spare: str) -> str:
    table = Fitted(columns=[(name, "left") for name in COLUMNS], rows=ROWS, spare=spare)
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", range(20, 100, 3))
def test_no_value_is_cut(width: int) -> None:
    text = drawn(width, "finish", "worst")
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    words, left = text.replace("│", " ").split(), text.partition("also shows:")[2]
    for row in ROWS:
        for name, value in zip(COLUMNS, row, strict=True):
            assert name in left or all(word in words for word in value.split())


def test_columns_are_left_out_in_their_order_and_named() -> None:
    assert "also shows" not in drawn(80, "finish", "worst")
    assert drawn(48, "finish", "worst").endswith("a wider terminal also shows: finish\n")
    assert "finish, worst" in " ".join(drawn(35, "finish", "worst").split())


def test_where_that_is_not_enough_a_row_is_a_block() -> None:
    assert drawn(26).split() == [
        word
        for row in ROWS
        for name, value in zip(COLUMNS, row, strict=True)
        for word in (name, *value.split())
    ]

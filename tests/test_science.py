"""The rows of ``make science`` that need no engine, and what makes a row hold."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from science.__main__ import FAST, STORED, fast
from science.table import Row, at_least, at_most, exactly, markdown, near, worst


def test_every_fast_row_holds(tmp_path: Path) -> None:
    rows = fast(tmp_path)
    assert [f"{row.part}: {row.what}" for row in rows if not row.holds] == []
    assert {row.part for row in rows} == {*(part for part, _ in FAST), STORED}
    assert len(rows) > 250


@pytest.mark.parametrize(
    "row",
    [
        near("p", "a value that is off", 1.0 + 1e-8, 1.0, rel=1e-9),
        near("p", "a value that is not there", None, 1.0, rel=1e-9),
        near("p", "a list that is shorter", [1.0], [1.0, 2.0], rel=1e-9),
        near("p", "no number", math.nan, 1.0, rel=1e-9),
        exactly("p", "another word", "yes", "no"),
        exactly("p", "null for a number", None, 0),
        worst("p", "a difference that is no number", math.nan, 1.0, "x"),
        at_least("p", "too small", 1.0, 2.0),
        at_most("p", "too large", 2.0, 1.0),
        at_least("p", "no number, where one must be large", math.nan, 2.0),
        at_most("p", "no number, where one must be small", math.nan, 1.0),
        Row("p", "infinitely far", 1.0, 1.0, math.inf, math.inf),
    ],
    ids=lambda row: row.what,
)
def test_what_is_off_or_absent_does_not_hold(row: Row) -> None:
    assert not row.holds
    assert row.cells()[-1] == "NO"


def test_the_table_names_each_part_once() -> None:
    rows = [exactly(part, "x", 1, 1) for part in ("one", "one", "two")]
    lines = markdown(rows).splitlines()
    assert sum("**one**" in line for line in lines) == 1
    assert len(lines) == 2 + 2 + 3
    assert len({len(line) for line in lines}) == 1

"""Every fault of ``make faults``, a few times each: nothing is lost and nothing is wrong.

The tables with their figures come from the full runs (docs/reliability.md).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from reliability.__main__ import FAULTS, run_rows


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_lost_and_nothing_is_wrong(name: str, tmp_path: Path) -> None:
    rows = run_rows(name, tmp_path, full=False)
    assert rows
    assert all(row.tries for row in rows)
    for row in rows:
        assert row.good, (row.fault, row.notes)

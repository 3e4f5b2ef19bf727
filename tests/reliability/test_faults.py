"""Every fault of ``make faults``, a few times each: nothing is lost and nothing is wrong.

The tables with their figures come from the full runs (docs/reliability.md).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from reliability import teacher
from reliability.__main__ import FAULTS, run_rows
from reliability.engine import serve_engine
from reliability.kills import SCRIPTS
from reliability.verdict import Row


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "teacher"])
def test_nothing_is_lost_and_nothing_is_wrong(name: str, tmp_path: Path) -> None:
    rows = run_rows(name, tmp_path, full=False)
    assert rows
    assert all(row.tries for row in rows)
    for row in rows:
        assert row.good, (row.fault, row.notes)


def test_gateway_and_worker_are_killed_at_once(tmp_path: Path) -> None:
    from driftgate.testing.checkpoints import make_checkpoint

    model = make_checkpoint(tmp_path / "checkpoint", "dense")

    async def run() -> Row:
        async with serve_engine(SCRIPTS, teacher.speller(model)) as engine:
            return await teacher.both(engine, tmp_path, model, 1)

    row = asyncio.run(run())
    assert row.tries == 1
    assert row.good, row.notes

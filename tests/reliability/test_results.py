"""No result is forgotten: tables sum over every run, and name the runs that lost something."""

from __future__ import annotations

from pathlib import Path

import msgspec

from benchmarks.report import Goal
from reliability.results import history, keep, kept, summed
from reliability.verdict import Row

BAD = Row("kill -9", "10 answers", tries=3, lost=2, worst=186.4, notes=["a: gone", "b: gone"])
GOOD = Row("kill -9", "12 answers", tries=100, worst=4.2)


def test_a_bad_run_stays_in_the_table_after_a_good_one(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    runs = [keep("kills", "kills", rows=[BAD]), keep("disk", "disk", rows=[GOOD])]
    runs.append(keep("kills", "kills --full", rows=[GOOD, Row("another", tries=1)]))
    path.write_bytes(b"".join(msgspec.json.encode(run) + b"\n" for run in runs))
    found = kept("kills", path)
    assert [run.rows[0].notes for run in found] == [["a: gone", "b: gone"], []]
    assert summed(found).rows == [
        ["kill -9", "2", "103", "12 answers", "186 ms", "2", "0"],
        ["another", "1", "1", "", "", "0", "0"],
    ]
    first, second = (row[-1] for row in history(found).rows)
    assert first == "3 tries, 2 lost, 0 wrong (kill -9)"
    assert second == "101 tries, 0 lost, 0 wrong"


def test_figures_are_listed_by_run() -> None:
    run = keep("soak", "soak", goals=[Goal("memory over the run", "1.10", "1.65", met=False)])
    assert history([run]).rows[0][-1] == "memory over the run: 1.65"

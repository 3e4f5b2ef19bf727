"""A small version of ``make soak``: no stream fails, all is stored, nothing is left open."""

from __future__ import annotations

from pathlib import Path

from benchmarks.payloads import SMALL
from reliability.soak import Size, measure

SIZE = Size(seconds=3.0, leak_calls=400, direct_s=1.0, streams=100, shape=SMALL, spread_s=1.0)


def test_streams_through_two_gateways_and_what_they_leave(tmp_path: Path) -> None:
    section = measure(tmp_path, SIZE)
    assert [goal for goal in section.goals if not goal.met] == []
    _, ours = section.tables[0].rows
    assert int(ours[1]) > SIZE.streams, "each stream was followed by another"

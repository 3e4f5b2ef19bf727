"""What a kill would lose is told before it is late."""

from __future__ import annotations

import pytest

from driftgate.storage import backlog as module
from driftgate.storage.backlog import FIXED_BYTES, Backlog


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def test_nothing_waits_at_first_and_when_all_is_handed_over(clock: Clock) -> None:
    backlog = Backlog()
    assert backlog.seconds() == 0
    backlog.add(10)
    clock.now += 3
    assert backlog.seconds() == 3
    backlog.written(10, 0.5)
    assert backlog.seconds(more=1000) == 0


def test_the_oldest_counts(clock: Clock) -> None:
    backlog = Backlog()
    for _ in range(3):
        backlog.add(10)
        clock.now += 1
    backlog.written(10, 0.0)
    assert backlog.seconds() == 2


def test_a_burst_is_foreseen_at_the_pace_of_late(clock: Clock) -> None:
    backlog = Backlog()
    for _ in range(200):
        backlog.add(FIXED_BYTES)  # twice the work of an empty one
        backlog.written(FIXED_BYTES, 0.002)
    for _ in range(30):
        backlog.add(FIXED_BYTES)
    assert backlog.seconds() == pytest.approx(30 * 0.002, rel=0.01)
    assert backlog.seconds(more=10) == pytest.approx(35 * 0.002, rel=0.01)
    assert backlog.seconds(more=10, more_bytes=10 * FIXED_BYTES) == pytest.approx(0.08, rel=0.01)


def test_one_slow_write_is_not_taken_for_the_pace(clock: Clock) -> None:
    backlog = Backlog()
    for _ in range(200):
        backlog.add(0)
        backlog.written(0, 0.001)
    backlog.add(0)
    backlog.written(0, 0.1)
    backlog.add(0)
    assert backlog.seconds() < 0.01

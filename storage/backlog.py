"""How far a writer is behind: how long what is submitted now will be in this process alone.

The age of the oldest submission tells of a disk that does not take, only when it is late; what is
queued, at the pace of late, tells of a burst before it is late."""

from __future__ import annotations

import time
from collections import deque

__all__ = ["Backlog"]

FIXED_BYTES = 32 << 10
"""What a submission costs besides its bytes, as bytes: an intent takes as long as 30 kB of ids."""

SMOOTHING = 1 / 16
"""Weight of the newest submission in the pace: one that the machine held up says little."""


class Backlog:
    """``add`` is called with the writer's lock held, ``written`` on its writing thread, ``seconds``
    on any."""

    def __init__(self) -> None:
        self._came: deque[float] = deque()
        """When each came that is not yet handed over."""
        self._added = self._done = 0
        """Work, in bytes, since the start."""
        self._pace = 0.0
        """Seconds a byte of work."""

    def add(self, size_bytes: int) -> None:
        """A submission has come."""
        self._came.append(time.monotonic())
        self._added += size_bytes + FIXED_BYTES

    def written(self, size_bytes: int, spent_s: float) -> None:
        """The oldest was handed to the operating system; it took ``spent_s``."""
        work = size_bytes + FIXED_BYTES
        self._pace += SMOOTHING * (spent_s / work - self._pace)
        self._done += work
        self._came.popleft()

    def seconds(self, more: int = 0, more_bytes: int = 0) -> float:
        """How long what comes after ``more`` further submissions of ``more_bytes`` in all will
        wait, at least; 0 where nothing waits now."""
        try:
            age_s = time.monotonic() - self._came[0]
        except IndexError:
            return 0.0
        work = self._added - self._done + more_bytes + more * FIXED_BYTES
        return max(age_s, work * self._pace)

"""Holds calls back while storage is behind, so that a busy gateway slows down before it loses
answers.

An engine that answers faster than the disk takes would fill the writer's queue, and what does not
fit is lost. Calls therefore wait before the engine is asked, in the half of the queue that answers
under way do not need."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from driftgate.gateway.metrics import Metrics

__all__ = ["PRESSURE_WAIT_S", "Pressure"]

PRESSURE_WAIT_S = 2.0
"""Longest that a call is held back: a disk that takes longer is not busy but stuck."""


class Pressure:
    """The queue's level and those who wait for it to fall. ``wait`` belongs to the event loop."""

    def __init__(self, queued_bytes: Callable[[], int], limit_bytes: int, metrics: Metrics) -> None:
        """``queued_bytes`` is asked from any thread; ``limit_bytes`` is where the queue is full."""
        self._queued_bytes = queued_bytes
        self._high_bytes = limit_bytes // 2
        self._metrics = metrics
        self._fell = asyncio.Event()
        self._waiting = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def wait(self) -> bool:
        """Wait while the queue is more than half full; False where it still is at the end."""
        if not self._high():
            return True
        self._loop = asyncio.get_running_loop()
        self._waiting += 1
        try:
            async with asyncio.timeout(PRESSURE_WAIT_S):
                while True:
                    # In this order: what falls after the look sets the event again.
                    self._fell.clear()
                    if not self._high():
                        break
                    await self._fell.wait()
        except TimeoutError:
            self._metrics.held_back.labels("gave_up").inc()
            return False
        finally:
            self._waiting -= 1
        self._metrics.held_back.labels("released").inc()
        return True

    def settled(self) -> None:
        """Something left the queue. Any thread."""
        if self._waiting and self._loop is not None and not self._high():
            self._loop.call_soon_threadsafe(self._fell.set)

    def _high(self) -> bool:
        return self._queued_bytes() > self._high_bytes

"""Holds calls back while storage is behind, so that a busy gateway slows down before it loses
answers.

An engine that answers faster than the disk takes would fill the writer's queue, and what does not
fit is lost. Calls therefore wait before the engine is asked, in the half of the queue that answers
under way do not need, and an answer waits with its end until it has room. Neither waits for a disk
that does not move."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from driftgate.gateway.metrics import Metrics

__all__ = ["PRESSURE_WAIT_S", "Pressure"]

PRESSURE_WAIT_S = 2.0
"""Longest that anything is held back: a disk that takes longer is not busy but stuck."""

SPARE_SHARE = 1 / 16
"""Of the queue, for intents and outcomes, which claim no room."""


class Pressure:
    """The queue's level and those who wait for it to fall. ``settled`` is called on any thread, the
    rest on the event loop."""

    def __init__(self, queued_bytes: Callable[[], int], limit_bytes: int, metrics: Metrics) -> None:
        """``queued_bytes`` is asked from any thread; ``limit_bytes`` is where the queue is full."""
        self._queued_bytes = queued_bytes
        self._limit_bytes = limit_bytes
        self._metrics = metrics
        self._claimed_bytes = 0
        self._moved = asyncio.Event()
        self._waiting = 0
        self._stuck = False
        """Somebody waited in vain, and nothing has left the queue since."""
        self._loop: asyncio.AbstractEventLoop | None = None

    async def wait(self) -> bool:
        """Wait while the queue is more than half full; False where it still is at the end."""
        return await self._until(lambda: self._taken() <= self._limit_bytes // 2)

    async def claim(self, size_bytes: int) -> int:
        """Wait until there is room for so much, or none can be hoped for, and claim it."""
        limit = self._limit_bytes * (1 - SPARE_SHARE)
        await self._until(lambda: self._taken() + size_bytes <= limit or not self._queued_bytes())
        self._claimed_bytes += size_bytes
        return size_bytes

    def release(self, claimed_bytes: int) -> None:
        """What was claimed is in the queue, or nowhere."""
        self._claimed_bytes -= claimed_bytes

    def settled(self) -> None:
        """Something left the queue."""
        self._stuck = False
        if self._waiting and self._loop is not None:
            self._loop.call_soon_threadsafe(self._moved.set)

    def _taken(self) -> int:
        return self._queued_bytes() + self._claimed_bytes

    async def _until(self, fits: Callable[[], bool]) -> bool:
        if fits():
            return True
        if self._stuck:
            return False
        self._loop = asyncio.get_running_loop()
        self._waiting += 1
        try:
            async with asyncio.timeout(PRESSURE_WAIT_S):
                while True:
                    # In this order: what leaves after the look sets the event again.
                    self._moved.clear()
                    if fits():
                        break
                    await self._moved.wait()
        except TimeoutError:
            self._stuck = True
            self._metrics.held_back.labels("gave_up").inc()
            return False
        finally:
            self._waiting -= 1
        self._metrics.held_back.labels("released").inc()
        return True

"""Holds calls back while storage is behind, so that a busy gateway slows down before it loses
answers.

An engine that answers faster than the disk takes would fill the writer's queue, and what does not
fit is lost. Calls therefore wait before the engine is asked, in the half of the queue that answers
under way do not need, and an answer waits with its end until it has room, and until what came
before it is as good as handed to the operating system: what a kill of the process may lose is
bounded in time. Nobody waits for a disk that does not move."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from driftgate.gateway.metrics import Metrics

__all__ = ["PRESSURE_WAIT_S", "Pressure"]

PRESSURE_WAIT_S = 2.0
"""Longest that anything is held back: a disk that takes longer is not busy but stuck."""

BEHIND_S = 0.02
"""An answer's end waits while its record would wait longer. The rest of the 50 ms that ``group``
may lose is for the writer's look into its queue every 5 ms and for a guess too low by half."""

LOOK_S = 0.002
"""Between two looks of the one answer that is next."""

SPARE_SHARE = 1 / 16
"""Of the queue, for intents and outcomes, which claim no room."""


class Pressure:
    """The queue's level and those who wait for it to fall. ``settled`` is called on any thread, the
    rest on the event loop."""

    def __init__(
        self,
        queued_bytes: Callable[[], int],
        limit_bytes: int,
        metrics: Metrics,
        *,
        behind_s: Callable[[int, int], float] | None = None,
    ) -> None:
        """``queued_bytes`` is asked from any thread; ``limit_bytes`` is where the queue is full.

        ``behind_s(more, more_bytes)``: how long what comes after so many answers more will wait to
        be handed to the operating system; None where no answer's end goes out before that."""
        self._queued_bytes = queued_bytes
        self._limit_bytes = limit_bytes
        self._metrics = metrics
        self._behind_s = behind_s
        self._next = asyncio.Lock()
        """Held by the answer that looks; the others stand in line behind it."""
        self._claims = self._claimed_bytes = 0
        self._moved = asyncio.Event()
        self._waiting = 0
        self._stuck = False
        """Somebody waited in vain, and nothing has left the queue since."""
        self._loop: asyncio.AbstractEventLoop | None = None

    async def wait(self) -> bool:
        """Wait while the queue is more than half full; False where it still is at the end."""
        return await self._until(lambda: self._taken() <= self._limit_bytes // 2)

    async def claim(self, size_bytes: int) -> int:
        """Wait until the writer has caught up, and there is room for so much or none can be hoped
        for; claim it."""
        await self._catch_up()
        limit = self._limit_bytes * (1 - SPARE_SHARE)
        await self._until(lambda: self._taken() + size_bytes <= limit or not self._queued_bytes())
        self._claims += size_bytes > 0
        self._claimed_bytes += size_bytes
        return size_bytes

    def release(self, claimed_bytes: int) -> None:
        """What was claimed is in the queue, or nowhere."""
        self._claims -= claimed_bytes > 0
        self._claimed_bytes -= claimed_bytes

    def settled(self) -> None:
        """Something left the queue."""
        self._stuck = False
        if self._waiting and self._loop is not None:
            self._loop.call_soon_threadsafe(self._moved.set)

    def _taken(self) -> int:
        return self._queued_bytes() + self._claimed_bytes

    def _is_behind(self) -> bool:
        """Neither on time nor so late that it is stuck."""
        if self._behind_s is None:
            return False
        return BEHIND_S < self._behind_s(self._claims, self._claimed_bytes) <= PRESSURE_WAIT_S

    async def _catch_up(self) -> None:
        """Wait, in order of arrival, while the writer is behind.

        Only one looks at a time, and who goes submits before the next one looks: so a burst is let
        go piece by piece."""
        if not (self._next.locked() or self._is_behind()):
            return
        async with self._next:
            while self._is_behind():  # noqa: ASYNC110 - it ends by the clock as well
                await asyncio.sleep(LOOK_S)
        self._metrics.held_back.labels("released").inc()

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

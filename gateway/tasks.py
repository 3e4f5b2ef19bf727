"""The one place where the gateway starts tasks: each has a name, this owner, and an end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

__all__ = ["Tasks", "beside"]

T = TypeVar("T")

log = logging.getLogger("driftgate.gateway")


class Tasks:
    """Runs coroutines beside the handlers; ``close`` cancels and awaits what is left."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work``; its failure is logged."""
        task = asyncio.get_running_loop().create_task(work, name=f"driftgate-{name}")
        self._running.add(task)
        task.add_done_callback(self._ended)

    async def close(self) -> None:
        """End every task."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task %s failed", task.get_name(), exc_info=error)


@asynccontextmanager
async def beside(name: str, work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Run ``work`` beside the block; it is cancelled and awaited where the block ends before it."""
    task = asyncio.get_running_loop().create_task(work, name=f"driftgate-{name}")
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

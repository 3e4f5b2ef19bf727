"""The one place where the gateway starts tasks: each has a name, this owner, and an end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

__all__ = ["Tasks"]

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

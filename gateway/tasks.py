"""The one place where the gateway starts and ends tasks: each has a name, an owner, and an end."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

__all__ = ["Calls", "Tasks", "beside", "in_thread", "watch_lag"]

T = TypeVar("T")

CUT_WAIT_S = 0.5
"""A cancelled call only writes down that it was; this is plenty."""

LAG_INTERVAL_S = 0.1
"""Between two looks at the loop's lag: ten a second cost nothing and give a p99 in a minute."""

log = logging.getLogger("driftgate.gateway")


class Calls:
    """The requests under way that a stop waits for, and ends where they take too long."""

    def __init__(self) -> None:
        self.hurry = asyncio.Event()
        """Set by whoever wants ``stop`` not to wait."""
        self._running: set[asyncio.Task[Any]] = set()

    @contextmanager
    def running(self) -> Iterator[None]:
        """The current task serves a call for the length of the block."""
        task = asyncio.current_task()
        assert task is not None, "a call is served by a task"
        self._running.add(task)
        try:
            yield
        finally:
            self._running.discard(task)

    async def stop(self, wait_s: float, before_cut: Callable[[], None]) -> int:
        """Wait up to ``wait_s`` for the calls; cancel the rest, ``before_cut`` first. How many."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        async with beside("hurry", self.hurry.wait()) as hurried:
            while self._running and not hurried.done() and loop.time() < deadline:
                await asyncio.wait(
                    {*self._running, hurried},
                    timeout=deadline - loop.time(),
                    return_when=asyncio.FIRST_COMPLETED,
                )
        cut = set(self._running)
        if cut:
            before_cut()
            for task in cut:
                task.cancel()
            await asyncio.wait(cut, timeout=CUT_WAIT_S)
        return len(cut)


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


async def watch_lag(observe: Callable[[float], None], count: Callable[[float], None]) -> None:
    """Tell how late the loop is, in seconds, and how many tasks it has; for ever."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_INTERVAL_S
        await asyncio.sleep(LAG_INTERVAL_S)
        observe(max(0.0, loop.time() - due))
        count(len(asyncio.all_tasks()))


@asynccontextmanager
async def beside(name: str, work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Run ``work`` beside the block; it is cancelled and awaited where the block ends before it."""
    task = asyncio.get_running_loop().create_task(work, name=f"driftgate-{name}")
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def in_thread(name: str, work: Callable[[], T]) -> T:
    """``work()`` on a thread of its own, for which neither a cancellation nor the process's end
    waits: for long reading only."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # a waiter that leaves does not take it along

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # the edge of this thread: it is the waiter's
            future.set_exception(error)

    threading.Thread(target=run, name=f"driftgate-{name}", daemon=True).start()
    return await asyncio.wrap_future(future)

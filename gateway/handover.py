"""Lets the end of an answer out when its record is with the operating system: then a kill of the
gateway, however busy it is, loses no answer whose end its agent has.

It is not on disk by then: ``strict`` waits for that. A writer that does not move is not waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TypeAlias

from driftgate.gateway.metrics import Metrics

__all__ = ["HandOver", "Ticket"]

HAND_OVER_WAIT_S = 2.0
"""Longest that an answer waits: the writer needs some milliseconds, and what takes longer than this
is a disk that is stuck."""

Ticket: TypeAlias = asyncio.Future[None]


class HandOver:
    """``written`` is called on the writer thread, the rest on the event loop."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._written: deque[Ticket] = deque()
        self._is_stuck = False
        """Somebody waited in vain, and nothing has been written since."""

    def ticket(self) -> Ticket:
        """For an answer that is about to be submitted."""
        return asyncio.get_running_loop().create_future()

    def written(self, ticket: Ticket) -> None:
        """What was submitted with ``ticket`` is written, or cannot be."""
        self._written.append(ticket)
        if len(self._written) == 1:  # else the loop has been called, or is about to look
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                ticket.get_loop().call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._is_stuck = False
        while self._written:
            ticket = self._written.popleft()
            if not ticket.done():
                ticket.set_result(None)

    async def wait(self, ticket: Ticket) -> None:
        """Wait until it is written, or cannot be hoped to be soon."""
        if self._is_stuck:
            return
        try:
            async with asyncio.timeout(HAND_OVER_WAIT_S):
                await ticket
        except TimeoutError:
            self._is_stuck = True
            self._metrics.held_back.labels("gave_up").inc()

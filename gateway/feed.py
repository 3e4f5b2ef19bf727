"""Live scores for any number of followers, each exactly once and in order of the index's ``seq``.

A follower pulls: it owns a cursor and asks for what is behind it. What is recent comes from a ring
that one shared poller fills; what is older comes from the index, page by page. A slow follower
therefore costs no memory and loses nothing: when the ring has moved on, it reads from the index
again. All reading of the index happens on a thread; the loop only hands out bytes that were
encoded there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from itertools import takewhile
from typing import NamedTuple, TypeVar

from driftgate.views import Kind

__all__ = ["POLL_INTERVAL_S", "Event", "Feed", "Source"]

T = TypeVar("T")

POLL_INTERVAL_S = 0.25
"""How late a score may be seen; the teacher's forwards take longer than this."""

PAGE = 256
"""Events read from the index at once: about 0.5 MB of JSON."""

RING = 4096
"""Recent events kept in memory while somebody follows: about 8 MB; older ones are in the index."""

NOT_LIVE = -1
"""Bounds of the ring while nobody follows; cursors start at 0."""

log = logging.getLogger("driftgate.feed")


class Event(NamedTuple):
    """One encoded score."""

    cursor: int
    trajectory: str
    kind: str
    body: bytes
    """JSON of a ``views.DriftEvent``, one line without its end."""


class Source(NamedTuple):
    """Where scores come from. Both are called on a thread."""

    last_seq: Callable[[], int]
    read: Callable[[int, int, str | None, Kind | None], Sequence[Event]]
    """(after, limit, trajectory, kind) -> at most ``limit`` events behind ``after``, in order."""


class Feed:
    """The shared poller and its ring. Lives between ``start`` and ``close``."""

    def __init__(
        self,
        source: Source,
        *,
        executor: Executor,
        poll_interval_s: float = POLL_INTERVAL_S,
        ring: int = RING,
    ) -> None:
        self.followers = 0
        self.closing = False
        self.poll_errors = 0
        self._source = source
        self._executor = executor
        self._poll_interval_s = poll_interval_s
        self._ring: deque[Event] = deque(maxlen=ring)
        self._from = self._upto = NOT_LIVE
        """The ring holds all with ``_from < cursor <= _upto``; only the poller writes it."""
        self._wanted = asyncio.Event()
        self._changed = asyncio.Condition()
        self._poller: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the poller; it rests while nobody follows."""
        self._poller = asyncio.create_task(self._poll(), name="driftgate-drift-poller")

    async def close(self) -> None:
        """End every follower and the poller."""
        self.closing = True
        async with self._changed:
            self._changed.notify_all()
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)

    def __enter__(self) -> Feed:
        """Follow: the poller works from here to ``__exit__``."""
        self.followers += 1
        self._wanted.set()
        return self

    def __exit__(self, *exc: object) -> None:
        self.followers -= 1

    async def last_seq(self) -> int:
        """The newest cursor: where ``after=now`` begins."""
        return await self._thread(self._source.last_seq)

    async def page(
        self, after: int, trajectory: str | None = None, kind: Kind | None = None
    ) -> tuple[list[Event], int]:
        """At most ``PAGE`` events behind ``after``, from the index, and where to go on."""
        return await self._thread(lambda: self._page(after, trajectory, kind))

    async def next(
        self, after: int, trajectory: str | None, kind: Kind | None, *, timeout_s: float
    ) -> tuple[list[Event], int]:
        """The next events behind ``after``; an empty list when ``timeout_s`` passed without any."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not self.closing:
            if self._from <= after <= self._upto:
                events, after = self._recent(after, trajectory, kind)
            else:
                events, after = await self.page(after, trajectory, kind)
            if events:
                return events, after
            if not await self._wait_beyond(after, deadline):
                break
        return [], after

    def _page(
        self, after: int, trajectory: str | None, kind: Kind | None
    ) -> tuple[list[Event], int]:
        # Read before the events: whatever is at or below it and matches is among them, so a page
        # that is not full may step over all of it. seq grows in the order of commits.
        newest = self._source.last_seq()
        events = list(self._source.read(after, PAGE, trajectory, kind))
        last = events[-1].cursor if events else after
        return events, last if len(events) == PAGE else max(last, newest)

    def _recent(
        self, after: int, trajectory: str | None, kind: Kind | None
    ) -> tuple[list[Event], int]:
        recent = takewhile(lambda event: event.cursor > after, reversed(self._ring))
        events = [
            event
            for event in recent
            if trajectory in (None, event.trajectory) and kind in (None, event.kind)
        ]
        return events[::-1], self._upto

    async def _wait_beyond(self, after: int, deadline: float) -> bool:
        """Wait until the ring reaches past ``after``; False: the deadline or the end came first."""
        try:
            async with asyncio.timeout_at(deadline), self._changed:
                await self._changed.wait_for(lambda: self.closing or self._upto > after)
        except TimeoutError:
            return False
        return not self.closing

    async def _poll(self) -> None:
        while True:
            if not self.followers:
                self._ring.clear()
                self._from = self._upto = NOT_LIVE
                self._wanted.clear()
                await self._wanted.wait()
            try:
                await self._poll_once()
            except Exception as error:
                self.poll_errors += 1
                log.warning("drift: the index cannot be read, trying again: %r", error)
            await asyncio.sleep(self._poll_interval_s)

    async def _poll_once(self) -> None:
        before = self._upto
        if before == NOT_LIVE:
            self._from = self._upto = await self.last_seq()
        full = True
        while full:
            events, upto = await self.page(self._upto)
            full = len(events) == PAGE
            for event in events:
                if len(self._ring) == self._ring.maxlen:
                    self._from = self._ring[0].cursor
                self._ring.append(event)
            self._upto = upto
        if self._upto != before:
            async with self._changed:
                self._changed.notify_all()

    async def _thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

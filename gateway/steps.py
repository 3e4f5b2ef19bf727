"""Which step a call of a trajectory is, where more than this process's memory has to be asked: the
index for a trajectory that began before the gateway did, the neighbours where several share a
store.

Neither may fail a call. What cannot be asked is counted, said, and asked again at the trajectory's
next call; until then memory numbers on, unless failures are to refuse calls.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3

from driftgate.errors import StorageError
from driftgate.gateway.metrics import Metrics
from driftgate.gateway.restore import repeatable
from driftgate.gateway.sessions import MAX_CANDIDATES, Call, Place, Sessions
from driftgate.storage import Neighbours, Reader

__all__ = ["Steps"]

log = logging.getLogger("driftgate.capture")


class Steps:
    """One per gateway, on its event loop."""

    def __init__(
        self,
        sessions: Sessions,
        reader: Reader | None,
        neighbours: Neighbours | None,
        metrics: Metrics,
        *,
        refuses: bool,
    ) -> None:
        """``refuses``: a call whose number is not sure is refused."""
        self._sessions = sessions
        self._reader = reader
        self._neighbours = neighbours
        self._metrics = metrics
        self._refuses = refuses

    async def resumed(self, place: Place) -> Place:
        """The place, with its trajectory's next step known, and the calls of it that can be
        repeated. StorageError as above."""
        if not self._sessions.is_known(place):
            try:
                following, calls = await asyncio.to_thread(self._so_far, place.trajectory)
            except StorageError as error:
                self._unsure(place.trajectory, error)
                self._sessions.unread(place.trajectory)
            else:
                self._sessions.resume(place.trajectory, following, calls)
        return place

    async def shared(self, place: Place, *, body_sha256: str, sdk_retry: int) -> int | None:
        """The call's step where other gateways may serve its trajectory too; None: number it here.
        StorageError as above.

        A trajectory that begins here has a name that nobody else knows yet."""
        if self._neighbours is None or place.attribution == "new":
            return None
        try:
            if not self._neighbours.any():
                return None
            step = self._sessions.next_step(place, body_sha256=body_sha256, sdk_retry=sdk_retry)
            if step is None:
                return None
            return await asyncio.to_thread(self._neighbours.next_step, place.trajectory, step)
        except (sqlite3.Error, OSError) as error:
            self._unsure(place.trajectory, error)
            return None

    def _so_far(self, trajectory: str) -> tuple[int, list[Call]]:
        """The step behind those that the store knows, and what a retry can repeat of them."""
        rows = [] if self._reader is None else self._reader.calls(trajectory)
        following = max((row.step + 1 for row in rows), default=0)
        return following, list(repeatable(rows))[-MAX_CANDIDATES:]

    def _unsure(self, trajectory: str, error: Exception) -> None:
        if self._refuses:
            raise StorageError(
                f"the call was not sent to the engine, because the steps of {trajectory} are not "
                f"known (on_capture_failure is refuse): {error}"
            ) from error
        self._metrics.lost.labels("step").inc()
        log.error("a step of %s may be taken twice: %s", trajectory, error)

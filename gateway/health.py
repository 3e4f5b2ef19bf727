"""Is an engine alive, and under which weights does it sample? Asked in the background, with
requests that generate nothing.

An engine that a call could not reach is left at once and comes back when its health route answers;
the waits between looks double. One that answers nothing but errors counts as away too."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec

from driftgate.errors import UNREADABLE
from driftgate.gateway.weights import Weights

__all__ = ["Health"]

INTERVAL_S = 5.0
"""Between looks at an engine that is well: as often as balancers do it."""

FIRST_BACKOFF_S, LAST_BACKOFF_S = 1.0, 30.0
"""Between looks at one that is not, doubling."""

TIMEOUT_S = 2.0
"""Both engines answer these routes beside their work."""

CONFIRM_TIMEOUT_S = 0.5
"""An answer's end waits no longer for the look that confirms its weights."""

MAX_BYTES = 1 << 20

KEY = "weight_version"
UNSET = ("default", "")
"""What engines say whose weights nobody has given a version."""

log = logging.getLogger("driftgate.upstream")


class Health:
    """Of one engine. Lives on the event loop."""

    def __init__(
        self,
        url: str,
        key: str | None,
        weights: Weights,
        *,
        away: Callable[[str], None],
        returned: Callable[[bool], None],
    ) -> None:
        """``away`` is called each time that the engine is not there, and may come back as another,
        with the reason; ``returned`` when it answers again, with whether it was away: not only one
        of its connections broke."""
        self.error: str | None = None
        """Why no call goes there now."""
        self.well_ns: int | None = None
        """When it was seen well last; None: never."""
        self._url = url
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._weights = weights
        self._away = away
        self._returned = returned
        self._weights_path: str | None = None
        self._session: aiohttp.ClientSession | None = None
        self._silent = False
        """The last look was taken and not answered in time."""
        self._wake = asyncio.Event()
        self._soon = asyncio.Event()
        self._gone = False
        """It was away since it was seen well last."""
        self._wait_s = FIRST_BACKOFF_S

    def read_weights(self, path: str | None) -> None:
        """Look for the version at ``path`` from now on, until the engine does not know it."""
        self._weights_path = path

    def failed(self, why: str, *, reached: bool = True) -> None:
        """A call got no answer: leave the engine alone until it is well. ``reached``: there was a
        connection."""
        self.error = why
        if not reached:
            self._leaves(why)
        self._wake.set()

    def look_soon(self) -> None:
        """Look now at an engine that is away: something was said of it."""
        self._soon.set()

    async def watch(self) -> None:
        """Look for ever."""
        timeout = aiohttp.ClientTimeout(
            total=2 * TIMEOUT_S, sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S
        )
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as self._session:
            while True:
                try:
                    await self._pass()
                except Exception:  # a bug: without this task an engine that was left stays left
                    log.exception("looking at %s failed; it is tried again", self._url)
                    await asyncio.sleep(LAST_BACKOFF_S)

    async def _pass(self) -> None:
        """Wait until it is time, and look once."""
        await self._wait()
        asked_ns, was = time.time_ns(), self.error
        found = await self._look()
        if self.error is not was:
            return  # a call failed meanwhile, perhaps after what was seen
        self.error = found
        if self.error is not None:
            if was is None:
                log.warning("%s gets no calls: %s", self._url, self.error)
            # A busy engine is silent once; no engine starts between two such looks.
            if was is not None or not self._silent:
                self._leaves(self.error)
            return
        self.well_ns, self._wait_s = asked_ns, FIRST_BACKOFF_S
        was_gone, self._gone = self._gone, False
        if was is not None:
            log.info("%s is back; it was left because: %s", self._url, was)
            self._returned(was_gone)
        await self._look_at_weights()

    async def _wait(self) -> None:
        """Until the next look."""
        if self.error is None:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL_S):
                    await self._wake.wait()
        if self.error is not None:
            self._soon.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._wait_s):
                    await self._soon.wait()
            self._wait_s = min(2 * self._wait_s, LAST_BACKOFF_S)

    def _leaves(self, why: str) -> None:
        self._gone = True
        self._away(why)

    async def confirm(self) -> None:
        """Look at the weights once more, where the engine is what tells of them."""
        if self._weights_path is None or self._weights.told:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONFIRM_TIMEOUT_S):
                await self._look_at_weights()

    async def _look(self) -> str | None:
        """Why the engine is not well. One without such a route may still be."""
        assert self._session is not None, "watch runs"
        self._silent = False
        try:
            async with self._session.get(self._url + "/health") as answer:
                return f"its /health answered {answer.status}" if answer.status >= 500 else None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._silent = isinstance(error, aiohttp.SocketTimeoutError)
            return f"its /health did not answer: {str(error) or type(error).__name__}"

    async def _look_at_weights(self) -> None:
        if self._weights_path is None or self._session is None or self._weights.told:
            return
        asked_ns = time.time_ns()
        try:
            async with self._session.get(self._url + self._weights_path) as answer:
                status, raw = answer.status, await answer.content.read(MAX_BYTES)
            if status >= 400:
                self._weights_path = None  # the next probe tries again
                return
            said = msgspec.json.decode(raw, type=dict[str, Any])[KEY]
        except (KeyError, *UNREADABLE):
            self._weights_path = None
            return
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.info("%s did not tell its weight version: %s", self._url, error)
            return
        version = said if isinstance(said, str) and said not in UNSET else self._weights.unset
        self._weights.look(version, asked_ns, time.time_ns())

"""Several engines behind one gateway: which of them gets a call.

A trajectory stays with the engine that served it last, whose prefix cache holds its tokens; a new
one goes where the fewest calls are. An engine that gives no byte of an answer is left, and the call
goes to another of the same kind. After the first byte nothing is sent again: what was sampled would
be sampled twice, and one of the two would be in no trace."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager

import aiohttp

from driftgate.errors import UpstreamError
from driftgate.gateway.breakage import breakage
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.metrics import Metrics
from driftgate.gateway.post import EngineAnswer
from driftgate.gateway.recent import Recent
from driftgate.gateway.served import Served
from driftgate.gateway.sessions import MAX_TRAJECTORIES
from driftgate.gateway.upstream import FIRST_PROBE_WAIT_S, Upstream

__all__ = ["Entry", "Upstreams"]

NOT_SERVED = (502, 503)
"""Answers of an engine, or of what stands before it, that it does not serve now. A 500 may be the
request's own doing, and a 504 may come after the sampling."""

log = logging.getLogger("driftgate.upstream")


class Entry:
    """Where one call is counted as under way: at one engine, from the moment that it is let in to
    it, so that a pause which finds nobody there is one."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._at: Upstream | None = None

    def at(self, upstream: Upstream | None) -> None:
        """It is there now; None: at none."""
        for engine, change in ((self._at, -1), (upstream, 1)):
            if engine is not None:
                engine.in_flight += change
                gauge = self._metrics.child(self._metrics.upstream_in_flight, engine.url)
                gauge.set(engine.in_flight)
        self._at = upstream


class Upstreams:
    """Every engine. Lives on the event loop."""

    def __init__(self, config: GatewayConfig, metrics: Metrics) -> None:
        self.all = [Upstream(config, metrics, url=url) for url in config.urls]
        self._metrics = metrics
        self._sticky: Recent[str, Upstream] = Recent(MAX_TRAJECTORIES)
        self._order = list(self.all)
        """The one that was longest without a new trajectory comes first."""

    async def ready(self, deadline: float | None = None) -> None:
        """Wait until one engine can be expected to answer, or all were tried; at most until
        ``deadline`` on the loop's clock."""
        deadline = _deadline() if deadline is None else deadline
        for upstream in self.all:
            if any(other.available for other in self.all if other is not upstream):
                return
            await upstream.ready(deadline)

    @contextmanager
    def entry(self) -> Iterator[Entry]:
        """For one call, to the end of which it is counted."""
        entry = Entry(self._metrics)
        try:
            yield entry
        finally:
            entry.at(None)

    async def choose(self, trajectory: str, model: str, entry: Entry) -> Upstream:
        """The engine for the next call of a trajectory, which is let in to it. UpstreamError (429)
        while all that could take it are paused."""
        deadline = _deadline()
        await self.ready(deadline)
        upstream = self._pick(trajectory, model)
        entry.at(upstream)
        await upstream.ready(deadline)
        if not upstream.available:
            upstream = self._pick(trajectory, model)  # its probe has failed since
            entry.at(upstream)
        return upstream

    def _pick(self, trajectory: str, model: str) -> Upstream:
        serving = [u for u in self._order if u.serves(model)] or self._order
        open_ = [u for u in serving if u.paused is None]
        if not open_:
            self._metrics.paused.inc()
            raise UpstreamError(
                f"the engines are paused: {serving[0].paused}; try again in a moment", status=429
            )
        stuck = self._sticky.get(trajectory)
        up = [u for u in open_ if u.available] or open_
        if stuck in up:
            return stuck
        chosen = min(up, key=lambda u: u.in_flight)
        self._order.remove(chosen)
        self._order.append(chosen)
        self._sticky.put(trajectory, chosen)
        return chosen

    @asynccontextmanager
    async def send(
        self,
        served: Served,
        entry: Entry,
        trajectory: str,
        model: str,
        post: Callable[[str], Awaitable[EngineAnswer]],
    ) -> AsyncIterator[EngineAnswer]:
        """``post(base URL)`` to the engine of ``served``, or to another where it gives no answer.

        What ``post`` raises where none is left.
        """
        tried = [served.upstream]
        while True:
            upstream = served.upstream
            other = self._other(upstream, model, tried)
            answer = await self._ask(upstream, post, is_last=other is None)
            if isinstance(answer, EngineAnswer):
                try:
                    async with answer:
                        yield answer
                finally:
                    entry.at(None)  # the engine has done its part
                return
            assert other is not None
            log.warning("a call goes to %s: %s gave no answer: %s", other.url, upstream.url, answer)
            tried.append(other)
            served.failed_over.append(f"{upstream.url}: {answer}")
            served.at(other)
            entry.at(other)
            self._sticky.put(trajectory, other)

    async def _ask(
        self,
        upstream: Upstream,
        post: Callable[[str], Awaitable[EngineAnswer]],
        *,
        is_last: bool,
    ) -> EngineAnswer | str:
        """The answer, or in words why there is none and another engine is to be asked."""
        try:
            answer = await post(upstream.url)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._metrics.upstream_calls.labels(upstream.url, "failed").inc()
            broke = breakage(error)
            upstream.health.failed(broke.what, reached=broke.reached)
            if is_last:
                raise
            return broke.what
        if answer.status in NOT_SERVED and not is_last:
            self._metrics.upstream_calls.labels(upstream.url, "failed").inc()
            upstream.health.failed(f"it answered a call with {answer.status}")
            answer.close()
            return f"it answered {answer.status}"
        self._metrics.child(self._metrics.upstream_calls, upstream.url, "answer").inc()
        return answer

    def _other(
        self, upstream: Upstream, model: str, tried: Collection[Upstream]
    ) -> Upstream | None:
        """Where the call could go if ``upstream`` does not answer."""
        others = [
            u
            for u in self._order
            if u not in tried
            and u.available
            and u.paused is None
            and u.serves(model)
            and u.takes_over(upstream)
        ]
        return min(others, key=lambda u: u.in_flight, default=None)


def _deadline() -> float:
    """Of a call's waits for probes."""
    return asyncio.get_running_loop().time() + FIRST_PROBE_WAIT_S

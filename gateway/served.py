"""Which engine serves a call, under which weights, and what was tried before: what a trace says of
its origin beside the answer itself."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from driftgate.gateway.weights import Mark
from driftgate.trace import Engine, WeightSpan

if TYPE_CHECKING:
    from driftgate.gateway.tape import Tape
    from driftgate.gateway.upstream import Upstream

__all__ = ["Served"]


class Served:
    """Of one call. Written on the event loop while the answer comes, read when it is folded."""

    def __init__(self, upstream: Upstream) -> None:
        self.failed_over: list[str] = []
        """What was tried before, and why it was left."""
        self._marks: list[Mark] = []
        self._ended_ns: int | None = None
        self.at(upstream)

    def at(self, upstream: Upstream) -> None:
        """The call is sent there now."""
        self.upstream = upstream
        self._serial = upstream.weights.serial
        self._sent_ns = self._passed_ns = time.time_ns()

    def passing(self, tape: Tape) -> None:
        """A piece of a stream has come, which the tape does not hold yet."""
        weights = self.upstream.weights
        if weights.serial != self._serial:
            self._serial = weights.serial
            self._marks.append(Mark(self._passed_ns, weights.noted_ns, tape.counts()))
        self._passed_ns = time.time_ns()

    def came(self) -> None:
        """All that comes of the answer is here."""
        self._ended_ns = self._ended_ns or time.time_ns()

    async def confirm(self) -> None:
        """All of the answer is here: have its weights looked at, where the engine tells them."""
        self.came()
        await self.upstream.health.confirm()

    def recorded(self) -> None:
        """The answer gets its versions now."""
        self.came()
        self.upstream.weights.gave(self._ended_ns or 0)

    # From here on: any thread.

    def engine(self, model: str, fingerprint: str | None) -> Engine:
        """The fingerprint of the engine that gave the answer."""
        return self.upstream.engine(model, fingerprint, self._sent_ns)

    def spans(self, choice: int, tokens: int) -> list[WeightSpan]:
        """The weight versions of one choice's tokens."""
        ended_ns = self._ended_ns or time.time_ns()
        return self.upstream.weights.spans(
            self._marks, choice=choice, tokens=tokens, start_ns=self._sent_ns, end_ns=ended_ns
        )

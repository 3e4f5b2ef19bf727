"""What ``driftgate tail`` shows of the stream of scores: which, and not before it is wanted. Pure.

The page's Live view has the same filters under the same names; ``Wanted.address`` leads there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlencode

from driftgate.bands import Colour
from driftgate.colours import ORDER, colour
from driftgate.views import DriftEvent, Kind

__all__ = ["HELD", "Tail", "Wanted"]

HELD = 10_000
"""Events kept while paused, the newest: some 50 MB. Older ones are counted; the store has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A filter; None is no condition."""

    trajectory: str | None = None
    model: str | None = None
    band: Colour | None = None
    """This band or a worse one; what is not comparable has none."""
    kind: Kind | None = None

    def fits(self, event: DriftEvent) -> bool:
        """The event is one of those."""
        score = event.score
        if self.band is not None:
            found = colour(score)
            if found is None or ORDER.index(found) < ORDER.index(self.band):
                return False
        return (
            self.trajectory in (None, score.trajectory)
            and self.model in (None, score.model)
            and self.kind in (None, score.kind)
        )

    def address(self, url: str) -> str:
        """Of the Live view of the gateway at ``url`` with this filter."""
        values = {
            "trajectory": self.trajectory,
            "model": self.model,
            "band": self.band,
            "kind": self.kind or "",  # the page shows drift alone where it is not told
        }
        query = urlencode({name: value for name, value in values.items() if value is not None})
        return f"{url.rstrip('/')}/#/live?{query}"


@dataclass(slots=True)
class Tail:
    """Shows events, or holds them while paused."""

    wanted: Wanted
    show: Callable[[DriftEvent], None]
    changed: Callable[[], None] = lambda: None
    """Told when the status is another."""
    paused: bool = False
    connected: bool = True
    shown: int = 0
    filtered: int = 0
    lost: int = 0
    """Held no longer: more than ``HELD`` came while paused."""
    held: deque[DriftEvent] = field(default_factory=lambda: deque(maxlen=HELD))

    def take(self, event: DriftEvent) -> None:
        """One more event of the stream."""
        if not self.wanted.fits(event):
            self.filtered += 1
        elif self.paused:
            self.lost += len(self.held) == HELD
            self.held.append(event)
        else:
            self.show(event)
            self.shown += 1
        self.changed()

    def reach(self, connected: bool) -> None:
        """The gateway answers, or does not and is tried again."""
        if connected != self.connected:
            self.connected = connected
            self.changed()

    def toggle(self) -> None:
        """Pause, or show what was held and go on."""
        self.paused = not self.paused
        while self.held and not self.paused:
            self.show(self.held.popleft())
            self.shown += 1
        self.changed()

    def status(self) -> str:
        """How it stands, in a line."""
        counts = f"{self.shown} shown"
        if self.filtered:
            counts += f", {self.filtered} filtered out"
        if self.lost:
            counts += f", {self.lost} passed over while paused"
        if self.paused:
            return f"paused, {len(self.held)} waiting · {counts} · p goes on, q ends"
        how = "following" if self.connected else "the gateway does not answer, trying again"
        return f"{how} · {counts} · p pauses, q ends"

"""Which policy an engine samples under, over time. Pure: times and versions in, versions out.

Two sources tell. A trainer says from when on its new weights are served: that holds until it says
otherwise, or until the engine was away: it may have come back with other weights, so that from the
last time when it was seen well the version is ``unknown``. Or the engine is looked at now and then:
of the time between two looks that differ, and of the time behind the last one, the version is
``unknown`` too. Nothing is carried forward in good faith."""

from __future__ import annotations

import threading
from typing import NamedTuple

from driftgate.errors import RequestError
from driftgate.trace import WeightSpan
from driftgate.weights import UNKNOWN, changed, merged

__all__ = ["Mark", "Weights"]

MAX_CHANGES = 10_000
"""Kept; a trainer that updates each minute makes as many in a week. About 1 MB."""

CUT_INTERVAL_NS = 1_000_000_000
"""Between cuts at looks that found nothing new: each makes every stream parse what waits."""


class _Change(NamedTuple):
    from_ns: int
    version: str


class Mark(NamedTuple):
    """Where a stream is cut, because something was learned of the weights while it came."""

    until_ns: int
    """The last piece before it came then."""
    since_ns: int
    """The next one came after this."""
    tokens: dict[int, int]
    """How many had come of each choice, by its index."""


class Weights:
    """The versions of one engine. Any thread."""

    def __init__(self, version: str) -> None:
        self.configured = version
        """Holds where neither a trainer nor the engine says another."""
        self.serial = 0
        """Goes up when something was learned that a stream should be cut at."""
        self.noted_ns = 0
        """When that was."""
        self.told = False
        """A trainer says so; looks at the engine do not count any more."""
        self.lost: str | None = None
        """Why what was told counts no more; None while it does, or where nothing was told."""
        self._writing = threading.Lock()
        self._changes: tuple[_Change, ...] = (_Change(0, version),)
        self._gave_ns = 0
        """End of the last answer that was given its versions."""
        self._looked_ns: int | None = None
        """Last look; None where no look is needed."""

    @property
    def version(self) -> str:
        """The last one known."""
        return self._changes[-1].version

    @property
    def from_ns(self) -> int:
        """Since when."""
        return self._changes[-1].from_ns

    @property
    def unset(self) -> str:
        """The version where the engine says that nobody gave it one."""
        return self.configured if self.lost is None else UNKNOWN

    def gave(self, ended_ns: int) -> None:
        """An answer that ended then is given its versions, as they are known now."""
        self._gave_ns = max(self._gave_ns, ended_ns)

    def check(self, version: str, from_ns: int, now_ns: int) -> None:
        """RequestError for a time that is not over, before the last told, or before answers that
        were given another version: traces that are written are not changed."""
        if from_ns > now_ns:
            raise RequestError(
                f"from_ns {from_ns} is {(from_ns - now_ns) / 1e9:.3f} s ahead of the gateway's "
                "clock: tell the version when its weights are in place"
            )
        if self.told and from_ns < self.from_ns:
            raise RequestError(
                f"from_ns {from_ns} is before version {self.version} came, at {self.from_ns}"
            )
        given = self.between(from_ns, self._gave_ns) if from_ns < self._gave_ns else []
        if others := [said for said in given if said not in (version, UNKNOWN)]:
            raise RequestError(
                f"from_ns {from_ns} is before {self._gave_ns}, when the last answer ended that was "
                f"recorded with its weight version, and {others[-1]} was the version in between: "
                "leave from_ns out to tell what holds from now on, and tell a version before "
                "calls are resumed"
            )

    def tell(self, version: str, from_ns: int, now_ns: int) -> None:
        """The trainer's word; ``check`` it before."""
        with self._writing:
            self.told, self.lost, self._looked_ns = True, None, None
            self._note((*self._before(from_ns), _Change(from_ns, version)), now_ns)

    def lose(self, since_ns: int, now_ns: int, why: str) -> bool:
        """The engine may be another one since ``since_ns``. False where that changes nothing,
        because no version was told: the configured one is that of a fresh engine."""
        with self._writing:
            if not self.told:
                return False
            self.told, self.lost = False, why
            self._note((*self._before(since_ns), _Change(since_ns, UNKNOWN)), now_ns)
            return True

    def look(self, version: str, asked_ns: int, now_ns: int) -> None:
        """What the engine itself said; it was asked at ``asked_ns`` and had answered by now."""
        with self._writing:
            if self.told or asked_ns < (self._looked_ns or 0):
                return  # another look, begun later, was faster
            last_ns, self._looked_ns = self._looked_ns, asked_ns
            if version == self.version:
                if now_ns - self.noted_ns >= CUT_INTERVAL_NS:
                    self._note(self._changes, now_ns)
                return
            self.lost = None
            since = () if last_ns is None else (_Change(last_ns, UNKNOWN),)
            self._note((*self._changes, *since, _Change(now_ns, version)), now_ns)

    def between(self, start_ns: int, end_ns: int) -> list[str]:
        """Every version from start to end, in order, each once."""
        found: dict[str, None] = {}
        for change in self._changes:
            if change.from_ns > end_ns:
                break
            if change.from_ns <= start_ns:
                found.clear()
            found[change.version] = None
        if self._looked_ns is not None and self._looked_ns < end_ns:
            found[UNKNOWN] = None
        return list(found)

    def spans(
        self, marks: list[Mark], *, choice: int, tokens: int, start_ns: int, end_ns: int
    ) -> list[WeightSpan]:
        """The versions of an answer's tokens that was asked for at ``start_ns``.

        ``marks`` cut it where a change was noted while it streamed; what comes in one piece has
        none, so that a change leaves all of it without a version.
        """
        spans, first, since_ns = [], 0, start_ns
        for mark in [*marks, Mark(end_ns, end_ns, {})]:
            versions = self.between(since_ns, max(since_ns, mark.until_ns))
            version = versions[0] if len(versions) == 1 else changed(versions)
            spans.append(WeightSpan(first, version))
            first, since_ns = mark.tokens.get(choice, 0), mark.since_ns
        return merged(spans, tokens)

    def _before(self, from_ns: int) -> tuple[_Change, ...]:
        return tuple(change for change in self._changes if change.from_ns < from_ns)

    def _note(self, changes: tuple[_Change, ...], now_ns: int) -> None:
        self._changes = changes[-MAX_CHANGES:]
        self.noted_ns = now_ns
        self.serial += 1

"""What a worker does while there is nothing to lease: wait for the store, and say for whom."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from driftgate.storage import OpenWork

__all__ = ["Watch"]

log = logging.getLogger(__name__)

POLL_S = 0.2
"""Between two looks at whether the store has changed: a stat of two files."""

LOOK_ANYWAY_S = 5.0
"""Look for work this often even in an unchanged store: a dead worker's lease runs out in
silence."""


class Watch:
    """Waits until another process has written to the store's index."""

    def __init__(self, root: Path) -> None:
        self._paths = [root / "index.sqlite", root / "index.sqlite-wal"]
        self._seen: list[tuple[int, int]] = []
        self._told: Counter[str] = Counter()

    def wait(self, stop: threading.Event) -> None:
        """Return when the index has changed since the last call, or after ``LOOK_ANYWAY_S``."""
        deadline = time.monotonic() + LOOK_ANYWAY_S
        while time.monotonic() < deadline and not stop.is_set():
            now = [_stamp(path) for path in self._paths]
            if now != self._seen:
                self._seen = now
                return
            stop.wait(POLL_S)

    def tell(self, left: Iterable[OpenWork]) -> None:
        """Log how many trajectories each worker holds, where that has changed."""
        held = Counter(one.worker for one in left if one.worker is not None)
        if held and held != self._told:
            words = ", ".join(f"{count} by {worker}" for worker, count in sorted(held.items()))
            log.info("waiting for trajectories that are leased: %s", words)
        self._told = held


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)

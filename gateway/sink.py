"""What the gateway needs of storage: a writer that takes records, or a test's stand-in for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from driftgate.storage import Record, WriterStats

__all__ = ["Sink"]


class Sink(Protocol):
    """What is used of ``driftgate.storage.Writer``."""

    @property
    def stats(self) -> WriterStats:
        """Counters."""

    def submit(self, record: Record) -> Future[None]:
        """StorageError where the queue is full."""

    def submit_lazy(
        self,
        make: Callable[[], Sequence[Record]],
        *,
        size_hint: int,
        handed_over: Callable[[], None],
    ) -> Future[None]:
        """The same; ``make`` and ``handed_over`` run on the writer thread."""

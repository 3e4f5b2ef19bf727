"""A dict of bounded size that forgets what was not used for longest. Pure; not thread-safe."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

__all__ = ["Recent"]

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """At most ``limit`` items."""

    def __init__(self, limit: int) -> None:
        self._items: OrderedDict[K, V] = OrderedDict()
        self._limit = limit

    def get(self, key: K) -> V | None:
        """The value, now the most recently used; None where it is not here."""
        value = self._items.get(key)
        if value is not None:
            self._items.move_to_end(key)
        return value

    def peek(self, key: K) -> V | None:
        """The value, no more recently used than before."""
        return self._items.get(key)

    def put(self, key: K, value: V) -> None:
        """Set the value, now the most recently used; the least recently used one goes."""
        self._items[key] = value
        self._items.move_to_end(key)
        if len(self._items) > self._limit:
            self._items.popitem(last=False)

    def put_oldest(self, key: K, value: V) -> None:
        """Set the value of a key; a new one is the first to be forgotten, at once when full."""
        if key in self._items:
            self._items[key] = value
        elif not self.full:
            self._items[key] = value
            self._items.move_to_end(key, last=False)

    @property
    def full(self) -> bool:
        """The next new key displaces another one."""
        return len(self._items) >= self._limit

    def __len__(self) -> int:
        return len(self._items)

"""Token sequences that share their beginnings, each token held once. Pure.

A trajectory of 1,000 growing prompts is one line of ids; a prompt that leaves it starts another
line that hangs on the first at the place where the two part. To find what a prompt begins with, its
ids are compared line by line, each comparison one pass of numpy: a chain costs one comparison a
step however long it is, a fan one look-up in a dictionary. Nothing recurses.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from driftgate.trace import I32

__all__ = ["Forest", "Walk"]

_LAST = 1 << 62
"""Above every index: a mark at a position sorts before (position, _LAST)."""


@dataclass(slots=True, eq=False)
class _Line:
    start: int
    """Position of its first id; everything before is on the lines that it hangs on."""
    ids: I32
    branches: dict[tuple[int, int], _Line] = field(default_factory=dict)
    """By (position, first id)."""
    asked: list[tuple[int, int]] = field(default_factory=list)
    """(position, index) where a prompt ends, in order."""
    ended: list[tuple[int, int]] = field(default_factory=list)
    """(position, index) where a prompt and its answer end, in order."""


@dataclass(frozen=True, slots=True)
class Walk:
    """How far a sequence is known."""

    path: Sequence[tuple[_Line, int]]
    """The lines it runs on, from the root, and the position up to which it does."""

    @property
    def common(self) -> int:
        """Leading ids that some earlier sequence has as well."""
        return self.path[-1][1]

    def continued(self) -> tuple[int, list[int]]:
        """The longest prompt and answer that it begins with: (position, those that have them).

        Several where calls gave equal tokens, the first one first; ``(0, [])`` where there is none.
        """
        return _deepest([(line.ended, upto) for line, upto in self.path])

    def repeated(self) -> tuple[int, list[int]]:
        """The longest prompt alone that it begins with, as in ``continued``."""
        return _deepest([(line.asked, upto) for line, upto in self.path])


class Forest:
    """Prompts with their answers, numbered by the caller."""

    def __init__(self) -> None:
        self._root = _Line(0, np.zeros(0, np.int32))
        self._lines = 0
        self._distinct = 0
        self._whole = 0

    @property
    def lines(self) -> int:
        """Sequences that no other one continues: forwards that score all."""
        return self._lines

    @property
    def distinct(self) -> int:
        """Ids held."""
        return self._distinct

    @property
    def whole(self) -> int:
        """Ids of all lines from position 0: what one forward for each line feeds."""
        return self._whole

    def walk(self, ids: I32) -> Walk:
        """Compare ``ids`` with all that is known."""
        line = self._root
        path: list[tuple[_Line, int]] = []
        while True:
            at = line.start + _common(line.ids, ids[line.start :])
            path.append((line, at))
            branch = line.branches.get((at, int(ids[at]))) if at < len(ids) else None
            if branch is None:
                return Walk(path)
            line = branch

    def add(self, index: int, prompt: I32, response: I32) -> None:
        """Remember a prompt and its answer; an empty prompt is not one."""
        ids = np.concatenate([prompt, response])
        walk = self.walk(ids)
        last, at = walk.path[-1]
        path = list(walk.path)
        if at < len(ids):
            path[-1:] = self._grow(last, at, ids)
        insort(_holding(path, len(prompt)).asked, (len(prompt), index))
        insort(_holding(path, len(ids)).ended, (len(ids), index))

    def _grow(self, line: _Line, at: int, ids: I32) -> list[tuple[_Line, int]]:
        """Hold ``ids`` from ``at`` on: at the line's end, or as a branch."""
        size = len(ids)
        self._distinct += size - at
        if line is not self._root and at == line.start + len(line.ids):
            self._whole += size - at
            line.ids = ids[line.start :].copy()
            return [(line, size)]
        self._lines += 1
        self._whole += size
        branch = line.branches[at, int(ids[at])] = _Line(at, ids[at:].copy())
        return [(line, at), (branch, size)]


def _holding(path: Sequence[tuple[_Line, int]], position: int) -> _Line:
    """The line on which a sequence of ``position`` ids ends."""
    return next(line for line, upto in path if position <= upto)


def _deepest(marks: Sequence[tuple[list[tuple[int, int]], int]]) -> tuple[int, list[int]]:
    for found, upto in reversed(marks):
        behind = bisect_right(found, (upto, _LAST))
        if behind:
            position = found[behind - 1][0]
            first = bisect_right(found, (position, -1))
            return position, [index for _, index in found[first:behind]]
    return 0, []


def _common(a: I32, b: I32) -> int:
    """Length of the common prefix."""
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    return int(differ.argmax()) if differ.any() else size

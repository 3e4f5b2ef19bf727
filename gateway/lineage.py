"""Finds the trace that a prompt continues, by comparing token ids. Pure; lives on the writer
thread.

A growing conversation is one line of ids with a mark where each trace ends, so its memory is that
of its longest prompt. A prompt that leaves the line starts another one beside it: branches,
sub-agents, edits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from driftgate.trace import I32

__all__ = ["Lineage", "Parent"]

MAX_BYTES = 10 << 20
"""Of all trajectories: 300 of 8k tokens, 80 of 32k; most of these ids are in the writer's bases as
well. A forgotten one is read from the store."""

MAX_TRAJECTORIES = 512
"""As many as the writer keeps bases of: where prompts are short, so many agents are thought of as
running at once."""

MARK_BYTES = 512
"""Counted per trace besides its ids: short trajectories must not be free."""

MAX_LINES = 16
"""Branches of one trajectory that are compared; older ones are forgotten."""


class Parent(NamedTuple):
    """What a prompt continues."""

    trace_id: str | None
    prefix_len: int
    """Leading prompt tokens equal to the parent's prompt + response."""
    exact: bool
    """The prompt begins with all of the parent's tokens."""


class _Mark(NamedTuple):
    trace_id: str
    prompt_len: int
    end: int


@dataclass(slots=True)
class _Line:
    ids: I32
    marks: list[_Mark] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        """Memory, about."""
        return self.ids.nbytes + MARK_BYTES * len(self.marks)


ROOT = Parent(None, 0, False)


class Lineage:
    """Recent ids per trajectory. ``load`` gives (trace id, prompt, response) of a forgotten one."""

    def __init__(self, load: Callable[[str], Iterable[tuple[str, I32, I32]]]) -> None:
        self._load = load
        self._lines: OrderedDict[str, list[_Line]] = OrderedDict()
        self._size_bytes = 0

    def parent(self, trajectory: str, prompt: I32, *, step: int) -> Parent:
        """What ``prompt`` continues in its trajectory, at best exactly and as far as can be."""
        if trajectory not in self._lines and step > 0:
            for trace_id, earlier, response in self._load(trajectory):
                self.add(trajectory, trace_id, earlier, response)
        found = [_continued(line, prompt) for line in self._lines.get(trajectory, ())]
        return max(found, key=lambda parent: parent.prefix_len, default=ROOT)

    def add(self, trajectory: str, trace_id: str, prompt: I32, response: I32) -> I32:
        """Remember a trace, then forget what was not used for longest. Gives prompt and response
        as one array, which others may share: the ids are most of what a step leaves in memory."""
        ids = np.concatenate([prompt, response])
        mark = _Mark(trace_id, len(prompt), len(ids))
        lines = self._lines.setdefault(trajectory, [])
        self._lines.move_to_end(trajectory)
        for line in lines:
            last = len(line.ids)
            if last <= len(prompt) and np.array_equal(line.ids, ids[:last]):
                self._size_bytes -= line.size_bytes
                line.ids = ids
                line.marks.append(mark)
                break
        else:
            lines.append(line := _Line(ids, [mark]))
        self._size_bytes += line.size_bytes
        if len(lines) > MAX_LINES:
            self._size_bytes -= lines.pop(0).size_bytes
        while len(self._lines) > 1 and (
            self._size_bytes > MAX_BYTES or len(self._lines) > MAX_TRAJECTORIES
        ):
            _, forgotten = self._lines.popitem(last=False)
            self._size_bytes -= sum(line.size_bytes for line in forgotten)
        return ids


def _continued(line: _Line, prompt: I32) -> Parent:
    """What of one line the prompt continues.

    A trace counts as continued when the prompt has all of its tokens, or all of its prompt and
    more: then it is its answer that came back changed. A prompt that parts from it earlier, or is
    the same one again, is its sibling and continues what the trace itself continued."""
    common = _common(line.ids, prompt)
    best = ROOT
    for mark in line.marks:
        if mark.end <= common:
            best = Parent(mark.trace_id, mark.end, True)
        elif mark.prompt_len <= common and mark.prompt_len < len(prompt):
            return Parent(mark.trace_id, common, False)
        else:
            break
    return best


def _common(a: I32, b: I32) -> int:
    """Length of the common prefix."""
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    return int(differ.argmax()) if differ.any() else size

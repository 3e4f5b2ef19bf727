"""Which trace a prompt continues, by token ids."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from driftgate.gateway import lineage
from driftgate.gateway.lineage import Lineage, Parent
from driftgate.trace import I32


def ids(*values: int) -> I32:
    return np.array(values, np.int32)


def nothing(_trajectory: str) -> Iterator[tuple[str, I32, I32]]:
    yield from ()


@pytest.fixture
def grown() -> Lineage:
    """a: [1 2] -> [3]; b: [1 2 3 4] -> [5 6]."""
    found = Lineage(nothing)
    found.add("t", "a", ids(1, 2), ids(3))
    found.add("t", "b", ids(1, 2, 3, 4), ids(5, 6))
    return found


@pytest.mark.parametrize(
    ("prompt", "parent"),
    [
        (ids(1, 2, 3, 4, 5, 6, 7), Parent("b", 6, True)),
        (ids(1, 2, 3, 4, 5, 9, 7), Parent("b", 5, False)),  # the answer came back changed
        (ids(1, 2, 3, 4, 9), Parent("b", 4, False)),  # without its reasoning
        (ids(1, 2, 3, 9), Parent("a", 3, True)),  # a branch
        (ids(1, 2, 3, 4), Parent("a", 3, True)),  # the same prompt: a sibling of b
        (ids(1, 2), Parent(None, 0, False)),  # a sibling of a
        (ids(1, 9), Parent(None, 0, False)),
        (ids(9), Parent(None, 0, False)),
    ],
)
def test_parent(grown: Lineage, prompt: I32, parent: Parent) -> None:
    assert grown.parent("t", prompt, step=2) == parent


def test_trajectories_do_not_see_each_other(grown: Lineage) -> None:
    assert grown.parent("u", ids(1, 2, 3, 4), step=0).trace_id is None


def test_both_choices_can_be_continued() -> None:
    found = Lineage(nothing)
    found.add("t", "c.0", ids(1, 2), ids(3))
    found.add("t", "c.1", ids(1, 2), ids(4))
    assert found.parent("t", ids(1, 2, 4, 5), step=1) == Parent("c.1", 3, True)
    assert found.parent("t", ids(1, 2, 3, 5), step=1) == Parent("c.0", 3, True)


@pytest.mark.parametrize(("bound", "limit"), [("MAX_BYTES", 20), ("MAX_TRAJECTORIES", 1)])
def test_a_forgotten_trajectory_is_read_from_the_store(
    monkeypatch: pytest.MonkeyPatch, bound: str, limit: int
) -> None:
    monkeypatch.setattr(lineage, bound, limit)
    found = Lineage(lambda name: iter([("a", ids(1, 2), ids(3))] if name == "t" else []))
    found.add("t", "a", ids(1, 2), ids(3))
    found.add("u", "x", ids(1, 2), ids(3))  # 24 bytes: t is forgotten
    assert list(found._lines) == ["u"]
    assert found.parent("t", ids(1, 2, 3, 4), step=1) == Parent("a", 3, True)

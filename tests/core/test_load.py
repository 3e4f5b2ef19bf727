"""Loads of experts against a count by hand, token by token."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from driftgate.load import apart, count_loads
from tests.core.test_router import cells, drifted, random_routes


def test_loads_are_counts_of_valid_cells() -> None:
    a = random_routes(60, 5, 16, 4)
    b = drifted(a, 16)
    b[7, 2] = 0  # padding: on neither side a choice
    loads = count_loads(a, b, [3, 4, 5, 6, 7])
    wanted: list[Counter[tuple[int, int]]] = [Counter(), Counter()]
    for _, layer, *sides in cells(a, b):
        for count, chosen in zip(wanted, sides, strict=True):
            count.update((layer, expert) for expert in chosen)
    for found, count in zip((loads.rollout_LE, loads.train_LE), wanted, strict=True):
        assert {(int(i), int(e)): int(found[i, e]) for i, e in np.argwhere(found)} == count
        assert found.sum(axis=1).tolist() == (4 * loads.tokens_L).tolist()
    assert loads.tokens_L.tolist() == [60, 60, 59, 60, 60]
    assert loads.layers == (3, 4, 5, 6, 7)


def test_dense_layers_are_cut_and_parts_add_up() -> None:
    a = random_routes(30, 6, 8, 2)
    whole = count_loads(a, a[:, [1, 3, 5]], [1, 3, 5])
    # The second part names few experts: its counts are narrower.
    parts = count_loads(a[:20], a[:20], [1, 3, 5]), count_loads(a[20:], a[20:], [1, 3, 5])
    merged = parts[0].merge(parts[1])
    assert np.array_equal(merged.rollout_LE, whole.rollout_LE)
    assert np.array_equal(merged.train_LE, whole.train_LE)
    with pytest.raises(ValueError, match="of different models"):
        merged.merge(count_loads(a, a, range(6)))


def test_apart_is_the_share_that_must_move() -> None:
    assert apart(np.array([6, 2, 0]), np.array([3, 1, 0])) == 0.0
    assert apart(np.array([4, 0]), np.array([3, 1])) == 0.25
    assert apart(np.array([4, 0]), np.array([0, 4])) == 1.0
    assert apart(np.array([0, 0]), np.array([0, 4])) is None

"""Router metrics (first working cut; being replaced)."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

__all__ = ["RouterBucket"]


class RouterBucket(msgspec.Struct):
    """Mergeable sums."""

    n_cells: int = 0
    disagree: int = 0

    @classmethod
    def of(cls, rollout: Any, train: Any, **_: Any) -> RouterBucket:
        """One sequence."""
        a, b = np.sort(np.asarray(rollout), -1), np.sort(np.asarray(train), -1)
        bad = (a != b).any(-1)
        return cls(int(bad.size), int(bad.sum()))

    def merge(self, other: RouterBucket) -> RouterBucket:
        """Both."""
        return RouterBucket(self.n_cells + other.n_cells, self.disagree + other.disagree)

    def metrics(self) -> dict[str, Any]:
        """By name."""
        return {
            "n_cells": self.n_cells,
            "router_set_disagree_rate": self.disagree / self.n_cells if self.n_cells else None,
        }

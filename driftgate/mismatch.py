"""Log-probability metrics (first working cut; being replaced)."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

__all__ = ["Bucket", "Worst", "worst"]


class Worst(msgspec.Struct, frozen=True):
    """The token with the largest |log ratio|."""

    token_index: int
    token_id: int
    log_ratio: float
    train_logprob: float
    rollout_logprob: float
    trace_id: str = ""


class Bucket(msgspec.Struct):
    """Mergeable sums."""

    n_tokens: int = 0
    n_seqs: int = 0
    n_bad_tokens: int = 0
    sum_d: float = 0.0
    sum_k3: float = 0.0

    @classmethod
    def of(cls, train: Any, rollout: Any, mask: Any = None) -> Bucket:
        """One sequence."""
        d = np.asarray(train, np.float64) - np.asarray(rollout, np.float64)
        return cls(len(d), 1, 0, float(d.sum()), float((np.expm1(d) - d).sum()))

    def merge(self, other: Bucket) -> Bucket:
        """Both."""
        return Bucket(*(getattr(self, f) + getattr(other, f) for f in self.__struct_fields__))

    def metrics(self) -> dict[str, float | int | None]:
        """By name."""
        n = self.n_tokens
        return {
            "n_tokens": n,
            "n_seqs": self.n_seqs,
            "n_bad_tokens": self.n_bad_tokens,
            "kl_k1_rollout_train": -self.sum_d / n if n else None,
            "kl_k3_rollout_train": self.sum_k3 / n if n else None,
        }

    def undefined(self) -> dict[str, str]:
        """Reasons."""
        return {}


def worst(
    train: Any, rollout: Any, token_ids: Any, mask: Any = None, trace_id: str = ""
) -> Worst | None:
    """Largest |D|."""
    d = np.asarray(train, np.float64) - np.asarray(rollout, np.float64)
    if not len(d):
        return None
    j = int(np.argmax(np.abs(d)))
    return Worst(
        j, int(token_ids[j]), float(d[j]), float(train[j]), float(rollout[j]), trace_id
    )

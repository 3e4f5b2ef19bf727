"""How much of the drift is routing: the same tokens natively and under the rollout's routes.

``D`` is the trainer's log ratio with its own routes, ``D_replay`` with those of the rollout. What
is gone in ``D_replay`` is what routing replay (R3) would remove in training; what is left is
precision, kernels, weights, or the comparison itself. Sums of both sides over the same tokens, so
that shares merge exactly.
"""

from __future__ import annotations

import msgspec

from driftgate.mismatch import Bucket
from driftgate.trace import ScoreMeta

__all__ = ["REPLAY_METRICS", "ReplayPair"]

REPLAY_METRICS: dict[str, str] = {
    "replay_removes_abs_log_ratio_mean": "1 - mean|D_replay| / mean|D|",
    "replay_removes_kl_k3_rollout_train": "1 - k3(D_replay) / k3(D)",
}
"""Shares by name, with their formula. 1: routing is all of the drift. 0: none of it. Below 0: the
rollout's routes make it worse, as routes of other tokens would."""


class ReplayPair(msgspec.Struct, frozen=True, kw_only=True):
    """Sums of the responses that were scored both ways."""

    native: Bucket
    under: Bucket
    """With the trainer under the rollout's routes."""
    covered: float
    """Sum over tokens of the share of router choices before them that the rollout's routes gave."""

    @classmethod
    def of(cls, meta: ScoreMeta) -> ReplayPair | None:
        """The pair of one score; None where it was not scored both ways."""
        if meta.bucket is None or meta.replay is None:
            return None
        covered = (meta.replay_coverage or 0.0) * meta.replay.n_tokens
        return cls(native=meta.bucket, under=meta.replay, covered=covered)

    def merge(self, other: ReplayPair) -> ReplayPair:
        """The sums over both."""
        return ReplayPair(
            native=self.native.merge(other.native),
            under=self.under.merge(other.under),
            covered=self.covered + other.covered,
        )

    @property
    def coverage(self) -> float | None:
        """Share of router choices that the rollout's routes gave, by token; None without one."""
        return self.covered / self.under.n_tokens if self.under.n_tokens else None

    def shares(self) -> dict[str, float | None]:
        """`REPLAY_METRICS`; None where one is undefined (see `undefined`)."""
        same = self.native.n_tokens == self.under.n_tokens
        return {
            name: 1.0 - under / native if same and native and under is not None else None
            for name, (native, under) in self.sums().items()
        }

    def undefined(self) -> dict[str, str]:
        """Why each share that is None is None."""
        return {name: self._why(name) for name, share in self.shares().items() if share is None}

    def sums(self) -> dict[str, tuple[float | None, float | None]]:
        """(natively, under replay) of what each share compares; None where float64 cannot hold
        it."""
        absolute, k3 = REPLAY_METRICS
        return {
            absolute: (self.native.sum_abs, self.under.sum_abs),
            k3: (_k3(self.native), _k3(self.under)),
        }

    def _why(self, name: str) -> str:
        native, under = self.native.n_tokens, self.under.n_tokens
        if native != under:
            return f"{native} tokens compare natively and {under} under replay: not the same ones"
        if not native:
            return "no token to compare"
        if None in self.sums()[name]:
            return "a log ratio is too large for float64"
        return "there is no drift that replay could remove"


def _k3(bucket: Bucket) -> float | None:
    return bucket.linear.k3 if bucket.linear is not None else None

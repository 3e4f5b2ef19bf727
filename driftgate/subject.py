"""What is judged, and every number that a profile's limits look at. Pure.

A number that is not known is null, and why is said; a limit on it is then not tested.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from driftgate.lag import Lag
from driftgate.mismatch import Bucket
from driftgate.profiles import CLAMPED, LEAVE_ONE_OUT, NOT_COMPARABLE, SHIFT, Profile
from driftgate.router import RouterBucket
from driftgate.sums import LogSum, bin_value, kish

__all__ = ["Refused", "Subject", "measure"]

CLAMP = 20.0
"""nats; the observatory's clamp."""

LOO_MIN_REST = 1e-11
"""Least share of the sum of e^2D that the other tokens must have: their own sum, a difference, is
then right to 1e-5 in float64."""


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """A scored answer whose numbers are no evidence."""

    trace_id: str
    step: int
    choice: int
    tokens: int
    """Sampled ones, all of them."""
    codes: list[str]
    """Of severity ``no``; never empty."""


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What is judged: the traces of one engine, scored by one trainer, of one run or of a group."""

    captured: int
    scorable: int
    scored: int
    open_calls: int = 0
    gaps: Sequence[str] = ()
    bucket: Bucket | None = None
    """Over the scores that are comparable."""
    tokens: int
    """Sampled tokens of the scored traces, compared or not."""
    refused: Sequence[Refused] = ()
    """Of ``scored``, those that are not behind ``bucket``."""
    router: RouterBucket | None = None
    router_reason: str | None = None
    lag: Lag = Lag(steps=None, reason="no weight versions")

    @property
    def compared(self) -> int:
        """Of ``tokens``, those behind ``bucket``."""
        return self.bucket.n_tokens if self.bucket is not None else 0

    @property
    def not_compared_share(self) -> float | None:
        """Of ``tokens``; None without one."""
        return 1.0 - self.compared / self.tokens if self.tokens else None


def measure(subject: Subject, profile: Profile) -> tuple[dict[str, float | None], dict[str, str]]:
    """Each number that the profile looks at, and why one is not known."""
    values: dict[str, float | None] = {}
    why: dict[str, str] = {}
    values["policy_lag"] = None if subject.lag.steps is None else float(subject.lag.steps)
    if subject.lag.reason is not None:
        why["policy_lag"] = subject.lag.reason
    if subject.bucket is not None:
        values |= subject.bucket.metrics()
        values[CLAMPED] = _clamped(subject.bucket)
        values[SHIFT] = _mean_but_worst(subject.bucket)
        values[LEAVE_ONE_OUT] = _ess_but_worst(subject.bucket)
        why |= subject.bucket.undefined()
        few = subject.compared < 2
        why[SHIFT] = "needs two tokens"
        why[LEAVE_ONE_OUT] = why[SHIFT] if few else "the worst token has nearly all of the weight"
    values[NOT_COMPARABLE] = subject.not_compared_share
    if subject.router is not None:
        values |= {
            name: value
            for name, value in subject.router.metrics().items()
            if isinstance(value, (int, float))
        }
        why |= subject.router.undefined()
    measured: dict[str, float | None] = {}
    undefined: dict[str, str] = {}
    for limit in profile.limits:
        if subject.compared < limit.min_tokens:
            why[limit.metric] = f"{subject.compared} tokens of {limit.min_tokens}"
            values[limit.metric] = None
    for name in dict.fromkeys(limit.metric for limit in profile.limits):
        measured[name] = values.get(name)
        if measured[name] is None:
            absent = subject.router_reason if name.startswith("router_") else None
            undefined[name] = why.get(name) or absent or "nothing comparable to measure it on"
    return measured, undefined


def _clamped(bucket: Bucket) -> float | None:
    """Share of tokens with |D| > CLAMP, from the sketch: its edge is within 0.5 % of it."""
    if not bucket.n_tokens:
        return None
    above = sum(count for at, count in bucket.sketch.bins.items() if bin_value(at) > CLAMP)
    return above / bucket.n_tokens


def _mean_but_worst(bucket: Bucket) -> float | None:
    """``log_ratio_mean`` without the token of the largest |D|, nats; None below two tokens."""
    n = bucket.n_tokens
    if bucket.worst is None or n < 2:
        return None
    return (n * bucket.log_ratio.mean - bucket.worst.log_ratio) / (n - 1)


def _ess_but_worst(bucket: Bucket) -> float | None:
    """``ess_kish_token`` without the token of the largest |D|; None below two tokens, and where
    float64 cannot tell the weight of the others beside it."""
    if bucket.worst is None or bucket.n_tokens < 2:
        return None
    d = bucket.worst.log_ratio
    if bucket.weight.shift or bucket.weight_sq.shift:
        return None
    weight = LogSum(0.0, bucket.weight.total - math.exp(d))
    weight_sq = LogSum(0.0, bucket.weight_sq.total - math.exp(2.0 * d))
    if weight_sq.total <= LOO_MIN_REST * bucket.weight_sq.total:
        return None
    return kish(weight, weight_sq, bucket.n_tokens - 1)

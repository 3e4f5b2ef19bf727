"""How many policy versions lie between sampling and scoring, where that can be told.

Versions are the user's own words. Equal ones are no distance apart, whatever they say; whole
numbers have a distance, also behind one word (``step-3``, ``v12``); of others it is known at most
that they differ. What is known of some traces holds of the run as a lower bound.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

__all__ = ["DIFFERS", "FAR", "UNKNOWN", "Lag", "lag_label", "policy_lag", "widest"]

UNKNOWN = "unknown"
DIFFERS = "differs"
"""Label of versions that differ by nobody knows how much."""
FAR = 32
"""Versions apart from which on all lags have one label: what is split by lag stays small."""

NUMBERED = re.compile(r"(?=[0-9]{1,6}$|[^0-9])([A-Za-z_./-]*)([0-9]{1,18})", re.ASCII)
"""A word without digits, then the number: the digits of a commit or of ``1.2`` are no count. Alone
it has six digits at most: one short hash of a commit in 27 is seven digits and no letter."""


class Lag(msgspec.Struct, frozen=True, kw_only=True):
    """Policy versions between sampling and scoring, the largest of several."""

    steps: int | None
    """Null with a reason where that of one trace is not known."""
    reason: str | None = None
    at_least: int = 0
    """The largest that is known."""
    differs: bool = False
    """Versions of a trace differ, by how much cannot be told."""


def policy_lag(pairs: Iterable[tuple[str, str | None]]) -> Lag:
    """The largest distance over (version that sampled, version that scored) of each trace."""
    return widest(_lag(sampled, scored or UNKNOWN) for sampled, scored in pairs)


def lag_label(sampled: str, scored: str | None) -> str:
    """The lag of one trace as a key: its number of versions, up to `FAR`, or what is known."""
    lag = _lag(sampled, scored or UNKNOWN)
    if lag.steps is None:
        return DIFFERS if lag.differs else UNKNOWN
    return str(lag.steps) if lag.steps < FAR else f"{FAR} or more"


def widest(lags: Iterable[Lag]) -> Lag:
    """The lag of several together; of none, 0."""
    found = list(lags)
    at_least = max((lag.at_least for lag in found), default=0)
    unknown = sorted((lag for lag in found if lag.steps is None), key=lambda lag: not lag.differs)
    reason = unknown[0].reason if unknown else None
    return Lag(
        steps=at_least if reason is None else None,
        reason=reason,
        at_least=at_least,
        differs=any(lag.differs for lag in found),
    )


def _lag(sampled: str, scored: str) -> Lag:
    seen = f"sampled under {sampled!r}, scored under {scored!r}"
    if UNKNOWN in (sampled, scored):
        return Lag(steps=None, reason=f"{seen}: a lag needs both")
    if sampled == scored:
        return Lag(steps=0)
    mine, theirs = NUMBERED.fullmatch(sampled), NUMBERED.fullmatch(scored)
    if mine is None or theirs is None or mine[1] != theirs[1]:
        return Lag(steps=None, reason=f"{seen}: a lag needs two whole numbers", differs=True)
    steps = abs(int(theirs[2]) - int(mine[2]))
    return Lag(steps=steps, at_least=steps)

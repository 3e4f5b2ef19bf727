"""A group of tokens against a baseline: is its drift clearly more, and by how much? Pure.

The baseline is other tokens of the same run at like probability, since rare tokens drift more than
certain ones whatever the weights; else a measured noise floor. Whatever is too few to tell is said
to have no baseline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from driftgate.anatomy import PROBABILITY_EDGES, Response

__all__ = [
    "BASELINE_MIN_TOKENS",
    "Evidence",
    "Excess",
    "Floor",
    "Mask",
    "Run",
    "excess",
    "is_sharp",
    "mean_abs",
]

F64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Evidence = dict[str, float | int | str | None]

EXCESS_Z = 6.0
"""z of one group's mean|D| above another's. Tokens of a run are not independent and the largest of
many boundaries is looked at: 4 would fire on noise."""
EXCESS_FACTOR = 1.5
"""A group of tokens is worse only where its mean|D| is at least this much of the other's."""
BASELINE_MIN_TOKENS = 32
"""Below this a measured floor is no baseline, and a group of tokens has no mean."""
LIKE_MIN_TOKENS = 100
"""Other tokens of the run that make a baseline: of noise whose tail is 3 % of the tokens they hold
three of it."""
BIN_MIN_TOKENS = 8
"""Of the baseline in one bin of probability. Rare tokens drift more than certain ones, so that
groups of tokens are only compared at like probability."""


class Floor(NamedTuple):
    """A side against itself."""

    abs_log_ratio_mean: float
    side: str


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """The compared tokens of one run under one engine and one trainer, end to end."""

    responses: Sequence[Response]
    """In order of step and choice."""
    floor: Floor | None
    """The larger of the two sides' measured noise floors."""
    at: npt.NDArray[np.intp] = field(init=False)
    """[n] index into ``responses``."""
    bins: npt.NDArray[np.intp] = field(init=False)
    """[n] of the engine's probability, between `PROBABILITY_EDGES`."""

    def __post_init__(self) -> None:
        sizes = [response.index.size for response in self.responses]
        object.__setattr__(self, "at", np.repeat(np.arange(len(sizes)), sizes))
        rollout = self.of(response.rollout for response in self.responses)
        bins = np.digitize(np.exp(rollout), np.array(PROBABILITY_EDGES[1:-1]))
        object.__setattr__(self, "bins", bins)

    def of(self, parts: Iterable[F64]) -> F64:
        """[n] from one array for each response."""
        return np.concatenate([*parts])

    @property
    def d(self) -> F64:
        """[n] nats."""
        return self.of(response.d for response in self.responses)

    def where(self, chosen: Sequence[bool]) -> Mask:
        """[n] tokens of the responses that are chosen."""
        return np.asarray(np.array(chosen, dtype=np.bool_)[self.at])

    def codes(self) -> set[str]:
        """Of every score's comparability."""
        return {reason.code for r in self.responses for reason in r.score.comparable.reasons}


def mean_abs(d: F64) -> float:
    """mean|D| of [n] nats, n >= 1."""
    return float(np.abs(d).mean())


class Excess(NamedTuple):
    """What a group of tokens has more than its baseline."""

    d: F64 | None
    """[n] nats without it; None where nothing is clearly more."""
    evidence: Evidence


class _Level(NamedTuple):
    """What mean|D| a group of tokens would have in a baseline."""

    mean: float
    error: float
    """Standard error of its difference from the group's; 0 for a level that is given."""
    tokens: Mask
    """[n] of the group, those that the baseline says something about."""
    words: str


def excess(run: Run, d: F64, group: Mask, base: Mask, *, floor: bool = True) -> Excess:
    """``group`` scaled down to the baseline where it is clearly worse: tokens of ``base`` at like
    probability, else the measured floor."""
    evidence: Evidence = {"tokens": int(group.sum()), "abs_log_ratio_mean": mean_abs(d[group])}
    level = _like(run, d, group, base)
    if level is None and floor and run.floor is not None:
        words = f"noise floor of the {run.floor.side}"
        level = _Level(run.floor.abs_log_ratio_mean, 0.0, group, words)
    if level is None or int(level.tokens.sum()) < BASELINE_MIN_TOKENS:
        return Excess(None, evidence | {"baseline": None, "other_tokens": int(base.sum())})
    here = np.abs(d[level.tokens])
    mean = float(here.mean())
    evidence |= {"baseline": level.mean, "baseline_is": level.words}
    spread = max(level.error, _standard_error(here))
    z = (mean - level.mean) / spread if spread else math.inf
    evidence["z"] = z if math.isfinite(z) else None
    if mean <= level.mean or z < EXCESS_Z or mean < EXCESS_FACTOR * level.mean:
        return Excess(None, evidence)
    return Excess(np.where(level.tokens, d * (level.mean / mean), d), evidence)


def _like(run: Run, d: F64, group: Mask, base: Mask) -> _Level | None:
    """mean|D| of ``base`` with each bin of probability weighted as in ``group``."""
    if int(base.sum()) < LIKE_MIN_TOKENS:
        return None
    means, variances, counts = [], [], []
    tokens = np.zeros(d.size, dtype=np.bool_)
    for at in range(len(PROBABILITY_EDGES) - 1):
        there, here = np.abs(d[base & (run.bins == at)]), group & (run.bins == at)
        if there.size >= BIN_MIN_TOKENS and here.any():
            means.append(float(there.mean()))
            variances.append(_variance(there, np.abs(d[here])))
            counts.append(int(here.sum()))
            tokens |= here
    if not counts:
        return None
    weights = np.array(counts) / sum(counts)
    return _Level(
        mean=float(weights @ np.array(means)),
        error=math.sqrt(float(weights**2 @ np.array(variances))),
        tokens=tokens,
        words=f"{int(base.sum())} other tokens of this run, at like probability",
    )


def _variance(there: F64, here: F64) -> float:
    """Of the difference of the two means, the larger of two: as if both were of one distribution
    (a short baseline of heavy-tailed noise has none of the tail, so that its own error is too
    small), and each by itself (one outlier in a small group is no level)."""
    both = np.concatenate([there, here])
    pooled = float(both.var(ddof=1)) * (1.0 / there.size + 1.0 / here.size)
    return max(pooled, _standard_error(there) ** 2 + _standard_error(here) ** 2)


def _standard_error(x: F64) -> float:
    return float(x.std(ddof=1)) / math.sqrt(x.size) if x.size > 1 else 0.0


def is_sharp(run: Run, d: F64, after: Mask) -> bool:
    """Two levels fit |D| better than a straight line over position: what grows with the context has
    no moment at which something changed. By BIC; the levels pay for the choice of the boundary."""
    y = np.abs(d)
    for at in np.unique(run.bins):
        y[run.bins == at] -= y[run.bins == at].mean()
    start = [response.prompt_len or 0 for response in run.responses]
    index = np.concatenate([response.index for response in run.responses])
    x = np.asarray(start)[run.at] + index - 0.0
    x -= x.mean()
    slope = float(x @ y) / float(x @ x) if x.any() else 0.0
    line = float(np.square(y - slope * x).sum())
    levels = float(np.square(y - np.where(after, y[after].mean(), y[~after].mean())).sum())
    if not levels or not line:
        return not levels
    return y.size * math.log(levels / line) + math.log(y.size) < 0.0

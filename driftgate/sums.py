"""Sums that merge: what a bucket of mismatch statistics is made of.

One job: keep what is needed for a mean, a spread, a correlation, a quantile or a log-sum-exp in a
few numbers, so that two halves of the data give the statistics of the whole, up to float64
addition. All are plain values that encode to JSON without NaN or infinity.
"""

from __future__ import annotations

import math
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = [
    "MAX_EXPONENT",
    "QUANTILE_RELATIVE_ERROR",
    "CoMoments",
    "LogSum",
    "Moments",
    "Sketch",
    "add_counts",
    "bin_value",
    "kish",
]

F64 = npt.NDArray[np.float64]
K = TypeVar("K", int, str)

LINEAR_EXPONENT = 300.0
"""Sums of e^x are kept without a shift while max x is within +-300: e^300 * 1e120 terms still fits
float64 (max 1.8e308), and equal inputs then give exactly equal sums, which a log would not."""

MAX_EXPONENT = 709.0
"""e^709 is the last whole exponent that float64 holds."""

ULPS = 8 * 2.0**-52
"""Relative spread that rounding alone gives a column of equal values."""

QUANTILE_RELATIVE_ERROR = 0.005
"""Bound of `Sketch.quantile`: |answer - order statistic| <= 0.5 % of the order statistic. Halving
it doubles the bins; 0.5 % is far below the difference between two runs."""

_GAMMA = (1.0 + QUANTILE_RELATIVE_ERROR) / (1.0 - QUANTILE_RELATIVE_ERROR)
_LOG_GAMMA = math.log(_GAMMA)


class LogSum(msgspec.Struct, frozen=True, array_like=True):
    """The sum of e^x over many x, as ``total * e^shift``. ``shift`` is 0 for all ordinary data."""

    shift: float = 0.0
    total: float = 0.0

    @classmethod
    def of(cls, x: F64) -> LogSum:
        """Sum e^x over an array [n] of finite exponents; x may be far beyond what e^x can hold."""
        if not x.size:
            return cls()
        shift = _shift(float(x.max()))
        return cls(shift, float(np.exp(x - shift).sum()))

    def merge(self, other: LogSum) -> LogSum:
        """The sum over both."""
        if not other.total:
            return self
        if not self.total:
            return other
        if self.shift == other.shift:
            return LogSum(self.shift, self.total + other.total)
        mine, theirs = self.log(), other.log()
        shift = _shift(max(mine, theirs))
        return LogSum(shift, math.exp(mine - shift) + math.exp(theirs - shift))

    def log(self) -> float:
        """log of the sum (the LSE). ValueError when nothing was added."""
        if not self.total:
            raise ValueError("the log of an empty sum is not a number")
        return self.shift + math.log(self.total)

    def log_mean(self, n: int) -> float:
        """log(sum / n); exactly 0 when all n terms were e^0."""
        return self.shift + math.log(self.total / n)

    def mean(self, n: int) -> float | None:
        """sum / n, or None where float64 cannot hold it (then ask for `log_mean`)."""
        if self.shift == 0.0:
            return self.total / n
        log_mean = self.log_mean(n)
        return math.exp(log_mean) if log_mean <= MAX_EXPONENT else None


def _shift(top: float) -> float:
    return 0.0 if abs(top) <= LINEAR_EXPONENT else top


def kish(weight: LogSum, weight_sq: LogSum, n: int) -> float | None:
    """Kish's effective fraction (sum w)^2 / (n sum w^2), in [1/n, 1]; None for n = 0."""
    if not n:
        return None
    if weight.shift == weight_sq.shift == 0.0:
        value = (weight.total / n) ** 2 / (weight_sq.total / n)
    else:
        value = math.exp(2.0 * weight.log_mean(n) - weight_sq.log_mean(n))
    return min(value, 1.0)


class Moments(msgspec.Struct, frozen=True, array_like=True):
    """Count, mean and centred square sum (Chan's merge: no cancellation when the mean is large)."""

    n: int = 0
    mean: float = 0.0
    m2: float = 0.0

    @classmethod
    def of(cls, x: F64) -> Moments:
        """Moments of an array [n]."""
        if not x.size:
            return cls()
        mean = float(x.mean())
        return cls(int(x.size), mean, float(np.square(x - mean).sum()))

    def merge(self, other: Moments) -> Moments:
        """The moments of both."""
        if not other.n:
            return self
        if not self.n:
            return other
        n = self.n + other.n
        delta = other.mean - self.mean
        mean = (self.n * self.mean + other.n * other.mean) / n
        return Moments(n, mean, self.m2 + other.m2 + delta * delta * (self.n * other.n / n))

    def std(self) -> float | None:
        """Sample standard deviation (n - 1, as torch.std); None for n < 2."""
        return math.sqrt(self.m2 / (self.n - 1)) if self.n > 1 else None


class CoMoments(msgspec.Struct, frozen=True, array_like=True):
    """Centred second moments of pairs (x, y): behind a correlation and a least-squares slope."""

    n: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    m_xx: float = 0.0
    m_yy: float = 0.0
    m_xy: float = 0.0

    @classmethod
    def of(cls, x: F64, y: F64) -> CoMoments:
        """Moments of two arrays [n], paired by index."""
        if not x.size:
            return cls()
        mx, my = float(x.mean()), float(y.mean())
        dx, dy = x - mx, y - my
        return cls(int(x.size), mx, my, float(dx @ dx), float(dy @ dy), float(dx @ dy))

    def merge(self, other: CoMoments) -> CoMoments:
        """The moments of both."""
        if not other.n:
            return self
        if not self.n:
            return other
        n = self.n + other.n
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        cross = self.n * other.n / n
        return CoMoments(
            n,
            (self.n * self.mean_x + other.n * other.mean_x) / n,
            (self.n * self.mean_y + other.n * other.mean_y) / n,
            self.m_xx + other.m_xx + dx * dx * cross,
            self.m_yy + other.m_yy + dy * dy * cross,
            self.m_xy + other.m_xy + dx * dy * cross,
        )

    def correlation(self) -> float | None:
        """Pearson's r; None where a side does not vary."""
        if not (self._varies(self.m_xx, self.mean_x) and self._varies(self.m_yy, self.mean_y)):
            return None
        scale = math.sqrt(self.m_xx) * math.sqrt(self.m_yy)
        return max(-1.0, min(1.0, self.m_xy / scale))

    def slope(self) -> float | None:
        """Least squares of y on x; None where x does not vary."""
        return self.m_xy / self.m_xx if self._varies(self.m_xx, self.mean_x) else None

    def slope_se(self) -> float | None:
        """Standard error of `slope` from its residuals; None for n < 3 or constant x."""
        if self.n < 3 or not self._varies(self.m_xx, self.mean_x):
            return None
        residual = max(self.m_yy - self.m_xy * self.m_xy / self.m_xx, 0.0)
        return math.sqrt(residual / (self.n - 2) / self.m_xx)

    def _varies(self, m2: float, mean: float) -> bool:
        """More than the rounding of equal values: their mean can be off by a few ulp."""
        return m2 > self.n * (ULPS * mean) ** 2


class Sketch(msgspec.Struct, frozen=True, array_like=True):
    """Quantiles of magnitudes: a DDSketch, a sparse histogram in log-spaced bins.

    Bin i holds gamma^(i-1) < x <= gamma^i and answers 2 gamma^i / (gamma + 1), which is within
    `QUANTILE_RELATIVE_ERROR` of everything in it. Zeros are counted apart. Merging adds counts, so
    it is exact; the bound does not grow. Source: Masson, Rim, Lee, VLDB 2019 (arXiv 1908.10693).
    """

    zeros: int = 0
    bins: dict[int, int] = {}

    @classmethod
    def of(cls, x: F64) -> Sketch:
        """Sketch of an array [n] of values >= 0."""
        positive = x[x > 0.0]
        index, count = np.unique(
            np.ceil(np.log(positive) / _LOG_GAMMA).astype(np.int64), return_counts=True
        )
        bins = dict(zip(index.tolist(), count.tolist(), strict=True))
        return cls(int(x.size - positive.size), bins)

    def merge(self, other: Sketch) -> Sketch:
        """The sketch of both."""
        return Sketch(self.zeros + other.zeros, add_counts(self.bins, other.bins))

    def quantile(self, q: float) -> float | None:
        """The nearest-rank quantile: the ceil(q n)-th smallest value; None when empty."""
        n = self.zeros + sum(self.bins.values())
        if not n:
            return None
        rank = max(1, math.ceil(q * n - 1e-9))  # 0.99 * 100 is 99.00000000000001 in some products
        seen = self.zeros
        if rank <= seen:
            return 0.0
        for index in sorted(self.bins):
            seen += self.bins[index]
            if rank <= seen:
                return bin_value(index)
        raise AssertionError("ranks end at n")


def bin_value(index: int) -> float:
    """What bin ``index`` of a `Sketch` answers for the values in it."""
    return 2.0 * math.exp(index * _LOG_GAMMA) / (_GAMMA + 1.0)


def add_counts(a: dict[K, int], b: dict[K, int]) -> dict[K, int]:
    """Key by key sum of two counters."""
    out = dict(a)
    for key, count in b.items():
        out[key] = out.get(key, 0) + count
    return out

"""Log-probability mismatch between a rollout engine and a trainer: every number of METRICS 2.

One job: turn the two logprobs of the same sampled tokens into a `Bucket` of sums, merge buckets,
and read the metrics off. Pure float64 numpy. ``D = logp_train - logp_rollout`` in nats, ``rho =
e^D``; a sequence is one response and ``L`` is its sum of D. `driftgate.glossary.METRICS` says per
name what it means and how it misleads.

Refused: averaging over tokens that cannot be compared. A logprob that is not finite, is at or
below -9000 (vLLM writes -9999 for -inf) or above 1e-6 is left out and counted in ``n_bad_tokens``.
Nothing is clamped except where the name says so. A value that does not exist, or that float64
cannot hold, is None and `Bucket.undefined` says why; NaN and infinity never leave this module.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from driftgate import gates
from driftgate.readout import Value, read, reasons
from driftgate.sums import CoMoments, LogSum, Moments, Sketch

__all__ = ["Bucket", "Value", "Worst", "worst"]

F64 = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

BAD_FLOOR = -9000.0
"""At or below: a sentinel, not a log-probability. vLLM floors -inf to -9999.0."""
BAD_CEILING = 1e-6
"""Above: not a log-probability. Up to here it is rounding of p = 1 in float32."""
KISH_RESPONSE_CLAMP = 20.0
"""`ess_kish_response` clamps D to +-20, as the original observatory did (its tiles and colours)."""
VERL_SAFETY_BOUND = 20.0
"""verl rollout_corr_helper.SAFETY_BOUND: log weights are clamped to +-20 before exp."""
VERL_TRUNCATION = 2.0
"""verl rollout_is_threshold default C: weights are clamped to [1/C, C] for its ESS."""
OVERFLOW_D = 350.0
"""(e^D)^2 leaves float64 at D = 354.9. A sampled token with D > 350 had p_rollout < 1e-152: the
linear sums (k3 and the like) are then undefined, while the log-domain ones go on."""
LOGIT_EDGE = 1e-4
"""Tokens with p_rollout > 1 - 1e-4 stay out of `logodds_slope`: their log-odds are rounding (a
float32 logsumexp is off by about 1e-6, 1 % of 1 - p there). Choosing by x only leaves a slope
unbiased."""
LOGIT_FLOOR = 1e-6
"""1 - p_train is floored here for its log-odds, so that p_train = 1 is large instead of
infinite."""

EXTREME_TAUS = {"1.25": 1.25, "2": 2.0, "5": 5.0, "10": 10.0}
"""F(tau) of the R3 paper (arXiv 2510.11370), by how the name spells tau."""


class Worst(msgspec.Struct, frozen=True):
    """The token where the two sides differ most."""

    token_index: int
    """0-based within the response."""
    token_id: int
    """-1 where the ids were not given."""
    log_ratio: float
    """D in nats, with its sign."""
    train_logprob: float
    rollout_logprob: float
    trace_id: str = ""


class Linear(msgspec.Struct, frozen=True):
    """Sums over tokens that grow with e^D without a log; absent once a token has D > OVERFLOW_D."""

    k3: float = 0.0
    kl_train: float = 0.0
    js: float = 0.0
    tv: float = 0.0
    excess: Moments = Moments()
    """Of e^D - 1."""

    def merge(self, other: Linear) -> Linear:
        """The sums over both."""
        return Linear(
            self.k3 + other.k3,
            self.kl_train + other.kl_train,
            self.js + other.js,
            self.tv + other.tv,
            self.excess.merge(other.excess),
        )


class Bucket(msgspec.Struct, kw_only=True):
    """Everything the metrics of many sequences need; two buckets merge into that of their union."""

    n_tokens: int = 0
    """Tokens compared: kept by the mask and good on both sides."""
    n_seqs: int = 0
    """Sequences with at least one compared token."""
    n_bad_tokens: int = 0
    log_ratio: Moments = Moments()
    sum_abs: float = 0.0
    sum_sq: float = 0.0
    linear: Linear | None = Linear()
    weight: LogSum = LogSum()
    weight_sq: LogSum = LogSum()
    mult: LogSum = LogSum()
    prob_abs_diff: Moments = Moments()
    prob_abs_diff_max: float = 0.0
    probs: CoMoments = CoMoments()
    """x = p_rollout, y = p_train."""
    logits: CoMoments = CoMoments()
    """x = logit p_rollout, y = logit p_train, over tokens inside LOGIT_EDGE."""
    trunc_token: float = 0.0
    trunc_token_sq: float = 0.0
    trunc_seq: float = 0.0
    trunc_seq_sq: float = 0.0
    log_ratio_sum: Moments = Moments()
    seq_weight: LogSum = LogSum()
    seq_weight_sq: LogSum = LogSum()
    geo_weight: LogSum = LogSum()
    geo_weight_sq: LogSum = LogSum()
    kish_response: float = 0.0
    train_ppl: LogSum = LogSum()
    rollout_ppl: LogSum = LogSum()
    ppl_ratio: LogSum = LogSum()
    log_ppl_diff: float = 0.0
    log_ppl_abs_diff: float = 0.0
    token_hits: dict[str, int] = {}
    """Tokens that a gate or an extreme catches, by metric name."""
    seq_hits: dict[str, int] = {}
    """Sequences that a gate catches, by metric name."""
    sketch: Sketch = Sketch()
    """Of |D|."""
    worst: Worst | None = None

    @classmethod
    def of(
        cls,
        train: Array,
        rollout: Array,
        mask: Array | None = None,
        *,
        token_ids: Array | None = None,
        trace_id: str = "",
    ) -> Bucket:
        """The bucket of one response.

        ``train``, ``rollout``: [R] nats, token j of both is the same sampled token. ``mask``: bool
        [R], True where the model sampled the token (no tool output, no forced token).
        ``token_ids`` [R] and ``trace_id`` only locate the worst token. ValueError on shapes that
        do not agree.
        """
        keep, n_bad = good_tokens(train, rollout, mask)
        t, r = _f64(train)[keep], _f64(rollout)[keep]
        if not t.size:
            return cls(n_bad_tokens=n_bad)
        d = t - r
        n, total, mean = d.size, float(d.sum()), float(d.mean())
        prob_diff = np.exp(t) - np.exp(r)
        trunc = np.clip(np.exp(_clip(d, VERL_SAFETY_BOUND)), 1 / VERL_TRUNCATION, VERL_TRUNCATION)
        bound = math.exp(max(-VERL_SAFETY_BOUND, min(VERL_SAFETY_BOUND, total)))
        trunc_seq = max(1 / VERL_TRUNCATION, min(VERL_TRUNCATION, bound))
        clamped = np.exp(_clip(d, KISH_RESPONSE_CLAMP))
        return cls(
            n_tokens=n,
            n_seqs=1,
            n_bad_tokens=n_bad,
            log_ratio=Moments.of(d),
            sum_abs=float(np.abs(d).sum()),
            sum_sq=float(d @ d),
            linear=_linear(d),
            weight=LogSum.of(d),
            weight_sq=LogSum.of(2.0 * d),
            mult=LogSum.of(np.abs(d)),
            prob_abs_diff=Moments.of(np.abs(prob_diff)),
            prob_abs_diff_max=float(np.abs(prob_diff).max()),
            probs=CoMoments.of(np.exp(r), np.exp(t)),
            logits=_logits(t, r),
            trunc_token=float(trunc.sum()),
            trunc_token_sq=float(trunc @ trunc),
            trunc_seq=n * trunc_seq,
            trunc_seq_sq=n * trunc_seq * trunc_seq,
            log_ratio_sum=Moments(1, total, 0.0),
            seq_weight=_one(total),
            seq_weight_sq=_one(2.0 * total),
            geo_weight=_one(mean),
            geo_weight_sq=_one(2.0 * mean),
            kish_response=float(clamped.sum() ** 2 / (n * (clamped @ clamped))),
            train_ppl=_one(-float(t.mean())),
            rollout_ppl=_one(-float(r.mean())),
            ppl_ratio=_one(-mean),
            log_ppl_diff=0.0 - mean,
            log_ppl_abs_diff=abs(mean),
            token_hits=_token_hits(d, prob_diff),
            seq_hits=gates.seq_hits(d),
            sketch=Sketch.of(np.abs(d)),
            worst=_worst(t, r, np.flatnonzero(keep), token_ids, trace_id),
        )

    def merge(self, other: Bucket) -> Bucket:
        """The bucket of the sequences of both; neither is changed."""
        merged = {
            name: _merged(getattr(self, name), getattr(other, name))
            for name in self.__struct_fields__
            if name not in ("linear", "prob_abs_diff_max", "token_hits", "seq_hits", "worst")
        }
        both = self.linear is not None and other.linear is not None
        return Bucket(
            **merged,
            token_hits=_merged_hits(self, other, "token_hits"),
            seq_hits=_merged_hits(self, other, "seq_hits"),
            linear=_merged(self.linear, other.linear) if both else None,
            prob_abs_diff_max=max(self.prob_abs_diff_max, other.prob_abs_diff_max),
            worst=_worse(self.worst, other.worst),
        )

    def metrics(self) -> dict[str, Value]:
        """Every metric of METRICS 2 by name; None where it is undefined (see `undefined`)."""
        return read(self)

    def undefined(self) -> dict[str, str]:
        """Why each metric that is None is None."""
        return reasons(self)


def worst(
    train: Array,
    rollout: Array,
    token_ids: Array,
    mask: Array | None = None,
    trace_id: str = "",
) -> Worst | None:
    """The token with the largest |D| among the comparable ones, the first of equals; None if none.

    All arrays [R] of one response, as in `Bucket.of`.
    """
    keep, _ = good_tokens(train, rollout, mask)
    if not keep.any():
        return None
    t, r = _f64(train)[keep], _f64(rollout)[keep]
    return _worst(t, r, np.flatnonzero(keep), token_ids, trace_id)


def _f64(x: Array) -> F64:
    return np.asarray(x, dtype=np.float64)


def _clip(x: F64, bound: float) -> F64:
    return np.clip(x, -bound, bound)


def _one(exponent: float) -> LogSum:
    return LogSum.of(np.array([exponent]))


def good_tokens(
    train: Array, rollout: Array, mask: Array | None
) -> tuple[npt.NDArray[np.bool_], int]:
    """([R] tokens to compare, how many tokens of the mask were bad on either side)."""
    t, r = _f64(train), _f64(rollout)
    wanted = np.ones(t.shape, dtype=np.bool_) if mask is None else np.asarray(mask, dtype=np.bool_)
    if t.ndim != 1 or t.shape != r.shape or t.shape != wanted.shape:
        raise ValueError(
            f"train {t.shape}, rollout {r.shape} and mask {wanted.shape} must be one [R]: "
            "give the logprobs of the same sampled tokens"
        )
    good = wanted & is_logprob(t) & is_logprob(r)
    return good, int(wanted.sum() - good.sum())


def is_logprob(x: Array) -> npt.NDArray[np.bool_]:
    """[R] whether each number of ``x`` [R] can be one, in nats."""
    # NaN fails both comparisons, infinity one of them
    return (x > BAD_FLOOR) & (x <= BAD_CEILING)


def _linear(d: F64) -> Linear | None:
    """Sums of the divergence estimators; None where e^2D would overflow."""
    if float(d.max()) > OVERFLOW_D:
        return None
    excess = np.expm1(d)
    # JS: .5 (rho D - (1 + rho)(softplus D - ln 2)) with softplus D - ln 2 = D/2 + log cosh(D/2),
    # which leaves no difference of nearly equal terms at small D
    log_cosh = _log_cosh(d / 2.0)
    return Linear(
        k3=float((excess - d).sum()),
        kl_train=float((np.exp(d) * d - excess).sum()),
        js=float((0.5 * (excess * (d / 2.0 - log_cosh) - 2.0 * log_cosh)).sum()),
        tv=float(np.abs(excess).sum() / 2.0),
        excess=Moments.of(excess),
    )


def _log_cosh(y: F64) -> F64:
    a = np.abs(y)
    near = np.log1p(2.0 * np.square(np.sinh(np.minimum(a, 1.0) / 2.0)))
    return np.where(a < 1.0, near, a + np.log1p(np.exp(-2.0 * a)) - math.log(2.0))


def _logits(t: F64, r: F64) -> CoMoments:
    """Log-odds of both sides, over tokens whose rollout probability is not rounding-close to 1."""
    inside = r < math.log1p(-LOGIT_EDGE)
    x, y = r[inside], t[inside]
    floor = math.log(LOGIT_FLOOR)
    complement = np.where(y < -LOGIT_FLOOR, np.log(-np.expm1(np.minimum(y, -LOGIT_FLOOR))), floor)
    return CoMoments.of(x - np.log(-np.expm1(x)), y - complement)


def _token_hits(d: F64, prob_diff: F64) -> dict[str, int]:
    caught = {
        f"extreme_frac_tau{name}": np.abs(d) > math.log(tau) for name, tau in EXTREME_TAUS.items()
    }
    hits = {name: int(hit.sum()) for name, hit in caught.items()}
    return hits | gates.token_hits(d, prob_diff)


def _worst(
    t: F64, r: F64, index: npt.NDArray[np.intp], token_ids: Array | None, trace_id: str
) -> Worst:
    at = int(np.argmax(np.abs(t - r)))
    j = int(index[at])
    return Worst(
        token_index=j,
        token_id=-1 if token_ids is None else int(token_ids[j]),
        log_ratio=float(t[at] - r[at]),
        train_logprob=float(t[at]),
        rollout_logprob=float(r[at]),
        trace_id=trace_id,
    )


def _worse(a: Worst | None, b: Worst | None) -> Worst | None:
    """The larger |D|; of equals the earlier by (trace, token), so that order does not matter."""
    if a is None or b is None:
        return a or b
    return min(a, b, key=lambda w: (-abs(w.log_ratio), w.trace_id, w.token_index))


def _merged(a: Any, b: Any) -> Any:
    return a + b if isinstance(a, (int, float)) else a.merge(b)


def _merged_hits(a: Bucket, b: Bucket, field: str) -> dict[str, int]:
    """Counts of what both sides counted: a gate that one of them is older than has no sum."""
    mine, theirs = getattr(a, field), getattr(b, field)
    if not a.n_tokens or not b.n_tokens:
        return dict(mine or theirs)
    return {name: count + theirs[name] for name, count in mine.items() if name in theirs}

"""Where the drift of a run sits: over length, turns, probability and kinds of token. Pure.

Works on the compared tokens of scored responses; every mean is over tokens and says how many.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from driftgate.mismatch import good_tokens
from driftgate.tokenclass import CLASSES, TokenClass, classify
from driftgate.trace import F32, Score, ScoreMeta, Trace, TraceMeta

__all__ = [
    "DIVERGENT",
    "Growth",
    "Place",
    "Response",
    "Scale",
    "Slice",
    "by_class",
    "by_position",
    "by_probability",
    "by_step",
    "first_divergent",
    "growth",
    "worst",
]

F64 = npt.NDArray[np.float64]

DIVERGENT = math.log(2.0)
"""nats; from here on a token's ratio leaves [1/2, 2]."""

PROBABILITY_EDGES = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)
"""Of p_rollout. Rounding hurts rare tokens most in nats and frequent ones most in probability."""

MIN_BLOCKS = 16
"""Blocks behind each standard deviation of the fit: it is then known to about 18 %."""
MIN_SCALES = 3
SHUFFLES = 99
"""Orders of the same tokens that the exponent is held against: a one-sided level of 1 %."""
MAX_SHUFFLED = 1 << 16
"""Tokens that are shuffled, the first ones: 99 orders of 65k tokens take about half a second."""
BIAS_Z = 4.0
"""z of mean D from which it counts as a bias."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Response:
    """One scored response, its compared tokens only. Arrays are [n], float64 nats or indices."""

    trace: TraceMeta
    score: ScoreMeta
    index: npt.NDArray[np.intp]
    """Within the response."""
    token_ids: npt.NDArray[np.int32]
    prompt_len: int | None
    rollout: F64
    train: F64
    """At the score's temperature."""
    other: F64 | None
    """The trainer's at the other temperature of ``dual_T``; None where there is only one."""
    replayed: F64 | None
    """The trainer's under the rollout's routes, at the score's temperature; None without."""
    classes: list[TokenClass]
    texts: list[str | None]
    notes: list[str]

    @property
    def d(self) -> F64:
        """logp_train - logp_rollout."""
        return self.train - self.rollout

    @classmethod
    def of(cls, trace: Trace, score: Score, replayed: F32 | None = None) -> Response | None:
        """None where no token can be compared. ``replayed``: [R] at the score's temperature."""
        at_one = score.meta.temperature == 1.0
        train = score.logprobs if at_one else score.logprobs_at_temperature
        other = score.logprobs_at_temperature if at_one else score.logprobs
        if trace.logprobs is None or trace.response_ids is None or train is None or not len(train):
            return None
        keep, _ = good_tokens(train, trace.logprobs, None)
        if not keep.any():
            return None
        told = classify(trace)
        index = np.flatnonzero(keep)
        return cls(
            trace=trace.meta,
            score=score.meta,
            index=index,
            token_ids=trace.response_ids[keep],
            prompt_len=None if trace.prompt_ids is None else len(trace.prompt_ids),
            rollout=trace.logprobs[keep].astype(np.float64),
            train=train[keep].astype(np.float64),
            other=None if other is None else other[keep].astype(np.float64),
            replayed=None if replayed is None else replayed[keep].astype(np.float64),
            classes=[told.classes[j] for j in index],
            texts=[_text(trace, int(j)) for j in index],
            notes=told.notes,
        )


def _text(trace: Trace, j: int) -> str | None:
    if trace.token_offsets is None:
        return None
    return trace.token_bytes[trace.token_offsets[j] : trace.token_offsets[j + 1]].decode(
        errors="replace"
    )


class Slice(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of one kind."""

    label: str
    n_tokens: int
    abs_log_ratio_mean: float | None
    """Null without a token."""
    log_ratio_mean: float | None
    prob_abs_diff_mean: float | None
    share_of_tokens: float
    share_of_drift: float | None
    """Of the sum of |D|; null where that is 0."""


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """Sums of D over stretches of one length."""

    length: int
    """Tokens."""
    blocks: int
    log_ratio_sum_std: float


class Growth(msgspec.Struct, frozen=True, kw_only=True):
    """Does drift compound? ``log_ratio_sum_std`` over T tokens goes as T to the ``exponent``."""

    exponent: float | None
    """.5: independent noise, the sum grows as sqrt(T); above: it compounds; below: it cancels."""
    exponent_if_independent: tuple[float, float] | None
    """Smallest and largest exponent of the same tokens in 99 random orders; each response keeps
    how far it is off."""
    compounds: bool | None
    """The exponent is above all of those."""
    bias_per_token: float | None
    """Mean of D, nats: what grows as T, beside the spread."""
    bias_z: float | None
    bias_exceeds_noise_after: float | None
    """Tokens after which the bias is more than the spread; null unless |z| >= 4."""
    scales: list[Scale]
    why_null: str | None = None


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """One token, so that it can be found again."""

    trace_id: str
    step: int
    choice: int
    token_index: int
    position: int | None
    token_id: int
    text: str | None
    token_class: TokenClass
    rollout_logprob: float
    train_logprob: float
    log_ratio: float


def growth(responses: Sequence[Response]) -> Growth:
    """Fits the exponent over blocks of 1, 2, 4, … tokens that stay inside a response.

    Least squares of log std on log length (the aggregated-variance estimate of a Hurst exponent,
    Taqqu, Teverovsky, Willinger 1995), held against the same tokens in random order. Long blocks
    are of long answers only, which may be noisier or less: see `_levels`.
    """
    parts = [response.d for response in responses]
    d = np.concatenate(parts) if parts else np.zeros(0)
    mean, spread = (float(d.mean()), float(d.std(ddof=1))) if d.size > 1 else (None, None)
    scales = _scales(parts)
    z = mean / (spread / math.sqrt(d.size)) if mean is not None and spread else None
    biased = z is not None and abs(z) >= BIAS_Z
    fitted = _exponent(_levels(parts))
    independent = None if fitted is None else _shuffled(parts)
    return Growth(
        exponent=fitted,
        exponent_if_independent=independent,
        compounds=None if fitted is None or independent is None else fitted > independent[1],
        bias_per_token=mean,
        bias_z=z,
        bias_exceeds_noise_after=(spread / mean) ** 2 if biased and spread and mean else None,
        scales=scales,
        why_null=None if fitted is not None else _too_short(d),
    )


def _too_short(d: F64) -> str:
    if d.size >= MIN_BLOCKS * 2 ** (MIN_SCALES - 1) and not np.ptp(d):
        return "every token has the same log ratio: there is no spread to fit"
    return f"{d.size} tokens: needs {MIN_SCALES} lengths with {MIN_BLOCKS} blocks each"


def _scales(parts: Sequence[F64]) -> list[Scale]:
    out: list[Scale] = []
    length = 1
    while True:
        sums = np.concatenate([_blocks(part, length) for part in parts] or [np.zeros(0)])
        if sums.size < MIN_BLOCKS:
            return out
        std = float(sums.std(ddof=1))
        out.append(Scale(length=length, blocks=int(sums.size), log_ratio_sum_std=std))
        length *= 2


def _blocks(part: F64, length: int) -> F64:
    whole = part.size // length * length
    return np.asarray(part[:whole].reshape(-1, length).sum(axis=1))


def _levels(parts: Sequence[F64]) -> list[float]:
    """log std of the sums over 1, 2, 4, … tokens, the first taken as 0. Each step is over one set
    of tokens, those in whole blocks of the longer length. Empty without spread."""
    levels = [0.0]
    length = 1
    while True:
        whole = [part[: part.size // (2 * length) * 2 * length] for part in parts]
        shorter = np.concatenate([_blocks(part, length) for part in whole] or [np.zeros(0)])
        longer = shorter.reshape(-1, 2).sum(axis=1)
        if longer.size < MIN_BLOCKS:
            return levels
        before, after = float(shorter.std(ddof=1)), float(longer.std(ddof=1))
        if before <= 0.0 or after <= 0.0:
            return []
        levels.append(levels[-1] + math.log(after / before))
        length *= 2


def _exponent(levels: Sequence[float]) -> float | None:
    if len(levels) < MIN_SCALES:
        return None
    x = math.log(2.0) * np.arange(len(levels))
    return float(np.polyfit(x, levels, 1)[0])


def _shuffled(parts: Sequence[F64]) -> tuple[float, float] | None:
    """Of the run's tokens in random order. Each response keeps its length and how far it is off,
    its root mean square about the run's mean: tokens are moved in units of it."""
    rng = np.random.default_rng(0)
    d = np.concatenate(parts)[:MAX_SHUFFLED]
    d = d - d.mean()
    ends = np.cumsum([part.size for part in parts])
    cuts = ends[ends < d.size]
    far = np.concatenate(
        [np.full(part.size, math.sqrt(float(np.square(part).mean()))) for part in np.split(d, cuts)]
    )
    unit = np.divide(d, far, out=np.zeros_like(d), where=far > 0.0)
    orders = (np.split(rng.permutation(unit) * far, cuts) for _ in range(SHUFFLES))
    found = [_exponent(_levels(order)) for order in orders]
    known = [exponent for exponent in found if exponent is not None]
    return (min(known), max(known)) if known else None


def by_step(responses: Sequence[Response]) -> list[Slice]:
    """One slice for each step, in order."""
    steps = sorted({response.trace.step for response in responses})
    return _sliced(
        responses,
        [str(step) for step in steps],
        lambda r: np.full(r.index.size, steps.index(r.trace.step)),
    )


def by_position(responses: Sequence[Response]) -> list[Slice]:
    """By absolute position in prompt + response, in octaves: does a longer context drift more?"""
    placed = [response for response in responses if response.prompt_len is not None]
    if not placed:
        return []

    def octave(response: Response) -> npt.NDArray[np.intp]:
        positions = response.index + (response.prompt_len or 0)
        return np.asarray(np.log2(np.maximum(positions, 1)), dtype=np.intp)

    top = max(int(octave(response).max()) for response in placed)
    labels = [f"{2**at}..{2 ** (at + 1) - 1}" for at in range(top + 1)]
    return [part for part in _sliced(placed, labels, octave) if part.n_tokens]


def by_probability(responses: Sequence[Response]) -> list[Slice]:
    """By the engine's probability of the token."""
    edges = PROBABILITY_EDGES
    labels = [f"{low:g}..{high:g}" for low, high in itertools.pairwise(edges)]
    inner = np.array(edges[1:-1])
    return _sliced(responses, labels, lambda r: np.digitize(np.exp(r.rollout), inner))


def by_class(responses: Sequence[Response]) -> list[Slice]:
    """By kind of token; kinds that do not occur are left out."""
    number = {name: at for at, name in enumerate(CLASSES)}
    parts = _sliced(
        responses, list(CLASSES), lambda r: np.array([number[name] for name in r.classes])
    )
    return [part for part in parts if part.n_tokens]


def _sliced(
    responses: Sequence[Response],
    labels: Sequence[str],
    group: Callable[[Response], npt.NDArray[np.intp]],
) -> list[Slice]:
    """One slice for each label; ``group`` gives [n] indices into ``labels``."""
    if not responses:
        return []
    at = np.concatenate([group(response) for response in responses])
    d = np.concatenate([response.d for response in responses])
    moved = np.concatenate([np.exp(r.train) - np.exp(r.rollout) for r in responses])
    total = float(np.abs(d).sum())
    out = []
    for number, label in enumerate(labels):
        here = at == number
        count = int(here.sum())
        drift = float(np.abs(d[here]).sum())
        out.append(
            Slice(
                label=label,
                n_tokens=count,
                abs_log_ratio_mean=drift / count if count else None,
                log_ratio_mean=float(d[here].mean()) if count else None,
                prob_abs_diff_mean=float(np.abs(moved[here]).mean()) if count else None,
                share_of_tokens=count / d.size,
                share_of_drift=drift / total if total else None,
            )
        )
    return out


def first_divergent(responses: Sequence[Response]) -> Place | None:
    """The first token, by step, choice and index, whose ratio leaves [1/2, 2]; None without."""
    for response in _ordered(responses):
        beyond = np.flatnonzero(np.abs(response.d) > DIVERGENT)
        if beyond.size:
            return _place(response, int(beyond[0]))
    return None


def worst(responses: Sequence[Response]) -> Place | None:
    """The token with the largest |D|, the first of equals."""
    ordered = _ordered(responses)
    if not ordered:
        return None
    response = max(ordered, key=lambda r: float(np.abs(r.d).max()))
    return _place(response, int(np.abs(response.d).argmax()))


def _ordered(responses: Sequence[Response]) -> list[Response]:
    return sorted(responses, key=lambda r: (r.trace.step, r.trace.started_ns, r.trace.choice))


def _place(response: Response, at: int) -> Place:
    j = int(response.index[at])
    return Place(
        trace_id=response.trace.trace_id,
        step=response.trace.step,
        choice=response.trace.choice,
        token_index=j,
        position=None if response.prompt_len is None else response.prompt_len + j,
        token_id=int(response.token_ids[at]),
        text=response.texts[at],
        token_class=response.classes[at],
        rollout_logprob=float(response.rollout[at]),
        train_logprob=float(response.train[at]),
        log_ratio=float(response.d[at]),
    )

"""`driftgate explain`: planted causes with shares known by construction, and where drift sits.

Of every run the log ratios are noise plus one effect. What the cause must be given is the fall of
sum |D| when that effect is taken away again, which only the planter knows: the code under test sees
D alone. Causes that are undone by a second set of numbers meet it to float32's end; those that are
measured against other tokens of the run meet it to the sampling error of their means.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from driftgate import anatomy
from driftgate.anatomy import DIVERGENT, PROBABILITY_EDGES, Response, Slice
from driftgate.causes import Floor, Run
from driftgate.codes import reason
from driftgate.explain import Cause, Refusal, attribute, explain
from driftgate.trace import Comparable, Score, Trace
from science.by_hand import F64
from science.table import Row, exactly, near
from tests.core.planted import noise, responses, run, scored, with_meta

__all__ = ["anatomies", "causes"]

STORED = 1e-5
"""Of a share: log-probabilities are kept in float32."""
SAMPLED = 0.02
"""Of a share whose baseline is a mean over 200 to 600 other tokens."""
TOKENS = 200
QUIET, LOUD = 0.01, 0.2


@dataclasses.dataclass(frozen=True, slots=True)
class Plant:
    """A run with one cause in it."""

    what: str
    cause: str
    found: str
    share: float
    """Of sum |D|, that this cause brought."""
    tolerance: float
    causes: list[Cause]


def causes(part: str) -> Iterator[Row]:
    """Each planted cause by share and by how it was found; then what holds of all of them."""
    plants = [
        _transform(),
        *(_steps(kind) for kind in ("template", "version", "jump")),
        _routing(),
        _floor(),
        _rounding(),
    ]
    for plant in plants:
        (cause,) = [one for one in plant.causes if one.name == plant.cause]
        yield Row(
            part,
            f"{plant.what}: share of {plant.cause}",
            cause.share,
            plant.share,
            abs(cause.share - plant.share),
            plant.tolerance,
        )
        yield exactly(part, f"{plant.what}: how it was found", cause.found, plant.found)
        blamed = [c.name for c in plant.causes if c.share > SAMPLED and c.name != plant.cause]
        wanted = "unexplained" if 1 - plant.share > SAMPLED else ""
        yield exactly(part, f"{plant.what}: who else is blamed", ", ".join(blamed), wanted)
    every = [cause for plant in plants for cause in plant.causes]
    apart = max(abs(math.fsum(c.share for c in plant.causes) - 1) for plant in plants)
    yield near(part, "shares of a run, added up (the worst of all runs)", 1 + apart, 1.0, rel=1e-12)
    told = sum(bool(c.detail and c.evidence and c.fix) for c in every)
    yield exactly(part, "causes with a detail, evidence and what to do", told, len(every))
    yield from _set_aside(part)


def _share(base: Sequence[F64], d: Sequence[F64]) -> float:
    left, whole = (math.fsum(abs(x) for one in parts for x in one) for parts in (base, d))
    return 1 - left / whole


def _scored(traces: list[Trace], d: Sequence[F64], **meta: Any) -> list[Score]:
    return [scored(trace, one, **meta) for trace, one in zip(traces, d, strict=True)]


def _transform() -> Plant:
    """The trainer at T = 1 against an engine that scaled by .7: its other temperature fits."""
    rng = np.random.default_rng(1)
    traces, ds, base, scores = run(2, 300), [], [], []
    for at, trace in enumerate(traces):
        z = rng.normal(0.0, 2.0, (300, 50))
        one, hot = (x[:, 0] - np.log(np.exp(x).sum(-1)) for x in (z, z / 0.7))
        traces[at] = dataclasses.replace(trace, logprobs=hot.astype(np.float32))
        base.append(noise(at, 300, QUIET))
        ds.append(one - hot)
        scores.append(scored(traces[at], ds[-1], base[-1]))
    found = attribute(Run(responses(traces, scores), None))
    return Plant("temperature", "transform", "measured", _share(base, ds), STORED, found)


def _steps(kind: str) -> Plant:
    """Four steps; one or two of them drift more, and what marks them is the kind."""
    traces, loud, meta = run(4), [2, 3], {"trainer_weight_version": "5"}
    what, cause, found = "weights of another version", "stale_weights", "measured"
    if kind == "version":
        traces = [with_meta(t, weight_version="3" if n in loud else "5")
                  for n, t in enumerate(traces)]  # fmt: skip
    elif kind == "template":
        what, cause, loud = "a prefix that breaks", "template", [1]
        traces[1] = with_meta(traces[1], prefix_exact=False)
    else:
        what, found, meta = "drift that jumps at step 2", "inferred", {}
    base = [noise(n, TOKENS, QUIET) for n in range(4)]
    d = [one * (LOUD / QUIET if n in loud else 1.0) for n, one in enumerate(base)]
    told = attribute(Run(responses(traces, _scored(traces, d, **meta)), None))
    return Plant(what, cause, found, _share(base, d), SAMPLED, told)


def _routing() -> Plant:
    """Other experts: gone under the rollout's routes."""
    traces = run(2)
    base = [noise(n, TOKENS, 0.02) for n in range(2)]
    d = [one + noise(10 + n, TOKENS, LOUD) for n, one in enumerate(base)]
    found = []
    for trace, score, rest in zip(traces, _scored(traces, d), base, strict=True):
        assert trace.logprobs is not None
        replayed = (trace.logprobs + rest).astype(np.float32)
        one = Response.of(trace, score, replayed)
        assert one is not None
        found.append(one)
    causes = attribute(Run(found, None))
    return Plant("other experts", "routing", "measured", _share(base, d), STORED, causes)


def _floor() -> Plant:
    """Noise of which the engine has half against itself."""
    traces = run(3)
    d = [noise(n, TOKENS, 0.02) for n in range(3)]
    level = float(np.abs(np.concatenate(d)).mean()) / 2
    found = attribute(Run(responses(traces, _scored(traces, d)), Floor(level, "engine")))
    return Plant("a noise floor", "precision", "measured", 0.5, STORED, found)


def _rounding() -> Plant:
    """Symmetric noise between two precisions, and one token that is off by 3 nats besides."""
    why = Comparable(
        verdict="converted", reasons=[reason("precision_class_differs", "bf16, fp32", "none")]
    )
    traces = run(2)
    d = [noise(n, TOKENS, 0.03) for n in (1, 2)]
    outlier = [np.zeros(TOKENS), np.zeros(TOKENS)]
    d[1][7] = outlier[1][7] = -3.0
    found = attribute(Run(responses(traces, _scored(traces, d, comparable=why)), None))
    share = _share(outlier, d)
    return Plant("two precisions and an outlier", "precision", "inferred", share, SAMPLED, found)


def _set_aside(part: str) -> Iterator[Row]:
    """A forced tool call of 100 tokens at 25 nats before three steps of noise."""
    traces = run(3)
    d = [noise(n, TOKENS, 0.02) for n in range(3)]
    found = responses(traces, _scored(traces, d))
    masked = Refusal(
        step=0, reason=reason("grammar_masked", "tool_choice", "free it"), tokens=100,
        sum_abs=2500.0,
    )  # fmt: skip
    told = explain(
        found, sides=found[0].score, captured=4, comparable={"yes": 3, "no": 1}, refusals=[masked]
    )
    (aside,) = told.set_aside
    drift = math.fsum(abs(x) for one in d for x in one)
    yield near(part, "a grammar's answer: share of tokens", aside.share_of_tokens, 1 / 7, rel=1e-12)
    share = 2500 / (2500 + drift)
    yield near(part, "a grammar's answer: share of drift", aside.share_of_drift, share, rel=STORED)
    ours, alone = told.causes, attribute(Run(found, None))
    yield exactly(part, "a grammar's answer feeds no cause", ours == alone, True)


def anatomies(part: str) -> Iterator[Row]:
    """Does drift compound, and on which tokens does it sit: against loops over single tokens."""
    yield from _growth(part)
    found = _mixed()
    kinds = {
        "by step": (anatomy.by_step(found), lambda r, j: str(r.trace.step)),
        "by position": (anatomy.by_position(found), _octave),
        "by probability": (anatomy.by_probability(found), _bin),
        "by class": (anatomy.by_class(found), lambda r, j: WRITTEN[r.index[j] % len(WRITTEN)][1]),
    }
    for what, (ours, label) in kinds.items():
        yield from _sliced(part, what, ours, found, label)
    first, last = anatomy.first_divergent(found), anatomy.worst(found)
    beyond = [
        (r.trace.trace_id, int(r.index[j]))
        for r in found
        for j in range(len(r.index))
        if abs(r.train[j] - r.rollout[j]) > DIVERGENT
    ]
    largest = max((abs(r.train[j] - r.rollout[j]), r.trace.trace_id, int(r.index[j]))
                  for r in found for j in range(len(r.index)))  # fmt: skip
    for what, place, wanted in (
        ("first divergent token", first, beyond[0]),
        ("worst token", last, largest[1:]),
    ):
        assert place is not None
        told = f"{place.trace_id}, token {place.token_index}"
        yield exactly(part, what, told, f"{wanted[0]}, token {wanted[1]}")


def _growth(part: str) -> Iterator[Row]:
    """``log_ratio_sum_std`` over T tokens goes as T to the exponent; sqrt(T) is 1/2."""
    rng = np.random.default_rng(3)
    count, size, sigma = 30, 256, 0.02
    white = [rng.normal(0, sigma, size) for _ in range(count)]
    shared = [np.full(size, rng.normal(0, sigma)) + rng.normal(0, sigma / 50, size)
              for _ in range(count)]  # fmt: skip
    undone = [np.diff(rng.normal(0, sigma, size + 1)) for _ in range(count)]
    for what, ds, exponent, compounds in (
        ("independent noise", white, 0.5, False),
        ("an offset that a response shares", shared, 1.0, True),
        ("noise that the next token takes back", undone, 0.0, False),
    ):
        traces = [one for n in range(count) for one in run(1, size, seed=n)]
        found = responses(traces, [scored(t, d) for t, d in zip(traces, ds, strict=True)])
        told = anatomy.growth(found)
        ours = told.exponent
        assert ours is not None
        yield Row(part, f"{what}: exponent of T", ours, exponent, abs(ours - exponent), 0.05)
        yield exactly(part, f"{what}: compounds", told.compounds, compounds)
        by_hand = []
        for scale in told.scales:
            sums = [math.fsum(r.d[at : at + scale.length].tolist())
                    for r in found
                    for at in range(0, size - scale.length + 1, scale.length)]  # fmt: skip
            by_hand.append(statistics.stdev(sums))
        stds = [scale.log_ratio_sum_std for scale in told.scales]
        yield near(part, f"{what}: log_ratio_sum_std by length", stds, by_hand, rel=1e-9)


WRITTEN = (
    ("<think>", "special"),
    ("hm", "thinking"),
    ("</think>", "special"),
    ("Yes", "content"),
    ("<tool_call>", "special"),
    ('{"a"', "tool_call"),
    (": 1}", "tool_call"),
    ("</tool_call>", "special"),
)
"""Tokens of an answer, over and over, and the class of each."""


def _mixed() -> list[Response]:
    """Three steps with every class of token, over all bins of probability, and some large |D|."""
    rng, out = np.random.default_rng(6), []
    size = 10 * len(WRITTEN)
    for at, trace in enumerate(run(3, size)):
        pieces = [WRITTEN[j % len(WRITTEN)][0].encode() for j in range(size)]
        rollout = np.log(np.exp(-rng.exponential(1.5, size)).clip(1e-4, 0.999))
        written = dataclasses.replace(
            trace,
            logprobs=rollout.astype(np.float32),
            token_bytes=b"".join(pieces),
            token_offsets=np.cumsum([0, *map(len, pieces)], dtype=np.int32),
            response=msgspec.json.encode({"message": {}}),
        )
        train = np.minimum(rollout + rng.normal(0, 0.3, size), -1e-4)
        one = Response.of(written, scored(written, train - rollout))
        assert one is not None, at
        out.append(one)
    return out


def _octave(r: Response, j: int) -> str:
    assert r.prompt_len is not None
    low = 1
    while 2 * low <= r.prompt_len + int(r.index[j]):
        low *= 2
    return f"{low}..{2 * low - 1}"


def _bin(r: Response, j: int) -> str:
    p = math.exp(r.rollout[j])
    for low, high in itertools.pairwise(PROBABILITY_EDGES):
        if low <= p < high:
            return f"{low:g}..{high:g}"
    raise AssertionError(p)


def _sliced(
    part: str, what: str, ours: Sequence[Slice], found: Sequence[Response], label: Any
) -> Iterator[Row]:
    by_hand: dict[str, list[tuple[float, float]]] = {}
    for r in found:
        for j in range(len(r.index)):
            d = float(r.train[j] - r.rollout[j])
            moved = abs(math.exp(r.train[j]) - math.exp(r.rollout[j]))
            by_hand.setdefault(label(r, j), []).append((d, moved))
    full = [one for one in ours if one.n_tokens]
    names = sorted(one.label for one in full)
    yield exactly(part, f"{what}: slices", ", ".join(names), ", ".join(sorted(by_hand)))
    drift = math.fsum(abs(d) for rows in by_hand.values() for d, _ in rows)
    tokens = sum(map(len, by_hand.values()))
    told, wanted = [], []
    for one in full:
        rows = by_hand[one.label]
        told += [one.n_tokens, one.abs_log_ratio_mean, one.log_ratio_mean,
                 one.prob_abs_diff_mean, one.share_of_tokens, one.share_of_drift]  # fmt: skip
        sums = math.fsum(abs(d) for d, _ in rows)
        wanted += [len(rows), sums / len(rows), math.fsum(d for d, _ in rows) / len(rows),
                   math.fsum(m for _, m in rows) / len(rows), len(rows) / tokens,
                   sums / drift]  # fmt: skip
    yield near(part, f"{what}: counts, means and shares", told, wanted, rel=1e-9)

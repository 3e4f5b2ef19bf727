"""METRICS 4: the four pairings of two conventions, simulated, against expectations by enumeration.

An engine samples at T = .7 from logits over 2,000 tokens and records raw, scaled or truncated
logprobs; the trainer has the same logits with noise. The expectation of every number over what the
engine could have sampled is a sum over the vocabulary, which no sample enters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from driftgate.comparable import judge
from driftgate.mismatch import Bucket
from driftgate.trace import Comparable, Engine, Sampling, TraceMeta, Trainer
from science.by_hand import F64
from science.table import Row, exactly

__all__ = ["signatures"]

T, VOCAB, TOKENS, TOP_P = 0.7, 2000, 4000, 0.9
NOISE = 0.042
STANDARD_ERRORS = 5.0
"""Some twenty numbers are looked at: five are passed by chance once in 80,000 runs, and the seed is
fixed."""

PUBLISHED = {
    "engine scaled, trainer scaled": (-0.001, 0.0009, 1.00),
    "engine scaled, trainer at T = 1": (-0.130, 0.114, 0.79),
    "engine raw, trainer scaled": (0.127, 0.111, 1.24),
    "engine processed top-p, trainer scaled": (-0.062, 0.0035, 0.96),
}
"""mean D, k3 and slope of the table in METRICS 4. Its distribution of logits is not given."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """What both sides recorded of the sampled tokens, and what was to be expected of it."""

    train: F64
    rollout: F64
    expected: dict[str, float]


def log_softmax(z: F64) -> F64:
    """[n, V] nats."""
    z = z - z.max(-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(-1, keepdims=True)))


def truncated(lp: F64) -> F64:
    """[n, V] of the smallest set of tokens with at least ``TOP_P``, renormalised."""
    order = np.argsort(-lp, -1)
    mass = np.take_along_axis(np.exp(lp), order, -1)
    keep = np.empty(lp.shape, np.bool_)
    np.put_along_axis(keep, order, mass.cumsum(-1) - mass < TOP_P, -1)
    kept = np.where(keep, lp, -np.inf)
    return np.asarray(kept - np.log(np.exp(kept).sum(-1, keepdims=True)))


def simulate() -> dict[str, Pairing]:
    """The pairings, by name."""
    rng = np.random.default_rng(0)
    parts: dict[str, list[tuple[F64, F64, dict[str, float]]]] = {}
    for _ in range(TOKENS // 500):
        z = rng.normal(size=(500, VOCAB)) * rng.uniform(1, 9, (500, 1))
        noisy = z + rng.normal(0, NOISE, z.shape)
        raw, scaled, cut = log_softmax(z), log_softmax(z / T), truncated(log_softmax(z / T))
        one, hot = log_softmax(noisy), log_softmax(noisy / T)
        gumbel = rng.gumbel(size=z.shape)
        for name, train, rollout, density in (
            ("engine scaled, trainer scaled", hot, scaled, scaled),
            ("engine scaled, trainer at T = 1", one, scaled, scaled),
            ("engine raw, trainer scaled", hot, raw, scaled),
            ("engine raw, trainer at T = 1", one, raw, scaled),
            ("engine processed top-p, trainer scaled", hot, cut, cut),
            ("engine processed top-p, trainer at T = 1", one, cut, cut),
        ):
            token = (density + gumbel).argmax(-1)
            parts.setdefault(name, []).append(_one(train, rollout, density, token))
    return {name: _joined(found) for name, found in parts.items()}


def _one(
    train: F64, rollout: F64, density: F64, token: npt.NDArray[np.intp]
) -> tuple[F64, F64, dict[str, float]]:
    at = np.arange(len(token))
    p = np.exp(density)
    with np.errstate(invalid="ignore"):
        d = np.where(p > 0, train - rollout, 0.0)
    expected = {
        "log_ratio_mean": float((p * d).sum(-1).mean()),
        "kl_k3_rollout_train": float((p * (np.exp(d) - 1 - d)).sum(-1).mean()),
        "mean_weight_token": float((p * np.exp(d)).sum(-1).mean()),
    }
    return train[at, token], rollout[at, token], expected


def _joined(found: list[tuple[F64, F64, dict[str, float]]]) -> Pairing:
    names = found[0][2]
    return Pairing(
        np.concatenate([train for train, _, _ in found]),
        np.concatenate([rollout for _, rollout, _ in found]),
        {name: float(np.mean([one[2][name] for one in found])) for name in names},
    )


def signatures(part: str) -> Iterator[Row]:
    """Every pairing's numbers, and what is said of it."""
    found = simulate()
    for name, pairing in found.items():
        yield from _numbers(part, name, pairing)
    yield from _verdicts(part, found)


def _numbers(part: str, name: str, pairing: Pairing) -> Iterator[Row]:
    ours = Bucket.of(pairing.train, pairing.rollout).metrics()
    d = pairing.train - pairing.rollout
    each = {
        "log_ratio_mean": d,
        "kl_k3_rollout_train": np.exp(d) - 1 - d,
        "mean_weight_token": np.exp(d),
    }
    for metric, values in each.items():
        mine, wanted = ours[metric], pairing.expected[metric]
        assert mine is not None
        error = STANDARD_ERRORS * float(values.std()) / len(values) ** 0.5
        yield Row(part, f"{name}: {metric}", mine, wanted, abs(mine - wanted), error)
    if name not in PUBLISHED:
        return
    mean, k3, slope = PUBLISHED[name]
    for metric, published, tolerance in (
        ("log_ratio_mean", mean, 0.02),
        ("kl_k3_rollout_train", k3, max(0.25 * k3, 1e-4)),
        ("logodds_slope", slope, 0.02),
    ):
        mine = ours[metric]
        assert mine is not None
        what = f"{name}: {metric} as METRICS 4 publishes it"
        yield Row(part, what, mine, published, abs(mine - published), tolerance)


def _verdicts(part: str, found: dict[str, Pairing]) -> Iterator[Row]:
    """``declared`` by the engine, what it ``records`` in truth, and what must be said."""
    hot = Sampling(temperature=T)
    cases: tuple[tuple[str, str, Sampling, str, str], ...] = (
        ("processed_logprobs", "scaled", hot, "converted", "scored_at_temperature"),
        ("raw_logprobs", "raw", hot, "converted", "raw_logprobs_not_sampling_density"),
        ("raw_logprobs", "scaled", hot, "no", "logprob_convention_mismatch"),
        ("processed_logprobs", "raw", hot, "no", "logprob_convention_mismatch"),
        ("unknown", "scaled", hot, "converted", "logprobs_mode_inferred"),
        (
            "processed_logprobs",
            "processed top-p",
            Sampling(temperature=T, top_p=TOP_P),
            "no",
            "processed_truncation",
        ),
    )
    for declared, records, sampling, verdict, code in cases:
        said = _judged(found, declared, records, sampling)
        codes = [reason.code for reason in said.reasons]
        ours = f"{said.verdict}: {code if code in codes else ', '.join(codes)}"
        what = f"declares {declared}, records {records}"
        yield exactly(part, what, ours, f"{verdict}: {code}")


def _judged(
    found: dict[str, Pairing], declared: str, records: str, sampling: Sampling
) -> Comparable:
    one = found[f"engine {records}, trainer at T = 1"]
    hot = found[f"engine {records}, trainer scaled"]
    neutral = {"temperature": "1.0", "top_p": "1.0", "top_k": "0", "min_p": "0.0"}
    engine = Engine(
        name="vllm",
        version="0.29.0",
        model="m",
        logprobs_mode=declared,  # type: ignore[arg-type]
        settings={f"default_{name}": value for name, value in neutral.items()},
    )
    meta = TraceMeta(
        trace_id="c.0", call_id="c", trajectory="t", step=0, choice=0, api="chat", model="m",
        attribution="url", engine=engine, sampling=sampling, streamed=False, started_ns=0,
        ended_ns=1, weight_version="7",
    )  # fmt: skip
    trainer = Trainer(backend="reference", model="m", dtype="float32")
    return judge(
        meta,
        trainer,
        at_one=Bucket.of(one.train, one.rollout),
        at_requested=Bucket.of(hot.train, hot.rollout),
        trainer_weight_version="7",
    )

"""The estimators against exact divergences of categorical distributions, found by enumeration."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest

from driftgate.mismatch import Bucket

VOCAB = 50
TOTAL = 5000
F64 = npt.NDArray[np.float64]


def counts(seed: int) -> npt.NDArray[np.int64]:
    """[VOCAB] positive integers that sum to TOTAL: a distribution with exact fractions."""
    rng = np.random.default_rng(seed)
    out = 1 + rng.multinomial(TOTAL - VOCAB, rng.dirichlet(np.full(VOCAB, 2.0)))
    return np.asarray(out, dtype=np.int64)


Q, P = counts(1), counts(2)
ROLLOUT, TRAIN = (np.log(c / TOTAL) for c in (Q, P))


def exact() -> dict[str, float]:
    q, p = ([Fraction(int(c), TOTAL) for c in side] for side in (Q, P))
    pairs = list(zip(q, p, strict=True))

    def kl(a: list[Fraction], b: list[Fraction]) -> float:
        return math.fsum(float(x) * math.log(x / y) for x, y in zip(a, b, strict=True))

    middle = [(x + y) / 2 for x, y in pairs]
    return {
        "kl_k1_rollout_train": kl(q, p),
        "kl_k3_rollout_train": kl(q, p),
        "kl_train_rollout_is": kl(p, q),
        "js_is": (kl(q, middle) + kl(p, middle)) / 2,
        "tv_is": float(sum(abs(x - y) for x, y in pairs)) / 2,
        "chi2_token": float(sum(y * y / x for x, y in pairs)) - 1,
        "mean_weight_token": 1.0,
        "ess_kish_token": 1 / float(sum(y * y / x for x, y in pairs)),
    }


EXACT = exact()


@pytest.mark.parametrize("name", sorted(EXACT))
def test_expectation_by_enumeration_is_exact(name: str) -> None:
    """A sequence that holds token i exactly q_i * TOTAL times: the mean is the expectation."""
    tokens = np.repeat(np.arange(VOCAB), Q)
    values = Bucket.of(TRAIN[tokens], ROLLOUT[tokens]).metrics()
    assert values[name] == pytest.approx(EXACT[name], rel=1e-12, abs=1e-12)


def per_token(name: str, d: F64) -> F64:
    """[n] what each token adds to the mean, for its standard error."""
    forms = {
        "kl_k1_rollout_train": -d,
        "kl_k3_rollout_train": np.exp(d) - 1 - d,
        "kl_train_rollout_is": np.exp(d) * d - np.exp(d) + 1,
        "js_is": 0.5 * (np.exp(d) * d - (1 + np.exp(d)) * np.log((1 + np.exp(d)) / 2)),
        "tv_is": np.abs(np.exp(d) - 1) / 2,
        "chi2_token": np.exp(2 * d) - 1,
        "mean_weight_token": np.exp(d),
    }
    return np.asarray(forms[name])


@pytest.mark.parametrize("name", sorted(set(EXACT) - {"ess_kish_token"}))
def test_samples_converge_to_the_divergence(name: str) -> None:
    tokens = np.random.default_rng(7).choice(VOCAB, size=200_000, p=Q / TOTAL)
    value = Bucket.of(TRAIN[tokens], ROLLOUT[tokens]).metrics()[name]
    spread = per_token(name, (TRAIN - ROLLOUT)[tokens]).std()
    assert value == pytest.approx(EXACT[name], abs=4 * spread / math.sqrt(200_000))


def test_standard_error_of_the_mean_weight_covers() -> None:
    """The test statistic of METRICS 4 has unit spread when the pairing is right."""
    rng = np.random.default_rng(11)
    z = []
    for _ in range(400):
        tokens = rng.choice(VOCAB, size=500, p=Q / TOTAL)
        values = Bucket.of(TRAIN[tokens], ROLLOUT[tokens]).metrics()
        mean, error = values["mean_weight_token"], values["mean_weight_token_se"]
        assert mean is not None
        assert error is not None
        z.append((mean - 1.0) / error)
    assert np.std(z) == pytest.approx(1.0, abs=0.12)
    assert np.mean(z) == pytest.approx(0.0, abs=0.2)


def test_k3_minus_k1_is_the_mean_weight_minus_one() -> None:
    tokens = np.random.default_rng(8).choice(VOCAB, size=1000, p=Q / TOTAL)
    values = Bucket.of(TRAIN[tokens], ROLLOUT[tokens]).metrics()
    k1, k3, mean = (
        values[n] for n in ("kl_k1_rollout_train", "kl_k3_rollout_train", "mean_weight_token")
    )
    assert k1 is not None
    assert k3 is not None
    assert mean is not None
    assert k3 - k1 == pytest.approx(mean - 1.0, abs=1e-13)

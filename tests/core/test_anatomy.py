"""Where drift sits: against plain formulas, and on runs whose growth is known."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean, stdev

import numpy as np
import pytest

from driftgate import anatomy
from driftgate.anatomy import Growth, Response
from tests.core.planted import F64, noise, responses, run, scored


def of(*parts: F64) -> list[Response]:
    traces = run(len(parts), len(parts[0]))
    return responses(traces, [scored(t, d) for t, d in zip(traces, parts, strict=True)])


def growth(*parts: F64) -> Growth:
    return anatomy.growth(of(*parts))


def test_each_scale_is_the_spread_of_sums_over_blocks() -> None:
    found = of(noise(0, 70, 0.1), noise(1, 70, 0.1))
    for scale in anatomy.growth(found).scales:
        sums = [
            math.fsum(d[at : at + scale.length].tolist())
            for d in (response.d for response in found)
            for at in range(0, len(d) - scale.length + 1, scale.length)
        ]
        assert scale.blocks == len(sums)
        assert scale.log_ratio_sum_std == pytest.approx(stdev(sums), rel=1e-12)
    assert [scale.length for scale in anatomy.growth(found).scales] == [1, 2, 4, 8]


def test_independent_noise_grows_as_the_square_root() -> None:
    found = growth(noise(1, 4000, 0.05), noise(2, 4000, 0.05))
    assert found.exponent == pytest.approx(0.5, abs=0.06)
    assert found.compounds is False
    assert found.exponent_if_independent is not None
    low, high = found.exponent_if_independent
    assert low < 0.5 < high
    assert found.bias_exceeds_noise_after is None


def test_drift_that_carries_on_compounds() -> None:
    """Each token keeps .9 of the drift before it."""
    steps = noise(3, 4000, 0.05)
    carried = np.zeros(4000)
    for at in range(1, 4000):
        carried[at] = 0.9 * carried[at - 1] + steps[at]
    found = growth(carried * 0.3)
    assert found.compounds is True
    assert found.exponent is not None
    assert found.exponent > 0.65


def unlike(calls: float, answers: float, *, offset: float = 0.0) -> Growth:
    """40 calls of 24 tokens and 4 answers of 400, each with its own width of independent noise;
    ``offset``: sigma of what the tokens of one response share, in units of its width."""
    rng = np.random.default_rng(8)
    parts = [
        sigma * (rng.normal(0.0, 1.0, size) + offset * rng.normal())
        for sigma, size, count in ((calls, 24, 40), (answers, 400, 4))
        for _ in range(count)
    ]
    traces = [run(1, len(d), seed=n)[0] for n, d in enumerate(parts)]
    found = responses(traces, [scored(t, d) for t, d in zip(traces, parts, strict=True)])
    return anatomy.growth(found)


@pytest.mark.parametrize(("calls", "answers"), [(0.005, 0.04), (0.04, 0.005)])
def test_answers_of_different_noise_do_not_compound_by_it(calls: float, answers: float) -> None:
    """Long blocks are of the long answers alone."""
    found = unlike(calls, answers)
    assert found.exponent == pytest.approx(0.5, abs=0.06)
    assert found.compounds is False
    assert found.exponent_if_independent is not None
    low, high = found.exponent_if_independent
    assert low < 0.5 < high


def test_what_a_response_shares_compounds_whatever_its_noise() -> None:
    found = unlike(0.005, 0.04, offset=1.0)
    assert found.compounds is True
    assert found.exponent is not None
    assert found.exponent > 0.75


def test_drift_that_takes_itself_back_does_not() -> None:
    found = growth(np.diff(noise(4, 4001, 0.05)))
    assert found.exponent is not None
    assert found.exponent < 0.3
    assert found.compounds is False


def test_a_bias_overtakes_the_noise_at_the_squared_ratio() -> None:
    found = growth(noise(5, 2000, 0.1) - 0.02)
    (d,) = (response.d for response in of(noise(5, 2000, 0.1) - 0.02))
    mean, spread = fmean(d.tolist()), stdev(d.tolist())
    assert found.bias_per_token == pytest.approx(mean)
    assert found.bias_z == pytest.approx(mean / (spread / math.sqrt(2000)))
    assert found.bias_exceeds_noise_after == pytest.approx((spread / mean) ** 2)


@pytest.mark.parametrize(("size", "why"), [(10, "10 tokens"), (200, "same log ratio")])
def test_no_exponent_without_data(size: int, why: str) -> None:
    traces = run(1, size)
    found = anatomy.growth(responses(traces, [scored(traces[0], np.zeros(size))]))
    assert found.exponent is None
    assert why in (found.why_null or "")


def test_slices_partition_the_tokens_and_the_drift() -> None:
    found = of(noise(6, 100, 0.1), noise(7, 100, 0.3), noise(8, 100, 0.1))
    total = math.fsum(abs(x) for response in found for x in response.d.tolist())
    for slices in (
        anatomy.by_step(found),
        anatomy.by_position(found),
        anatomy.by_probability(found),
        anatomy.by_class(found),
    ):
        assert sum(part.n_tokens for part in slices) == 300
        assert sum(part.share_of_tokens for part in slices) == pytest.approx(1.0)
        assert sum(part.share_of_drift or 0.0 for part in slices) == pytest.approx(1.0)
    second = anatomy.by_step(found)[1]
    drift = [abs(x) for x in found[1].d.tolist()]
    assert second.abs_log_ratio_mean == pytest.approx(fmean(drift))
    assert second.share_of_drift == pytest.approx(math.fsum(drift) / total)


def test_probability_bins_hold_the_tokens_of_their_probability() -> None:
    found = of(noise(9, 500, 0.1))
    edges = anatomy.PROBABILITY_EDGES
    p, d = np.exp(found[0].rollout).tolist(), found[0].d.tolist()
    for part, (low, high) in zip(anatomy.by_probability(found), pairwise(edges), strict=True):
        inside = [abs(x) for x, q in zip(d, p, strict=True) if low <= q < high]
        assert part.n_tokens == len(inside)
        if inside:
            assert part.abs_log_ratio_mean == pytest.approx(fmean(inside))


def test_positions_are_absolute() -> None:
    found = of(noise(10, 100, 0.1), noise(11, 100, 0.1))
    counts: dict[str, int] = {}
    for response in found:
        assert response.prompt_len is not None
        for j in range(100):
            octave = (response.prompt_len + j).bit_length() - 1
            label = f"{2**octave}..{2 ** (octave + 1) - 1}"
            counts[label] = counts.get(label, 0) + 1
    assert {part.label: part.n_tokens for part in anatomy.by_position(found)} == counts


def test_the_first_divergent_token_is_the_first_by_step_and_not_the_worst() -> None:
    parts = [noise(n, 100, 0.01) for n in range(3)]
    parts[1][40] = -0.75
    parts[2][3] = -2.0
    found = of(*parts)
    first, worst = anatomy.first_divergent(found[::-1]), anatomy.worst(found)
    assert first is not None
    assert worst is not None
    assert (first.step, first.token_index) == (1, 40)
    assert (worst.step, worst.token_index) == (2, 3)
    assert first.log_ratio == pytest.approx(-0.75, abs=1e-6)
    assert first.position == (found[1].prompt_len or 0) + 40
    assert first.text == f" w{first.token_id}"


def test_no_token_diverges_below_a_factor_of_two() -> None:
    found = of(np.full(50, -0.69))
    assert anatomy.first_divergent(found) is None


def test_bad_logprobs_are_left_out() -> None:
    d = noise(12, 50, 0.01)
    d[3], d[4] = math.nan, -math.inf
    (response,) = of(d)
    assert response.index.tolist() == [j for j in range(50) if j not in (3, 4)]
    traces = run(1, 50)
    assert Response.of(traces[0], scored(traces[0], np.full(50, math.nan))) is None

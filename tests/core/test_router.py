"""Router metrics against Python sets, cell by cell."""

from __future__ import annotations

import math
from functools import reduce
from statistics import fmean
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftgate import router as router_module
from driftgate.glossary import ROUTER_METRICS
from driftgate.router import (
    NEAR_TIE_MARGIN,
    RouterBucket,
    random_zero_overlap,
    route_shift,
)

Ids = npt.NDArray[Any]


def random_routes(rows: int, layers: int, experts: int, k: int, seed: int = 0) -> Ids:
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((rows, layers, experts)), axis=-1)
    return order[..., :k].astype(np.uint8)


def drifted(routes: Ids, experts: int, seed: int = 1) -> Ids:
    """A tenth of the cells with one expert exchanged for one that is not in the set."""
    rng = np.random.default_rng(seed)
    out = routes.copy()
    for t, layer in np.argwhere(rng.random(routes.shape[:2]) < 0.1):
        free = sorted(set(range(experts)) - set(routes[t, layer].tolist()))
        out[t, layer, rng.integers(routes.shape[2])] = rng.choice(free)
    return out


def cells(a: Ids, b: Ids) -> list[tuple[int, int, set[int], set[int]]]:
    """(token, layer, A, B) of valid cells, by definition."""
    out = []
    for t in range(a.shape[0]):
        for layer in range(a.shape[1]):
            sides = [x[t, layer].tolist() for x in (a, b)]
            if all(len(set(s)) == len(s) and min(s) >= 0 for s in sides):
                out.append((t, layer, set(sides[0]), set(sides[1])))
    return out


def test_every_metric_equals_its_definition_on_sets() -> None:
    a = random_routes(60, 5, 16, 4)
    b = drifted(a, 16)
    b[7, 2] = 0  # padding
    b[9, 3] = [1, 1, 2, 3]  # an expert twice
    found = cells(a, b)
    k, tokens = 4, range(60)
    values = RouterBucket.of(a, b, rollout_ordered=True, train_ordered=True).metrics()
    per_token = [sum(x != y for t, _, x, y in found if t == token) for token in tokens]
    expected = {
        "n_cells": 298,
        "n_rows": 60,
        "n_excluded": 2,
        "n_excluded_all_zero": 1,
        "n_excluded_duplicate": 1,
        "n_excluded_out_of_range": 0,
        "router_set_disagree_rate": fmean(x != y for _, _, x, y in found),
        "router_expert_miss_rate": fmean(1 - len(x & y) / k for _, _, x, y in found),
        "router_jaccard_mean": fmean(len(x & y) / len(x | y) for _, _, x, y in found),
        "router_zero_overlap_rate": fmean(not x & y for _, _, x, y in found),
        "router_token_any_layer_rate": fmean(n > 0 for n in per_token),
        "router_layers_disagree_per_token": fmean(per_token),
        "router_top1_flip_rate": fmean(a[t, m, 0] != b[t, m, 0] for t, m, _, _ in found),
        "router_slot0_flip_rate": fmean(a[t, m, 0] != b[t, m, 0] for t, m, _, _ in found),
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    by_layer = [fmean(x != y for _, m, x, y in found if m == layer) for layer in range(5)]
    assert values["router_set_disagree_rate_by_layer"] == pytest.approx(by_layer, rel=1e-12)
    assert values["router_worst_layer"] == int(np.argmax(by_layer))


def test_position_bins_are_powers_of_two() -> None:
    a = random_routes(10, 2, 8, 2)
    b = a.copy()
    b[3:7] = (a[3:7].astype(int) + 1) % 8  # positions 3..6 are bin 2
    values = RouterBucket.of(a, b).metrics()
    assert values["router_set_disagree_rate_by_position"] == [0.0, 0.0, 1.0, 0.0]


def test_same_sets_in_another_order_agree_and_only_the_legacy_number_moves() -> None:
    a = random_routes(50, 4, 32, 4)
    bucket = RouterBucket.of(a, a[..., ::-1], rollout_ordered=False, train_ordered=True)
    values = bucket.metrics()
    assert values["router_set_disagree_rate"] == values["router_expert_miss_rate"] == 0.0
    assert values["router_slot0_flip_rate"] == 1.0
    assert values["router_top1_flip_rate"] is None
    assert bucket.undefined()["router_top1_flip_rate"].endswith(": rollout")


def test_one_unordered_sequence_takes_the_top1_rate_from_the_merged_bucket() -> None:
    a = random_routes(5, 2, 8, 2)
    ordered = RouterBucket.of(a, a, rollout_ordered=True, train_ordered=True)
    assert ordered.metrics()["router_top1_flip_rate"] == 0.0
    merged = ordered.merge(RouterBucket.of(a, a, rollout_ordered=True, train_ordered=False))
    assert merged.metrics()["router_top1_flip_rate"] is None
    assert merged.undefined()["router_top1_flip_rate"].endswith(": train")


@pytest.mark.parametrize("sentinel", [-1, 16])
def test_sentinel_rows_are_excluded_on_either_side(sentinel: int) -> None:
    a = random_routes(6, 2, 16, 4).astype(np.int16)
    b = a.copy()
    a[5], b[4, 0, 1] = sentinel, sentinel
    values = RouterBucket.of(a, b, num_experts=16).metrics()
    assert (values["n_cells"], values["n_excluded_out_of_range"], values["n_rows"]) == (9, 3, 5)
    assert values["router_set_disagree_rate"] == 0.0


def test_expert_zero_is_an_expert_when_k_is_1() -> None:
    a = np.zeros((4, 1, 1), np.uint8)
    assert RouterBucket.of(a, a).metrics()["n_cells"] == 4


def test_dense_layers_are_cut_by_their_numbers() -> None:
    moe = random_routes(6, 2, 16, 4)
    full = np.zeros((6, 4, 4), np.uint8)
    full[:, [1, 3]] = moe
    values = RouterBucket.of(full, moe, layer_ids=[1, 3]).metrics()
    assert (values["n_cells"], values["n_excluded"], values["layers"]) == (12, 0, [1, 3])
    with pytest.raises(ValueError, match="3 layers"):
        RouterBucket.of(full[:, :3], moe, layer_ids=[1, 3])


def test_margins_split_disagreements() -> None:
    a = random_routes(4, 1, 8, 2)
    b = a.copy()
    b[:2] = (a[:2].astype(int) + 1) % 8
    margins = np.array([[0.0], [1.0], [NEAR_TIE_MARGIN / 2], [math.nan]], np.float32)
    values = RouterBucket.of(a, b, margins=margins).metrics()
    assert values["router_flip_margin_mean"] == 0.5
    assert values["router_flip_margin_near_tie_frac"] == 0.5
    assert values["router_flip_margin_near_tie_rate"] == 0.5
    assert values["router_flip_margin_clear_rate"] == 1.0
    assert (values["router_tie_count"], values["router_near_tie_count"]) == (1, 2)
    assert RouterBucket.of(a, b).undefined()["router_tie_count"] == "the trainer gave no margins"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=40)
def test_merge_of_responses_is_exact_in_any_order(lengths: list[int], seed: int) -> None:
    parts = []
    for i, rows in enumerate(lengths):
        a = random_routes(rows, 3, 8, 2, seed + i)
        parts.append(RouterBucket.of(a, drifted(a, 8, seed)))
    forward = reduce(RouterBucket.merge, parts, RouterBucket())
    assert forward == reduce(lambda acc, b: b.merge(acc), reversed(parts), RouterBucket())
    assert forward.n_cells == 3 * sum(lengths)
    assert msgspec.json.decode(msgspec.json.encode(forward), type=RouterBucket) == forward


def test_chunks_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    a = random_routes(101, 3, 16, 4)
    b, margins = drifted(a, 16), np.random.default_rng(0).random((101, 3), np.float32)
    whole = RouterBucket.of(a, b, margins=margins)
    monkeypatch.setattr(router_module, "CHUNK_CELLS", 30)
    parts = RouterBucket.of(a, b, margins=margins)
    assert parts.margin_flips_sum == pytest.approx(whole.margin_flips_sum)
    parts.margin_flips_sum = whole.margin_flips_sum
    assert parts == whole


def test_buckets_of_different_models_do_not_merge() -> None:
    a, b = random_routes(3, 2, 8, 2), random_routes(3, 3, 8, 2)
    with pytest.raises(ValueError, match="different models"):
        RouterBucket.of(a, a).merge(RouterBucket.of(b, b))


def test_shapes_that_disagree_are_refused() -> None:
    a = random_routes(4, 2, 8, 2)
    with pytest.raises(ValueError, match="R rows"):
        RouterBucket.of(a, a[1:])
    with pytest.raises(ValueError, match="integers"):
        RouterBucket.of(a.astype(float), a)


def test_the_empty_bucket_says_why_it_has_no_rates() -> None:
    bucket = RouterBucket()
    assert set(bucket.metrics()) == set(ROUTER_METRICS)
    assert bucket.undefined()["router_set_disagree_rate"] == "no valid cell (0 excluded)"


@pytest.mark.parametrize(("experts", "k"), [(16, 4), (128, 8), (8, 2), (64, 1)])
def test_zero_overlap_of_unrelated_rows_is_as_expected(experts: int, k: int) -> None:
    a, b = random_routes(2000, 2, experts, k, 0), random_routes(2000, 2, experts, k, 1)
    value = RouterBucket.of(a, b).metrics()["router_zero_overlap_rate"]
    expected = random_zero_overlap(experts, k)
    assert expected == pytest.approx(
        math.prod((experts - k - i) / (experts - i) for i in range(k)), rel=1e-12
    )
    assert value == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 4000))


def test_zero_overlap_is_impossible_when_sets_must_meet() -> None:
    assert random_zero_overlap(4, 3) == 0.0


@pytest.mark.parametrize("shift", [-2, -1, 1, 2])
def test_a_shift_is_found_and_signed(shift: int) -> None:
    train = random_routes(40, 4, 16, 4)
    rollout = np.roll(drifted(train, 16), shift, axis=0)
    found = route_shift(rollout, train)
    assert found is not None
    assert found.shift == shift
    assert found.miss_rate_shifted < 0.05 < found.miss_rate_unshifted
    assert found.zero_overlap_rate == pytest.approx(found.zero_overlap_random, abs=0.15)


def test_aligned_or_unrelated_routes_have_no_shift() -> None:
    train = random_routes(40, 4, 16, 4)
    assert route_shift(drifted(train, 16), train) is None
    assert route_shift(random_routes(40, 4, 16, 4, 5), train) is None
    assert route_shift(train[1:6], train[:5]) is None, "too few rows to say"


def test_the_glossary_names_exactly_the_metrics() -> None:
    a = random_routes(3, 2, 8, 2)
    assert set(RouterBucket.of(a, a).metrics()) == set(ROUTER_METRICS)

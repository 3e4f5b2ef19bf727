"""Deltas are lossless whatever changed between a trace and its base, and small where little did."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from driftgate.errors import FormatError
from driftgate.storage.codec import unpack_payload
from driftgate.storage.delta import MAX_DEPTH, Delta, StoredTrace, diff, resolve
from driftgate.storage.records import decode_trace, encode_trace, twin_key
from driftgate.testing.traces import assert_same_trace, make_trace, make_trajectory
from driftgate.trace import Sampling, Trace


def stored_again(stored: StoredTrace) -> StoredTrace:
    """Through bytes."""
    return decode_trace(unpack_payload(encode_trace(stored)))


def through(trace: Trace, base: Trace | None) -> StoredTrace:
    """``trace`` as stored against ``base``, after checking that it comes back."""
    stored = stored_again(diff(trace, base))
    assert_same_trace(resolve([stored], base if stored.head.delta else None), trace)
    return stored


def any_ids() -> st.SearchStrategy[Any]:
    # two values only: shared prefixes of every length come up
    return st.none() | hnp.arrays(np.int32, st.integers(0, 8), elements=st.integers(0, 1))


@st.composite
def any_trace(draw: st.DrawFn) -> Trace:
    """Shapes that need not fit each other: a trace is stored as the engine gave it."""
    route_shape = st.tuples(st.integers(0, 8), st.integers(1, 2), st.integers(1, 2))
    dtypes: Any = st.sampled_from([np.dtype("u1"), np.dtype("<u2")])
    routes: Any = hnp.arrays(dtypes, route_shape, elements=st.integers(0, 1))
    floats = hnp.arrays(np.float32, st.integers(0, 5), elements=st.floats(width=32))
    return replace(
        make_trace(),
        prompt_ids=draw(any_ids()),
        response_ids=draw(any_ids()),
        logprobs=draw(st.none() | floats),
        routes=draw(st.none() | routes),
        token_offsets=draw(any_ids()),
        request=draw(st.text("ab", max_size=8)).encode(),
    )


@given(any_trace(), any_trace())
def test_any_trace_against_any_base(trace: Trace, base: Trace) -> None:
    through(trace, base)
    through(trace, None)


@given(st.lists(any_trace(), min_size=2, max_size=6), st.integers(0, 5))
def test_any_chain(traces: list[Trace], cached: int) -> None:
    chain: list[StoredTrace] = []
    for i, trace in enumerate(traces):
        base = traces[i - 1] if i else None
        stored = stored_again(diff(trace, base, base_depth=len(chain)))
        chain = [stored, *chain] if stored.head.delta else [stored]
        assert_same_trace(resolve(chain), trace)
        if cached < len(chain) - 1:  # as when the cache has a base further down
            assert_same_trace(resolve(chain[: cached + 1], traces[i - cached - 1]), trace)


def test_the_next_step_stores_its_new_tokens_and_rows_only() -> None:
    first, second = make_trajectory(steps=2, prompt=20, response=30)
    stored = through(second, first)
    assert stored.head.delta is not None
    assert (stored.head.delta.ids, stored.head.delta.rows) == (50, 49)
    assert stored.ids.size == 50
    assert stored.routes is not None
    assert len(stored.routes) == 50  # P+R-1 = 99 rows, 49 of them the base's
    assert len(stored.request) == len(second.request) - len(first.request)
    assert stored.patch_gaps is None


def test_two_samples_of_one_call_share_prompt_and_request() -> None:
    one = make_trace(n=2, prompt=40)
    assert one.prompt_ids is not None
    assert one.routes is not None
    two = make_trace(n=2, choice=1, prompt=40)
    assert two.routes is not None
    routes = np.concatenate([one.routes[:39], two.routes[39:]])
    two = replace(two, prompt_ids=one.prompt_ids, routes=routes, request=one.request)
    stored = through(two, one)
    assert stored.head.delta is not None
    assert stored.head.delta.rows >= 39
    assert stored.request == b""


def changed_rows(trace: Trace, cells: list[tuple[int, int]]) -> Trace:
    assert trace.routes is not None
    routes = trace.routes.copy()
    for row, layer in cells:
        routes[row, layer] = routes[row, layer][::-1] + 1
    return replace(trace, routes=routes)


def test_cells_that_changed_in_the_shared_prefix_are_patched() -> None:
    first, second = make_trajectory(steps=2, prompt=20, response=30)
    stored = through(changed_rows(second, [(0, 0), (3, 2), (48, 3)]), first)
    assert stored.patch_gaps is not None
    assert np.cumsum(stored.patch_gaps).tolist() == [0, 3 * 4 + 2, 48 * 4 + 3]
    assert stored.patch_cells is not None
    assert stored.patch_cells.shape == (3, 4)


def test_patches_of_several_links_are_applied_in_order() -> None:
    first, second, third = make_trajectory(steps=3)
    second = changed_rows(second, [(0, 0), (5, 1)])
    third = changed_rows(third, [(0, 0), (2, 2)])
    chain = [diff(third, second), diff(second, first), diff(first, None)]
    assert_same_trace(resolve(chain), third)


def test_routes_that_mostly_differ_are_stored_whole() -> None:
    first, second = make_trajectory(steps=2, prompt=200)
    assert second.routes is not None
    stored = through(replace(second, routes=(second.routes ^ 1).astype(np.uint8)), first)
    assert stored.routes is not None
    assert len(stored.routes) == len(second.routes)


def test_a_broken_prefix_is_a_full_record() -> None:
    assert through(make_trace(seed=1), make_trace(seed=2)).head.delta is None


def test_a_chain_ends_at_its_greatest_depth() -> None:
    first, second = make_trajectory(steps=2)
    assert diff(second, first, base_depth=MAX_DEPTH - 1).head.depth == MAX_DEPTH
    assert diff(second, first, base_depth=MAX_DEPTH).head.delta is None


def test_non_finite_logprobs_keep_their_bits() -> None:
    odd = np.array([0x7FC00001, 0xFF800000, 0x7F800000, 0x80000000, 0xFFC0ABCD], "<u4")
    through(replace(make_trace(), logprobs=odd.view(np.float32)), None)


@pytest.mark.parametrize(
    "lie",
    [
        {"ids": 10_000_000_000},
        {"ids": -1},
        {"rows": 10_000_000_000},
        {"rows": 10_000},
        {"rows": -1},
        {"request_prefix": 10_000},
        {"request_suffix": -1},
    ],
)
def test_a_delta_that_takes_more_than_its_base_has_is_refused(lie: dict[str, int]) -> None:
    first, second = make_trajectory(steps=2)
    stored = diff(second, first)
    assert stored.head.delta is not None
    delta: Delta = msgspec.structs.replace(stored.head.delta, **lie)
    ids = stored.head.delta.ids
    grown = msgspec.structs.replace(
        stored.head, delta=delta, prompt_len=(stored.head.prompt_len or 0) + delta.ids - ids
    )
    with pytest.raises(FormatError):
        resolve([replace(stored, head=grown)], first)


def test_routes_wider_than_memory_are_refused_before_they_are_allocated() -> None:
    first, second = make_trajectory(steps=2)
    stored = diff(second, first)
    assert stored.head.delta is not None
    head = msgspec.structs.replace(
        stored.head, delta=msgspec.structs.replace(stored.head.delta, rows=1 << 24)
    )
    wide = np.empty((0, 100_000, 1000), np.uint8)
    with pytest.raises(FormatError, match="routes of more than"):
        resolve([replace(stored, head=head, routes=wide)], first)


def test_patches_outside_the_routes_are_refused() -> None:
    first, second = make_trajectory(steps=2)
    stored = diff(changed_rows(second, [(0, 0)]), first)
    with pytest.raises(FormatError, match="patches"):
        resolve([replace(stored, patch_gaps=np.array([-1], np.int32))], first)


def test_a_delta_without_its_base_is_refused() -> None:
    first, second = make_trajectory(steps=2)
    with pytest.raises(FormatError, match="without its base"):
        resolve([diff(second, first)])


def test_arrays_of_another_dtype_are_refused() -> None:
    trace = make_trace()
    assert trace.prompt_ids is not None
    assert trace.logprobs is not None
    wide: Any = trace.prompt_ids.astype(np.int64)
    double: Any = trace.logprobs.astype(np.float64)
    for bad in (replace(trace, prompt_ids=wide), replace(trace, logprobs=double)):
        with pytest.raises(ValueError, match="must be"):
            encode_trace(diff(bad, None))


def test_twin_key_names_prompt_sampling_choice_and_model() -> None:
    one, again = make_trace(), make_trace(call_id="other")
    assert twin_key(one) is not None
    assert twin_key(one) == twin_key(again)
    others = [
        make_trace(seed=1),
        make_trace(choice=1),
        make_trace(model="other"),
        make_trace(sampling=Sampling(temperature=0.5, seed=7)),
    ]
    keys = {twin_key(replace(other, prompt_ids=one.prompt_ids)) for other in others}
    assert len({twin_key(one), *keys}) == 5


def test_no_twin_without_a_seed_or_a_prompt() -> None:
    assert twin_key(make_trace(sampling=Sampling(temperature=1.0))) is None
    assert twin_key(replace(make_trace(), prompt_ids=None)) is None

"""Assembly against brute force: every trace once, in the fewest forwards, at the right places."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftgate.teacher.sequences import Sequence, assemble
from driftgate.trace import Trace

MakeTrace = Callable[..., Trace]
Pair = tuple[list[int], list[int]]

tokens = st.integers(0, 2)
"""Three tokens, so that equal and extending inputs are common."""
pairs = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, min_size=1, max_size=4)),
    min_size=1,
    max_size=8,
)


def fed(pair: Pair) -> list[int]:
    return [*pair[0], *pair[1]][:-1]


def fewest(given_pairs: list[Pair]) -> int:
    """Inputs that are no proper prefix of another, counted once each."""
    inputs = {tuple(fed(pair)) for pair in given_pairs}
    return sum(
        not any(other != one and other[: len(one)] == one for other in inputs) for one in inputs
    )


@given(given_pairs=pairs)
def test_each_trace_is_scored_once_at_its_place(
    make_trace: MakeTrace, given_pairs: list[Pair]
) -> None:
    traces = [make_trace(str(n), *pair) for n, pair in enumerate(given_pairs)]
    sequences = assemble(traces)
    assert len(sequences) == fewest(given_pairs)
    placed = [part.trace_id for sequence in sequences for part in sequence.slices]
    assert sorted(placed) == sorted(trace.meta.trace_id for trace in traces)
    by_id = {trace.meta.trace_id: pair for trace, pair in zip(traces, given_pairs, strict=True)}
    for sequence in sequences:
        ids = sequence.ids.tolist()
        for part in sequence.slices:
            prompt, response = by_id[part.trace_id]
            assert part.prompt_len == len(prompt)
            assert part.response_ids.tolist() == response
            assert ids[: part.last] == fed((prompt, response))
            assert part.one_pass == (ids != fed((prompt, response)) or is_second(sequence, part))


def is_second(sequence: Sequence, part: object) -> bool:
    """Of traces with one input, all but the one whose own forward it is count as one pass."""
    heads = [other for other in sequence.slices if not other.one_pass]
    assert len(heads) == 1
    return part is not heads[0]


def test_turns_that_extend_are_one_forward(make_trace: MakeTrace) -> None:
    first = make_trace("a", [1, 2], [3, 4])
    second = make_trace("b", [1, 2, 3, 4, 5], [6, 7], step=1)
    (sequence,) = assemble([first, second])
    assert sequence.ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert [(part.first, part.last) for part in sequence.slices] == [(1, 3), (4, 6)]
    assert [part.one_pass for part in sequence.slices] == [True, False]


def test_a_changed_history_is_a_forward_of_its_own(make_trace: MakeTrace) -> None:
    first = make_trace("a", [1, 2], [3, 4])
    edited = make_trace("b", [1, 2, 9, 4, 5], [6], step=1)
    assert [len(sequence.slices) for sequence in assemble([first, edited])] == [1, 1]


def test_a_branch_is_scored_in_one_of_its_children(make_trace: MakeTrace) -> None:
    root = make_trace("root", [1], [2])
    left = make_trace("left", [1, 2, 3], [4], step=1)
    right = make_trace("right", [1, 2, 5], [6], step=1)
    sequences = assemble([root, left, right])
    assert sorted(len(sequence.slices) for sequence in sequences) == [1, 2]


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [(None, None), (1.0, None), (0.0, None), (0.7, 0.7), (0.001, 0.01), (1e-7, 0.01)],
)
def test_a_second_temperature_only_where_there_is_one(
    make_trace: MakeTrace, asked: float | None, wanted: float | None
) -> None:
    (sequence,) = assemble([make_trace("a", [1], [2], temperature=asked)])
    assert sequence.slices[0].temperature == wanted


def test_a_thousand_turns_are_quick(make_trace: MakeTrace) -> None:
    turns, new = 1000, 24
    ids = np.arange(turns * new + 1, dtype=np.int32)
    traces = [
        make_trace(str(n), ids[: n * new + 8], ids[n * new + 8 : (n + 1) * new], step=n)
        for n in range(turns)
    ]
    started = time.perf_counter()
    (sequence,) = assemble(traces)
    assert len(sequence.slices) == turns
    assert time.perf_counter() - started < 10.0, "0.1 s when quiet; quadratic code takes minutes"


def test_a_trace_without_logprobs_is_refused(make_trace: MakeTrace) -> None:
    with pytest.raises(ValueError, match=r"a\.0 has no prompt"):
        assemble([make_trace("a", [1], [2, 3], logprobs=[-1.0])])

"""Assembly against brute force: every sampled token once, at its place, with its route."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given

from driftgate.samples import Sample, Span, assemble, lines
from driftgate.testing.traces import make_trace, make_trajectory
from driftgate.testing.trajectories import runs
from driftgate.trace import LogprobsMode, Trace


def full(trace: Trace) -> list[int]:
    assert trace.prompt_ids is not None
    assert trace.response_ids is not None
    return [*trace.prompt_ids.tolist(), *trace.response_ids.tolist()]


def prompt(trace: Trace) -> list[int]:
    assert trace.prompt_ids is not None
    return list(map(int, trace.prompt_ids))


def joined(traces: list[Trace]) -> list[tuple[list[Trace], Sample]]:
    found = lines([(t.prompt_ids, t.response_ids) for t in traces])  # type: ignore[misc]
    return [
        ([traces[i] for i in line], assemble((traces[i] for i in line), reward=None))
        for line in found
    ]


def longest_begun(trace: Trace, traces: list[Trace]) -> list[int] | None:
    """The longest call whose tokens the prompt begins with, by trying all."""
    fits = [full(t) for t in traces if prompt(trace)[: len(full(t))] == full(t)]
    return max(fits, key=len, default=None)


@given(traces=runs())
def test_every_trace_is_in_one_line_behind_the_longest_call_it_continues(
    traces: list[Trace],
) -> None:
    found = lines([(t.prompt_ids, t.response_ids) for t in traces])  # type: ignore[misc]
    assert sorted(i for line in found for i in line) == list(range(len(traces)))
    for line in found:
        for before, after in pairwise(line):
            assert longest_begun(traces[after], traces) == full(traces[before])
    continued = {tuple(b) for t in traces if (b := longest_begun(t, traces)) is not None}
    assert len(found) == len(traces) - len(continued)


@given(traces=runs())
def test_each_sampled_token_is_masked_once_with_its_logprob(traces: list[Trace]) -> None:
    seen = []
    for line, sample in joined(traces):
        assert sample.tokens.tolist() == full(line[-1])
        for position in np.flatnonzero(sample.mask).tolist():
            (owner,) = [t for t in line if len(prompt(t)) <= position < len(full(t))]
            assert owner.logprobs is not None
            j = position - len(prompt(owner))
            assert sample.tokens[position] == full(owner)[position]
            assert sample.logprobs[position] == owner.logprobs[j]
            seen.append((owner.meta.trace_id, j))
        assert not sample.logprobs[~sample.mask].any()
    expected = [(t.meta.trace_id, j) for t in traces for j in range(len(full(t)) - len(prompt(t)))]
    assert sorted(seen) == sorted(expected)


@given(traces=runs())
def test_a_route_is_that_of_the_first_call_that_fed_its_position(traces: list[Trace]) -> None:
    for line, sample in joined(traces):
        if sample.routes is None or sample.routes_valid is None:
            assert all(t.routes is None for t in line)
            continue
        assert len(sample.routes) == len(sample.tokens) - 1
        for position in range(len(sample.routes)):
            first = next(t for t in line if position < len(full(t)) - 1)
            assert sample.routes_valid[position] == (first.routes is not None)
            expected = 0 if first.routes is None else first.routes[position]
            assert np.array_equal(sample.routes[position], np.broadcast_to(expected, (2, 2)))


def test_the_line_that_went_on_longest_is_trained_on_the_shared_call() -> None:
    root = make_trace(step=0)
    short = make_trace(step=1, choice=0, n=2, base=root)
    other = make_trace(step=1, choice=1, n=2, base=root)
    after = make_trace(step=2, base=other)
    found = [[t.meta.trace_id for t in line] for line, _ in joined([root, short, other, after])]
    ids = [t.meta.trace_id for t in (root, other, after, short)]
    assert found == [ids[:3], ids[3:]]


def test_rows_that_the_engine_never_wrote_are_not_expert_0() -> None:
    trace = make_trace(prompt=4, response=3, k=2)
    assert trace.routes is not None
    holed = trace.routes.copy()
    holed[2] = 0
    sample = assemble([replace(trace, routes=holed)], reward=1.0)
    assert sample.routes_valid is not None
    assert sample.routes_valid.tolist() == [True, True, False, True, True, True]
    assert sample.meta.routes is not None
    assert sample.meta.routes.missing == [(2, 3)]


def test_a_route_array_of_another_length_is_missing() -> None:
    trace = make_trace()
    assert trace.routes is not None
    assert assemble([replace(trace, routes=trace.routes[1:])], reward=None).routes is None


def test_routes_of_two_widths_join_in_the_wider_one() -> None:
    """Of an engine that sends int32 each answer is as narrow as its own ids."""
    one, two = list(make_trajectory(steps=2))
    assert one.routes is not None
    assert two.routes is not None
    wide = two.routes.astype(np.uint16)
    wide[-1] = 300
    routes = assemble([one, replace(two, routes=wide)], reward=None).routes
    assert routes is not None
    assert routes.dtype == np.uint16
    assert np.array_equal(routes[: len(one.routes)], one.routes)
    assert np.array_equal(routes[len(one.routes) :], wide[len(one.routes) :])


def test_finding_lines_copies_no_prompts() -> None:
    """A run's prompts are quadratic in its length."""
    ids = np.arange(10_000, dtype=np.int32)
    pairs = [(ids[: 100 * n + 50].copy(), ids[100 * n + 50 : 100 * n + 100]) for n in range(100)]
    tracemalloc.start()
    found = lines(pairs)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == [list(range(100))]
    assert peak_bytes < sum(prompt.nbytes for prompt, _ in pairs) / 10


def test_lines_that_do_not_join_are_refused() -> None:
    one, two = list(make_trajectory(steps=2))
    with pytest.raises(ValueError, match="does not begin with the tokens before it"):
        assemble([two, one], reward=None)
    with pytest.raises(ValueError, match="routes of several shapes"):
        assemble([one, replace(two, routes=np.zeros((33, 4, 2), np.uint8))], reward=None)
    with pytest.raises(ValueError, match="no prompt, response or logprobs"):
        assemble([replace(one, logprobs=None)], reward=None)


@pytest.mark.parametrize(
    ("mode", "sampled", "at"),
    [
        ("raw_logprobs", None, 1.0),
        ("processed_logprobs", None, None),
        ("unknown", None, None),
        ("unknown", 0.7, None),
        ("processed_logprobs", 0.7, 0.7),
        ("unknown", 1.0, 1.0),
    ],
)
def test_a_temperature_that_nobody_said_is_not_one(
    mode: LogprobsMode, sampled: float | None, at: float | None
) -> None:
    span = Span(
        trace_id="c.0", step=0, choice=0, start=1, end=2, temperature=sampled, logprobs_mode=mode,
        weight_version="1", finish_reason="stop",
    )  # fmt: skip
    assert span.logprobs_temperature == at

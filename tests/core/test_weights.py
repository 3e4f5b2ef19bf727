"""Several weight versions inside one answer, and the lag over them."""

from __future__ import annotations

import pytest

from driftgate.lag import policy_lag
from driftgate.testing.traces import make_trace
from driftgate.trace import WeightSpan
from driftgate.weights import changed, is_mixed, joined, sampled_under


@pytest.mark.parametrize(
    ("versions", "scored_under", "steps", "mixed"),
    [
        (["42"], "42", 0, False),
        (["40", "42"], "42", 2, True),
        (["41", "42", "41"], "42", 1, True),
        (["unknown"], "42", None, False),
        (["41", "unknown"], "42", None, True),
        ([changed(["41", "42"])], "42", None, True),
    ],
)
def test_the_lag_of_an_answer_is_the_largest_of_its_versions(
    versions: list[str], scored_under: str, steps: int | None, mixed: bool
) -> None:
    meta = make_trace().meta
    meta.weight_spans = [WeightSpan(3 * at, version) for at, version in enumerate(versions)]
    meta.weight_version = joined(meta.weight_spans)
    assert meta.weight_version == "+".join(dict.fromkeys(versions))
    assert is_mixed(meta) is mixed
    lag = policy_lag((version, scored_under) for version in sampled_under(meta))
    assert lag.steps == steps
    assert (lag.reason is None) is (steps is not None)


def test_a_trace_from_before_spans_has_its_one_version() -> None:
    meta = make_trace().meta
    meta.weight_spans, meta.weight_version = [], "7"
    assert (sampled_under(meta), is_mixed(meta), joined([])) == (("7",), False, "unknown")

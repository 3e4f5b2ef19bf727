"""What the trainer says of a real engine's traces is what plain Hugging Face says of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest

from driftgate import Client
from driftgate.glossary import METRICS, ROUTER_METRICS
from driftgate.testing.engine import EngineProcess
from driftgate.trace import Engine, Score, Trace
from driftgate.views import CellMismatch
from tests.e2e import oracle
from tests.e2e.conftest import Scored
from tests.e2e.oracle import Answer, HuggingFace
from tests.e2e.rollouts import HOT, HOT_RUNS, TOKENS
from tests.e2e.support import WEIGHT_VERSION, codes, proxy, stored_scores, stored_traces

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

EXACT = 1e-6
"""Nats, float32. Own forwards of the same tokens by the same kernels; 7e-7 was measured."""

TILING = 2e-5
"""Nats, float32. A longer sequence (one pass) or fewer rows through the head choose other kernels:
6e-6 was measured, the same as either side's distance from float64."""

SAME_KERNEL_ROWS = 8
"""From so many rows on a product's kernel does not depend on their number."""

NEAR_TIE = 1e-5
"""In probability: two kernels may choose differently between experts that are so close."""


@pytest.fixture(scope="module")
def references(scored: dict[str, Scored]) -> dict[str, HuggingFace]:
    return {kind: HuggingFace(one.checkpoint) for kind, one in scored.items()}


@pytest.fixture(scope="module", params=["dense", "moe"])
def compared(
    request: pytest.FixtureRequest, scored: dict[str, Scored], references: dict[str, HuggingFace]
) -> list[tuple[Trace, Score, Answer]]:
    """Every trace of an engine, its score in float32 and the independent numbers."""
    one = scored[request.param]
    scores = {score.meta.trace_id: score for score in stored_scores(one.store, one.exact.digest)}
    return [
        (trace, scores.pop(trace.meta.trace_id), references[request.param].answer(trace))
        for trace in stored_traces(one.store)
    ]


def is_exact(trace: Trace, score: Score) -> bool:
    """Scored in a forward of its own, by the kernels that whole logits are made by."""
    assert trace.response_ids is not None
    return not score.meta.one_pass and len(trace.response_ids) >= SAME_KERNEL_ROWS


def test_scores_equal_hugging_face(compared: list[tuple[Trace, Score, Answer]]) -> None:
    worst = {True: 0.0, False: 0.0}
    for trace, score, answer in compared:
        exact = is_exact(trace, score)
        tolerance = EXACT if exact else TILING
        error = float(np.abs(score.logprobs - answer.logprobs).max())
        worst[exact] = max(worst[exact], error)
        assert error < tolerance, (trace.meta.trajectory, trace.meta.step)
        np.testing.assert_allclose(score.entropy, answer.entropy, atol=10 * tolerance)
        if answer.at_temperature is None:
            assert score.logprobs_at_temperature is None
        else:
            assert score.logprobs_at_temperature is not None
            np.testing.assert_allclose(
                score.logprobs_at_temperature, answer.at_temperature, atol=3 * tolerance
            )
    print(f"max |difference| in nats: own forward {worst[True]:.1e}, shared {worst[False]:.1e}")


def test_prefixes_that_extend_exactly_share_a_forward(
    compared: list[tuple[Trace, Score, Answer]],
) -> None:
    runs = [(trace.meta, score.meta) for trace, score, _ in compared]
    tokens = [score.one_pass for trace, score in runs if trace.trajectory == "tokens"]
    assert tokens == [True, True, True, False]
    assert [trace.prefix_exact for trace, _ in runs if trace.trajectory == "tokens"][1:] == [True] * 3
    assert sum(is_exact(trace, score) for trace, score, _ in compared) > len(compared) / 2

"""Random runs of an agent for property tests: trees of calls with gaps in their routes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from driftgate.testing.traces import make_trace
from driftgate.trace import I32, Routes, Sampling, Trace

__all__ = ["runs"]

TOKENS = st.lists(st.integers(0, 2), max_size=4)
"""Three tokens, so that prompts begin with other calls' tokens by chance as well."""
LAYERS, K = 2, 2


@st.composite
def runs(draw: st.DrawFn, *, experts: int = 8) -> list[Trace]:
    """1 to 7 calls; each starts afresh or continues an earlier one, some without routes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    traces: list[Trace] = []
    for step in range(draw(st.integers(1, 7))):
        base = draw(st.sampled_from([None, *traces]))
        context = draw(TOKENS)
        if base is not None:
            assert base.prompt_ids is not None
            assert base.response_ids is not None
            context = [*base.prompt_ids.tolist(), *base.response_ids.tolist(), *context]
        response = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))
        routes = draw(st.sampled_from(["whole", "whole", "whole", "none"]))
        traces.append(
            _trace(rng, step, context or [1], response, experts if routes == "whole" else 0)
        )
    return traces


def _trace(
    rng: np.random.Generator, step: int, prompt: list[int], response: list[int], experts: int
) -> Trace:
    made = make_trace(
        step=step,
        prompt=1,
        response=len(response),
        routed=False,
        sampling=Sampling(temperature=float(rng.choice([0.5, 1.0]))),
        weight_version=str(rng.integers(3)),
    )
    rows = len(prompt) + len(response) - 1
    return replace(
        made,
        prompt_ids=_ids(prompt),
        response_ids=_ids(response),
        logprobs=-rng.exponential(1.0, len(response)).astype(np.float32),
        routes=_routes(rng, rows, experts) if experts else None,
    )


def _ids(values: list[int]) -> I32:
    return np.asarray(values, np.int32)


def _routes(rng: np.random.Generator, rows: int, experts: int) -> Routes:
    chosen = rng.random((rows, LAYERS, experts)).argpartition(K - 1, axis=2)[:, :, :K]
    return chosen.astype(np.uint8) if experts <= 256 else chosen.astype(np.uint16)

"""The export: every row leads back to its trace, bit for bit, and nothing in it is NaN."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from driftgate.adapters.jsonl import Row, rows, trace_of
from driftgate.errors import NotFoundError
from driftgate.storage import Reader, Record, read_segment
from driftgate.testing.stores import BAD_TRAINER, SLASHED, example_records, flip, write_store
from driftgate.testing.traces import (
    TRAINER,
    assert_same_trace,
    make_score,
    make_trace,
    make_trajectory,
)
from driftgate.trace import Score, Trace


def refuse_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def exported(root: Path, records: Iterable[Record], **options: Any) -> list[Row]:
    """Rows through their JSON, one line each, as a reader of the file gets them."""
    reader = Reader(write_store(root, records))
    lines = [msgspec.json.encode(row) for row in rows(reader, **options)]
    reader.close()
    assert not any(b"\n" in line for line in lines)
    for line in lines:
        json.loads(line, parse_constant=refuse_constant)
    return [msgspec.json.decode(line, type=Row) for line in lines]


def test_rows_lead_back_to_their_traces(tmp_path: Path) -> None:
    found = exported(tmp_path, example_records())
    stored = {r.meta.trace_id: r for r in example_records() if isinstance(r, Trace)}
    assert len(found) == len(stored)
    for row in found:
        assert_same_trace(trace_of(row), stored[row.trace_id])


def test_a_row_is_state_action_reward(tmp_path: Path) -> None:
    row = exported(tmp_path, example_records(), trajectory=SLASHED)[1]
    trace = next(r for r in example_records() if isinstance(r, Trace) and r.meta.step == 1)
    assert (row.schema_version, row.trajectory, row.step, row.choice) == (1, SLASHED, 1, 0)
    assert row.reward == 0.5
    assert row.action.token_texts is not None
    assert "".join(row.action.token_texts).encode() == trace.token_bytes
    assert msgspec.json.decode(row.state.request) == msgspec.json.decode(trace.request)


def test_every_trainer_has_its_own_numbers(tmp_path: Path) -> None:
    row = exported(tmp_path, example_records(), trajectory=SLASHED)[0]
    scores = {r.meta.trainer.digest: r for r in example_records() if isinstance(r, Score)}
    assert {s.trainer_digest for s in row.scores} == {TRAINER.digest, BAD_TRAINER.digest}
    for scored in row.scores:
        if scored.trainer_digest == BAD_TRAINER.digest:
            assert scored.comparable.verdict == "no"
            expected = scores[BAD_TRAINER.digest].logprobs.tolist()
            assert scored.logprobs == expected


def test_order_is_that_of_the_trajectories_then_steps(tmp_path: Path) -> None:
    late = [
        make_trace(trajectory=name, step=step, started_ns=began + step, routed=False)
        for name, began in (("late", 2_000), ("early", 1_000))
        for step in (1, 0)
    ]
    found = exported(tmp_path, late)
    expected = [("early", 0), ("early", 1), ("late", 0), ("late", 1)]
    assert [(row.trajectory, row.step) for row in found] == expected


def test_choices_of_a_step_are_rows(tmp_path: Path) -> None:
    both = [make_trace(choice=choice, n=2) for choice in (1, 0)]
    assert [row.choice for row in exported(tmp_path, both)] == [0, 1]


def test_numbers_that_json_cannot_hold_are_null_with_a_reason(tmp_path: Path) -> None:
    values = np.asarray([-1.5, np.nan, -np.inf, np.inf, -9999.0], np.float32)
    trace = replace(make_trace(), logprobs=values)
    (row,) = exported(tmp_path, [trace, make_score(make_trace())])
    assert row.action.logprobs == [-1.5, None, None, None, -9999.0]
    bad = [(n.column, n.index, n.value) for n in row.non_finite]
    assert bad == [("logprobs", 1, "nan"), ("logprobs", 2, "-inf"), ("logprobs", 3, "inf")]
    assert_same_trace(trace_of(row), trace)


def test_what_is_missing_stays_missing(tmp_path: Path) -> None:
    trace = replace(
        make_trace(routed=False, missing=["token_ids: not given"], status="partial"),
        prompt_ids=None,
        response_ids=None,
        logprobs=None,
        token_offsets=None,
        token_bytes=b"",
    )
    (row,) = exported(tmp_path, [trace])
    assert row.missing == ["token_ids: not given"]
    assert row.scores == []
    assert row.reward is None
    assert_same_trace(trace_of(row), trace)


def test_a_damaged_score_costs_no_trace(tmp_path: Path) -> None:
    store = write_store(tmp_path, [trace := make_trace(), make_score(trace)])
    (segment,) = store.glob("segments/*.dgs")
    *_, score = read_segment(segment)
    flip(segment, score.offset)
    damaged: list[str] = []
    with closing(Reader(store)) as reader:
        (row,) = rows(reader, damaged=damaged)
    assert_same_trace(trace_of(row), trace)
    assert row.scores == []
    assert damaged[0].startswith(f"score of {trace.meta.trace_id} by {TRAINER.digest}: ")


def test_bodies_with_line_ends_stay_on_one_line(tmp_path: Path) -> None:
    trace = replace(make_trace(), request=b'{\n "temperature": 1.50,\n "messages": ["a\\nb"]\n}')
    (row,) = exported(tmp_path, [trace])
    assert bytes(row.state.request) == b'{"temperature":1.50,"messages":["a\\nb"]}'


def test_a_body_that_only_engines_read_ends_no_export(tmp_path: Path) -> None:
    trace = replace(make_trace(), request=b'{"model":"m","note":NaN}')
    first, second = exported(tmp_path, [trace, make_trace(step=1)])
    assert msgspec.json.decode(first.state.request) == '{"model":"m","note":NaN}'
    assert_same_trace(trace_of(first), trace)
    assert second.step == 1


def test_uint16_routes_keep_their_type(tmp_path: Path) -> None:
    trace = make_trace(experts=300, k=2)
    (row,) = exported(tmp_path, [trace])
    assert row.routes is not None
    assert (row.routes.dtype, row.routes.shape) == ("uint16", [16, 4, 2])
    assert_same_trace(trace_of(row), trace)


def test_a_trajectory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="none"):
        exported(tmp_path, make_trajectory(steps=1), trajectory="none")


def test_what_an_agent_may_not_have_got_says_so(tmp_path: Path) -> None:
    trace = make_trace(trajectory="t", step=0)
    meta = msgspec.structs.replace(trace.meta, delivery="uncertain")
    (row,) = exported(tmp_path, [replace(trace, meta=meta)])
    assert row.delivery == "uncertain"

"""The judge itself: it finds what is lost, what is wrong, and what says the wrong reason."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from driftgate.storage import Writer
from driftgate.testing.traces import make_trace
from driftgate.trace import Trace
from reliability.agent import Seen
from reliability.answers import Said, request, say
from reliability.upstream import FAULTS, same
from reliability.verdict import Call, Row

BODY = request("well", "one", stream=False)
ANSWERED = Seen(200, b"{}", "whole", time.monotonic(), {})


def stored(said: Said) -> Trace:
    """As a gateway would store the answer."""
    trace = make_trace(trajectory="t", step=0)
    spelt = [text.encode() for text in said.texts]
    return replace(
        trace,
        prompt_ids=np.array(said.prompt_ids, np.int32),
        response_ids=np.array(said.ids, np.int32),
        logprobs=np.array(said.logprobs, np.float32),
        routes=None,
        token_bytes=b"".join(spelt),
        token_offsets=np.cumsum([0, *map(len, spelt)], dtype=np.int32),
        request=BODY,
        response=b'{"message":{"content":"%b"}}' % said.content.encode(),
    )


def judged(root: Path, trace: Trace | None) -> Row:
    writer, row = Writer(root), Row("a fault")
    if trace is not None:
        writer.submit(trace)
    writer.close()
    row.judge(root, [Call(say("one", asked=True), "t", BODY, ANSWERED)])
    return row


def test_the_very_answer_is_neither_lost_nor_wrong(tmp_path: Path) -> None:
    row = judged(tmp_path, stored(say("one", asked=True)))
    assert row.good, row.notes


def test_an_answer_without_a_trace_is_lost(tmp_path: Path) -> None:
    assert (judged(tmp_path, None).lost, judged(tmp_path, None).wrong) == (1, 0)


@pytest.mark.parametrize("field", ["prompt_ids", "response_ids", "logprobs"])
def test_one_number_that_differs_is_wrong(tmp_path: Path, field: str) -> None:
    trace = stored(say("one", asked=True))
    changed = getattr(trace, field).copy()
    changed[-1] += 1
    row = judged(tmp_path, replace(trace, **{field: changed}))
    assert (row.lost, row.wrong) == (1, 1)


def test_a_part_that_passes_as_the_whole_is_wrong(tmp_path: Path) -> None:
    said = say("one", asked=True)
    part = replace(said, ids=said.ids[:4], texts=said.texts[:4], logprobs=said.logprobs[:4])
    row = judged(tmp_path, stored(part))
    assert (row.lost, row.wrong) == (1, 1)


def test_a_reason_that_names_something_else_is_wrong() -> None:
    row = Row("a fault")
    row.says(["end: the client left"], "^routed_experts")
    assert row.wrong == 1


def test_a_clean_end_is_not_the_cut_that_the_engine_made() -> None:
    direct = Seen(200, b"data: 1\n\n", "cut", 0.0, {})
    assert same(FAULTS["reset-event"], direct, direct)
    assert not same(FAULTS["reset-event"], direct, replace(direct, ended="whole"))

"""Kinds of token, told from the marks of real chat templates and from the answer's fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from driftgate.testing.traces import make_trace
from driftgate.tokenclass import UNCLOSED, Classified, classify
from driftgate.trace import Trace

SHORT = {"t": "thinking", "c": "tool_call", ".": "content", "#": "special", "?": "unknown"}


def answer(texts: Sequence[str], finish: str = "stop", **message: Any) -> Trace:
    pieces = [text.encode() for text in texts]
    trace = make_trace(response=len(pieces), routed=False, finish_reason=finish)
    return dataclasses.replace(
        trace,
        token_bytes=b"".join(pieces),
        token_offsets=np.cumsum([0, *map(len, pieces)], dtype=np.int32),
        response=msgspec.json.encode({"index": 0, "message": message}),
    )


def told(trace: Trace) -> str:
    letters = {name: letter for letter, name in SHORT.items()}
    return "".join(letters[name] for name in classify(trace).classes)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["<think>", "hm", " ok", "</think>", "\n", "Hi", "<|im_end|>"], "#tt#..#"),
        (["hm", " ok", "</think>", "Hi"], "tt#."),  # opened in the prompt
        (["<think>", "cut", " off"], "#tt"),
        (["Hi", "<tool_call>", '{"name"', ": 1}", "</tool_call>"], ".#cc#"),
        (["<think>", "<tool_call>", "x", "</think>", "y"], "##t#."),
        (["[TOOL_CALLS]", "[{", "}]"], "#cc"),
        (
            [
                "<|channel|>",
                "analysis",
                "<|message|>",
                "hm",
                "<|end|>",
                "<|channel|>",
                "final",
                "<|message|>",
                "Hi",
            ],
            "#t#t##.#.",
        ),
        (
            ["<｜tool▁calls▁begin｜>", "get", "<｜tool▁calls▁end｜>", "<｜end▁of▁sentence｜>"],
            "#c##",
        ),
        (["a <b> and c < d", " [x]", "</div>"], "..."),
        (["Hi", ""], ".#"),
        (["Hi", "", "you"], ".?."),
    ],
)
def test_marks(texts: list[str], expected: str) -> None:
    assert told(answer(texts)) == expected


def test_marks_that_are_split_over_tokens_still_bound_their_span() -> None:
    assert told(answer(["<th", "ink>", "hm", "</th", "ink>", "Hi"])) == "ttt..."


def test_reasoning_and_arguments_are_found_verbatim() -> None:
    call = {"type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}}
    texts = ["let me", " see", "get", '{"a"', ": 1}"]
    trace = answer(texts, reasoning_content="let me see\n", tool_calls=[call])
    assert told(trace) == "tt.cc"
    assert classify(trace).notes == []


def test_what_cannot_be_told_is_said() -> None:
    call = {"function": {"name": "get", "arguments": '{"a":1}'}}
    trace = answer(["let me", '{"a": 1}'], reasoning="Let me", tool_calls=[call])
    found = classify(trace)
    assert found.classes == ["content", "content"]
    assert len(found.notes) == 2
    assert classify(answer(["Hi"])).notes == [UNCLOSED]


def test_without_texts_every_token_is_unknown() -> None:
    trace = dataclasses.replace(make_trace(response=3), token_offsets=None, token_bytes=b"")
    note = "the engine gave no token texts: no class can be told"
    assert classify(trace) == Classified(["unknown"] * 3, [note])


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"message": 3}', b'{"message": {"tool_calls": 1}}']
)
def test_any_stored_answer_is_read(body: bytes) -> None:
    trace = dataclasses.replace(answer(["Hi", "there"]), response=body)
    assert told(trace) == ".."

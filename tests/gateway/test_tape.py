"""A stream as it comes: what the agent gets of each event, what is kept of it, and how much."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftgate.adapters.vllm import Vllm
from driftgate.gateway.capture import Folded, fold_stream
from driftgate.gateway.openai import Plan, strip_event
from driftgate.gateway.sse import Splitter
from driftgate.gateway.tape import BATCH_BYTES, Tape

HIDES_BOTH = Plan(
    api="chat",
    stream=True,
    hide_top=frozenset({"prompt_token_ids"}),
    hide_choice=frozenset({"token_ids", "prompt_token_ids", "logprobs"}),
)
HIDES_LOGPROBS = msgspec.structs.replace(
    HIDES_BOTH, hide_choice=frozenset({"logprobs"}), hide_top=frozenset(), ids_asked=True
)
AS_GIVEN = Plan(api="chat", stream=True, ids_asked=True, logprobs_asked=True)
DONE = b"data: [DONE]\n\n"
NO_LIMIT = 1 << 40


def row(text: str, logprob: float = -0.25) -> dict[str, Any]:
    return {
        "token": text,
        "logprob": logprob,
        "bytes": list(text.encode()),
        "top_logprobs": [],
    }


def chunk(delta: dict[str, Any], texts: list[str], ids: list[int], index: int = 0) -> bytes:
    """An event as vLLM writes it."""
    choice = {
        "index": index,
        "delta": delta,
        "logprobs": {"content": [row(text, -0.125 * (1 + i)) for i, text in enumerate(texts)]},
        "finish_reason": None,
        "token_ids": ids,
    }
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return event(head | {"choices": [choice]})


def event(body: Any, separators: tuple[str, str] = (",", ":")) -> bytes:
    text = json.dumps(body, separators=separators, ensure_ascii=False)
    return b"data: %b\n\n" % text.encode()


def play(events: list[bytes], plan: Plan = HIDES_BOTH) -> tuple[list[bytes | None], Folded]:
    tape = Tape(plan, limit_bytes=NO_LIMIT)
    passed = [tape.take(event) for event in events]
    return passed, fold_stream(tape, Vllm(), expect_routes=False)


def spaced(event: bytes) -> bytes:
    """The same event in a spelling that only a JSON parser reads."""
    if event == DONE:
        return event
    return b"data: " + json.dumps(json.loads(event[6:]), ensure_ascii=False).encode() + b"\n\n"


TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
DELTA: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.fixed_dictionaries({"content": TEXT}),
    st.fixed_dictionaries({"reasoning": TEXT}),
    TEXT.map(lambda text: {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": st.just("")}),
    st.just({}),
)
TOKENS = st.lists(st.tuples(TEXT, st.integers(0, 200_000)), min_size=1, max_size=3)
CHUNK = st.builds(
    lambda delta, tokens, index: chunk(
        delta, [t for t, _ in tokens], [i for _, i in tokens], index
    ),
    DELTA,
    TOKENS,
    st.integers(0, 1),
)


@given(st.lists(CHUNK, max_size=8), st.sampled_from([HIDES_BOTH, HIDES_LOGPROBS, AS_GIVEN]))
def test_a_pattern_reads_what_a_parser_reads(events: list[bytes], plan: Plan) -> None:
    events = [*events, DONE]
    passed, folded = play(events, plan)
    assert passed == [strip_event(event, plan) for event in events]
    _, parsed = play([spaced(event) for event in events], plan)
    assert len(folded.samples) == len(parsed.samples)
    for one, other in zip(folded.samples, parsed.samples, strict=True):
        for name in one.__slots__:
            left, right = getattr(one, name), getattr(other, name)
            if isinstance(left, np.ndarray):
                np.testing.assert_array_equal(left, right)
            else:
                assert left == right, name


def test_usual_events_of_vllm_are_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [chunk({"content": text}, [text], [7]) for text in ("a", '"\\\n', "é", "]},{")]
    tape = Tape(HIDES_BOTH, limit_bytes=NO_LIMIT)
    tape.take(events[0])  # shows how the stream's events begin
    with monkeypatch.context() as patched:
        patched.setattr(Tape, "_take_other", None)
        passed = [tape.take(event) for event in events]
    for event_, got in zip(events, passed, strict=True):
        assert got == strip_event(event_, HIDES_BOTH)


@pytest.mark.parametrize(
    "broken",
    [
        b'"delta":{"content":"\x01"}',
        b'"delta":{"content":"\xff"}',
        b'"delta":{"content":"\\ud800"}',
    ],
)
def test_a_text_that_cannot_be_read_is_named_and_costs_no_token(broken: bytes) -> None:
    usual = chunk({"content": "a"}, ["a"], [7])
    bad = usual.replace(b'"delta":{"content":"a"}', broken)
    passed, folded = play([usual, bad, usual, DONE])
    assert passed[1] is not None
    assert broken in passed[1]
    (sample,) = folded.samples
    assert sample.response_ids is not None
    assert sample.response_ids.tolist() == [7, 7, 7]
    assert sample.missing[0].startswith("answer: delta cannot be read: ")
    assert sample.proof.text_matches is None


def test_a_token_that_cannot_be_read_is_named_and_the_others_are_kept() -> None:
    usual = chunk({"content": "a"}, ["a"], [7])
    bad = usual.replace(b'"logprob":-0.125', b'"logprob":-')
    assert bad != usual
    passed, folded = play([usual, bad, usual, DONE])
    assert passed[1] is not None
    (sample,) = folded.samples
    assert sample.response_ids is not None
    assert sample.response_ids.tolist() == [7, 7]
    assert sample.missing[0].startswith("events: 1 cannot be read")


def test_what_follows_done_belongs_to_no_answer() -> None:
    usual = chunk({"content": "a"}, ["a"], [7])
    passed, folded = play([usual, DONE, usual, DONE, event({"error": "late"})])
    assert passed == [strip_event(usual, HIDES_BOTH), DONE] * 2 + [event({"error": "late"})]
    assert folded.error is None
    assert folded.samples[0].proof.ids == 1


def test_over_the_limit_nothing_is_kept_and_all_is_passed_on() -> None:
    usual = chunk({"content": "a"}, ["a"], [7])
    tape = Tape(HIDES_BOTH, limit_bytes=3 * len(usual))
    for _ in range(3):
        assert tape.take(usual) == strip_event(usual, HIDES_BOTH)
        assert not tape.over
    for _ in range(3):
        assert tape.take(usual) == strip_event(usual, HIDES_BOTH)
        assert tape.over
    assert tape.drafts() == []


def test_memory_of_a_stream_is_its_tokens() -> None:
    """10 MB of events, in the chunks of a socket, stay below 1.5 MB at any time: 25,000 tokens of
    some 20 bytes, and the batch that is being read (events and their parsed form)."""
    text = "token"
    stream = chunk({"content": text}, [text], [123_456]) * 40
    splitter, tape = Splitter(), Tape(HIDES_BOTH, limit_bytes=NO_LIMIT)
    came = 0
    tracemalloc.start()
    try:
        while came < 10 << 20:
            came += len(stream)
            for event_ in splitter.feed(stream):
                tape.take(event_)
        tape.take(DONE)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 20 * BATCH_BYTES + (10 << 20) / 40
    (sample,) = fold_stream(tape, Vllm(), expect_routes=False).samples
    assert sample.token_bytes == text.encode() * (came // len(stream) * 40)
    assert tape.size_bytes < came / 10


def test_memory_of_a_large_event_is_a_few_times_its_size() -> None:
    """One event of 10 MB: the buffer that it is gathered in, the event, and what is kept of it."""
    text = "x" * (10 << 20)
    big = chunk({"content": text}, ["x"], [7])
    chunks = [big[i : i + (1 << 18)] for i in range(0, len(big), 1 << 18)]
    splitter, tape = Splitter(), Tape(HIDES_BOTH, limit_bytes=NO_LIMIT)
    tracemalloc.start()
    try:
        (event_,) = (event for part in chunks for event in splitter.feed(part))
        passed = tape.take(event_)
        drafts = tape.drafts()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert passed is not None
    assert len(drafts) == 1
    assert peak_bytes < 7 * len(big)

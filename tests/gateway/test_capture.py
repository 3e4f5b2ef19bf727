"""Folding answers: what does not fit is left out and named, never padded or guessed."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import msgspec
import numpy as np
import pytest

from driftgate.adapters.vllm import Vllm, narrow_routes, read_npy
from driftgate.errors import UpstreamError
from driftgate.gateway.capture import Sample, fold_answer, fold_stream
from driftgate.gateway.draft import Usage
from driftgate.gateway.openai import Plan
from driftgate.gateway.tape import Tape
from driftgate.gateway.texts import text_matches
from driftgate.tops import Alternative, alternatives

PLAN = Plan(api="chat", model="m")
PROMPT, IDS = [1, 2, 3], [7, 8]


def npy(array: Any) -> str:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def row(text: str, logprob: float | None = -0.5) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}


def choice(**changes: Any) -> dict[str, Any]:
    return {
        "index": 0,
        "message": {"role": "assistant", "content": "ab"},
        "logprobs": {"content": [row("a"), row("b")]},
        "finish_reason": "length",
        "token_ids": IDS,
    } | changes


def fold(plan: Plan = PLAN, *, top: dict[str, Any] | None = None, **changes: Any) -> Sample:
    body = {"choices": [choice(**changes)], "prompt_token_ids": PROMPT} | (top or {})
    folded = fold_answer(json.dumps(body).encode(), plan, Vllm(), expect_routes=False)
    (sample,) = folded.samples
    return sample


def test_a_whole_answer_misses_nothing() -> None:
    sample = fold(top={"usage": {"prompt_tokens": 3, "completion_tokens": 2}})
    assert sample.missing == []
    assert sample.token_bytes == b"ab"
    assert sample.token_offsets is not None
    assert sample.token_offsets.tolist() == [0, 1, 2]
    assert sample.proof.usage_completion == sample.proof.ids == sample.proof.logprob_rows == 2
    assert sample.proof.usage_prompt == sample.proof.prompt_ids == 3
    assert sample.proof.terminal
    assert set(json.loads(sample.response)) == {"index", "message", "finish_reason"}


ASKED = msgspec.structs.replace(PLAN, logprobs_asked=True)
TOPS = [{"token": "a", "logprob": -0.5, "bytes": [97]}, {"token": "é", "logprob": -2.0}]
LIKELY = [[Alternative(text="a", logprob=-0.5), Alternative(text="é", logprob=-2.0)], []]


def test_alternatives_that_were_asked_for_are_kept() -> None:
    rows = [row("a") | {"top_logprobs": TOPS}, row("b")]
    sample = fold(ASKED, logprobs={"content": rows})
    assert alternatives(sample.response, tokens=IDS) == LIKELY
    assert alternatives(sample.response, tokens=[*IDS, 9]) is None
    unasked = fold(PLAN, logprobs={"content": rows})
    assert alternatives(unasked.response, tokens=IDS) is None
    assert b"top_logprobs" not in unasked.response


def test_alternatives_of_completions_and_streams_are_kept() -> None:
    text = {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"a": -0.5, "é": -2.0}, None],
    }
    plan = msgspec.structs.replace(ASKED, api="completions")
    sample = fold(plan, text="ab", logprobs=text)
    assert alternatives(sample.response, tokens=IDS) == LIKELY
    broken = fold(plan, text="ab", logprobs=text | {"top_logprobs": {"a": 1}})
    assert broken.missing == []
    tape = Tape(ASKED, limit_bytes=1 << 20)
    for number, tops in enumerate((TOPS, [])):
        delta = {"index": 0, "delta": {"content": "ab"[number]}, "token_ids": [IDS[number]],
                 "logprobs": {"content": [row("ab"[number]) | {"top_logprobs": tops}]}}  # fmt: skip
        tape.take(b"data: %b\n\n" % json.dumps({"choices": [delta]}).encode())
    (streamed,) = fold_stream(tape, Vllm(), expect_routes=False, end="cut").samples
    assert alternatives(streamed.response, tokens=IDS) == LIKELY


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"token_ids": None}, "response_ids: the engine sent none"),
        ({"token_ids": [7, -1]}, "response_ids: -1 .. 7 are no token ids"),
        ({"token_ids": [7, 8, 9]}, "logprobs: 2 rows came for 3 ids"),
        ({"token_ids": "7"}, "answer: choice 0 cannot be read"),
        ({"logprobs": None}, "logprobs: the engine sent none"),
        ({"logprobs": {"content": [row("a"), row("b", None)]}}, "logprobs: 1 of 2 are null"),
        ({"token_ids": [7, 2**31]}, "response_ids: 7 .. 2147483648 are no token ids"),
        ({"top": {"prompt_token_ids": [1, 2**31]}}, "prompt_ids: 1 .. 2147483648 are no token ids"),
        ({"top": {"prompt_token_ids": [1, 2**70]}}, "prompt_ids: "),
        ({"top": {"prompt_token_ids": [1, -2]}}, "prompt_ids: -2 .. 1 are no token ids"),
        ({"top": {"prompt_token_ids": [1, "2"]}}, "prompt_ids: Expected `int`"),
        ({"top": {"prompt_token_ids": [[1], 2]}}, "prompt_ids: Expected `int`"),
        ({"finish_reason": None}, "end: no finish_reason came"),
        ({"top": {"usage": {"completion_tokens": 5}}}, "response_ids: usage counts 5 tokens, 2"),
        ({"top": {"prompt_token_ids": None}}, "prompt_ids: the engine sent none"),
        ({"routed_experts": "!"}, "routed_experts: "),
        ({"routed_experts": npy(np.zeros((3, 2, 2), np.uint8))}, "routed_experts: 3 rows came"),
        ({"routed_experts": npy(np.zeros((4, 2), np.uint8))}, "routed_experts: shape [4, 2]"),
        ({"routed_experts": npy(np.zeros((4, 2, 2)))}, "routed_experts: dtype <f8"),
        ({"routed_experts": npy(np.full((4, 1, 1), -1, np.int32))}, "routed_experts: expert ids"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], missing: str) -> None:
    sample = fold(**changes)
    assert any(said.startswith(missing) for said in sample.missing), sample.missing


ODD: list[tuple[str, dict[str, Any]]] = [
    ("system_fingerprint", {"top": {"system_fingerprint": 5}}),
    ("usage", {"top": {"usage": [1]}}),
    ("usage.completion_tokens", {"top": {"usage": {"completion_tokens": "many"}}}),
    ("usage.prompt_tokens", {"top": {"usage": {"prompt_tokens": -1}}}),
    ("stop_reason", {"stop_reason": [5]}),
    ("finish_reason", {"finish_reason": {"type": "stop"}}),
    ("weight_spans", {"weight_spans": 3}),
    ("index", {"index": "0"}),
    ("message", {"message": {"content": [{"type": "text", "text": "ab"}]}}),
    ("message", {"message": {"content": "ab", "tool_calls": [{"id": 5}]}}),
]
"""A field that the tokens do not depend on, of another type than it should have."""


@pytest.mark.parametrize(("name", "changes"), ODD)
def test_an_odd_field_costs_no_other(name: str, changes: dict[str, Any]) -> None:
    sample = fold(**changes)
    whole = fold()
    for array in ("prompt_ids", "response_ids", "logprobs", "token_offsets"):
        np.testing.assert_array_equal(getattr(sample, array), getattr(whole, array))
    (said,) = sample.missing
    assert said.startswith(f"answer: {name} cannot be read: ")
    assert sample.proof.text_matches is not False
    assert sample.choice == 0


# Without its index an event belongs to no choice.
@pytest.mark.parametrize(("name", "changes"), [case for case in ODD if case[0] != "index"])
def test_an_odd_field_costs_no_event(name: str, changes: dict[str, Any]) -> None:
    piece = {name.replace("message", "delta"): value for name, value in changes.items()}
    top = piece.pop("top", {})
    stream = events(
        delta("a", 7) | {"prompt_token_ids": PROMPT},
        delta("b", 8, finish_reason="length"),
        delta("", 9, **piece) | top,
        {"choices": []} | top,
    )
    (sample,) = fold_stream(tape_of(stream), Vllm(), expect_routes=False).samples
    assert sample.response_ids is not None
    assert sample.response_ids.tolist() == [7, 8, 9]
    (said,) = sample.missing
    assert said.startswith(f"answer: {name.replace('message', 'delta')} cannot be read: ")
    assert sample.proof.text_matches is not False


@pytest.mark.parametrize("count", [2, 2.0, "2"])
def test_a_count_is_read_in_any_spelling(count: Any) -> None:
    sample = fold(top={"usage": {"prompt_tokens": 3.0, "completion_tokens": count}})
    assert (sample.missing, sample.proof.usage_completion, sample.proof.usage_prompt) == ([], 2, 3)


def test_a_stream_says_why_choices_are_lacking() -> None:
    plan = msgspec.structs.replace(PLAN, n=2)
    tape = Tape(plan, limit_bytes=1 << 20)
    other = delta("b", 8, index="1")
    for event in events(delta("a", 7, finish_reason="length"), other, other):
        tape.take(event)
    folded = fold_stream(tape, Vllm(), expect_routes=False)
    why = "events: 2 cannot be read, the first: index: Expected `int`, got `str`"
    assert (folded.error, folded.unread) == (None, why)
    assert folded.samples[0].missing[0] == why


def test_tokens_named_by_id_have_no_text() -> None:
    named = [{"token": f"token_id:{i}", "logprob": -1.0, "bytes": None} for i in IDS]
    sample = fold(logprobs={"content": named})
    assert sample.token_offsets is None
    assert sample.missing[0].startswith("token_text: ")
    with_bytes = [{"token": f"token_id:{i}", "logprob": -1.0, "bytes": [97]} for i in IDS]
    assert fold(logprobs={"content": with_bytes}).token_bytes == b"aa"


@pytest.mark.parametrize(
    ("dtype", "kept"), [("uint8", "uint8"), ("uint16", "uint16"), ("int32", "uint8")]
)
def test_routes_keep_their_values(dtype: str, kept: str) -> None:
    routes = np.arange(4 * 2 * 3, dtype=dtype).reshape(4, 2, 3)
    sample = fold(routed_experts=npy(routes))
    assert sample.routes is not None
    assert sample.routes.dtype == kept
    np.testing.assert_array_equal(sample.routes, routes)
    assert sample.proof.route_rows == len(PROMPT) + len(IDS) - 1


def test_expert_ids_are_narrowed_to_what_holds_them() -> None:
    assert narrow_routes(np.array([[[256]]], np.int32)).dtype == np.uint16
    with pytest.raises(ValueError, match="65535"):
        narrow_routes(np.array([[[65536]]], np.int32))


def test_a_header_that_promises_more_than_came_allocates_nothing() -> None:
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 8, 8)}
    write_header: Any = np.lib.format.write_array_header_1_0
    write_header(file, header)
    with pytest.raises(ValueError, match="bytes, 0 came"):
        read_npy(file.getvalue())


def test_a_pickle_is_refused() -> None:
    file = io.BytesIO()
    np.save(file, np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"dtype \|O"):
        read_npy(file.getvalue())


def test_what_is_no_answer_is_an_error() -> None:
    with pytest.raises(UpstreamError):
        fold_answer(b"[]", PLAN, Vllm(), expect_routes=False)


def events(*chunks: dict[str, Any], done: bool = True) -> list[bytes]:
    out = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
    return [*out, b"data: [DONE]\n\n"] if done else out


def tape_of(stream: list[bytes]) -> Tape:
    tape = Tape(PLAN, limit_bytes=1 << 30)
    for event in stream:
        tape.take(event)
    return tape


def delta(text: str, token: int, **changes: Any) -> dict[str, Any]:
    piece = {"index": 0, "delta": {"content": text}, "logprobs": {"content": [row(text)]}}
    return {"choices": [piece | {"token_ids": [token], "finish_reason": None} | changes]}


def test_a_stream_folds_as_its_json_answer() -> None:
    head = {"choices": [{"index": 0, "delta": {"role": "assistant"}}], "prompt_token_ids": PROMPT}
    stream = events(head, delta("a", 7), delta("b", 8, finish_reason="length"))
    (streamed,) = fold_stream(tape_of(stream), Vllm(), expect_routes=False).samples
    whole = fold()
    for name in ("prompt_ids", "response_ids", "logprobs", "token_offsets"):
        np.testing.assert_array_equal(getattr(streamed, name), getattr(whole, name))
    assert streamed.token_bytes == whole.token_bytes
    assert streamed.proof == whole.proof
    assert streamed.missing == []


@pytest.mark.parametrize(
    ("stream", "missing"),
    [
        (events(delta("a", 7), done=False), "end: the stream ended without data: [DONE]"),
        (events(delta("a", 7)), "end: no finish_reason came"),
        (events(delta("a", 7), {"error": {"message": "boom"}}), "end: the engine ended the stream"),
        (events(delta("a", 7), {"choices": 3}), "events: 1 cannot be read"),
    ],
)
def test_streams_that_do_not_end_well(stream: list[bytes], missing: str) -> None:
    (sample,) = fold_stream(tape_of(stream), Vllm(), expect_routes=False).samples
    assert any(said.startswith(missing) for said in sample.missing), sample.missing


@pytest.mark.parametrize(
    ("texts", "sent", "stopped", "matches"),
    [
        ([b"a", b"b"], b"ab", False, True),
        ([b"a", b"<eos>"], b"a", True, True),
        ([b"a", b"bSTOP"], b"ab", True, True),
        ([b"a", b"<special>", b"b"], b"ab", False, None),
        ([b"a", b"b"], b"ax", False, False),
        ([b"a"], b"ab", False, False),
    ],
)
def test_text_matches(texts: list[bytes], sent: bytes, stopped: bool, matches: bool | None) -> None:
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    assert text_matches(b"".join(texts), offsets, sent, stopped=stopped) is matches


@pytest.mark.parametrize(
    ("details", "cached"),
    [({"cached_tokens": 48}, 48), ({"cached_tokens": None}, None), (None, None), ([1], None)],
)
def test_what_an_engine_says_of_its_prefix_cache_is_kept_and_a_surprise_costs_nothing(
    details: Any, cached: int | None
) -> None:
    said = msgspec.json.encode({"prompt_tokens": 50, "prompt_tokens_details": details})
    usage = msgspec.json.decode(said, type=Usage)
    assert (usage.prompt_tokens, usage.cached_tokens) == (50, cached)

"""An answer taken apart gives the same bytes and the same arrays as one parsed as a whole."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftgate.adapters.vllm import Vllm
from driftgate.gateway.capture import fold_answer
from driftgate.gateway.digits import read_all_ids, read_ids
from driftgate.gateway.openai import Plan, strip_answer
from driftgate.gateway.pieces import take_apart

HIDDEN = Plan(
    api="chat",
    hide_top=frozenset({"prompt_token_ids"}),
    hide_choice=frozenset({"token_ids", "prompt_token_ids", "logprobs"}),
)
AS_GIVEN = Plan(api="chat")


def row(text: str) -> dict[str, Any]:
    return {"token": text, "logprob": -0.25, "bytes": list(text.encode()), "top_logprobs": []}


def answer(*texts: str, **changes: Any) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(texts)},
        "logprobs": {"content": [row(text) for text in texts]},
        "finish_reason": "stop",
        "token_ids": list(range(len(texts))),
        "routed_experts": None,
    }
    top = {"id": "1", "choices": [choice | changes], "usage": None, "prompt_token_ids": [5, 60]}
    return top


def encode(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def same(body: bytes) -> None:
    """The pieces fold to what the whole body folds to."""
    pieces = take_apart(body)
    assert pieces is not None
    whole, fast = (
        fold_answer(form, HIDDEN, Vllm(), expect_routes=False).samples[0] for form in (body, pieces)
    )
    for field in dataclasses.fields(whole):
        one, other = getattr(whole, field.name), getattr(fast, field.name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype
            assert one.tolist() == other.tolist()
        else:
            assert one == other, field.name


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd")), min_size=1))
def test_pieces_fold_like_the_whole(texts: list[str]) -> None:
    body = encode(answer(*texts))
    if "token_id:" not in "".join(texts):
        same(body)
    stripped = json.loads(strip_answer(body, HIDDEN).body)
    expected = answer(*texts, logprobs=None, token_ids=None) | {"prompt_token_ids": None}
    assert stripped == expected


@pytest.mark.parametrize(
    "text",
    [
        '"logprobs":{"content":[',
        ']},"finish_reason":',
        '"token_ids":[1]',
        '"prompt_token_ids":[9]',
        '"routed_experts":"AA"',
        '\\"prompt_token_ids":[9]',
    ],
)
def test_keys_inside_texts_are_texts(text: str) -> None:
    same(encode(answer("a", text, "b")))


def test_routes_come_back_to_the_agent() -> None:
    body = answer("a", routed_experts="QUJD")
    stripped = strip_answer(encode(body), HIDDEN)
    assert stripped.pieces is not None
    assert json.loads(stripped.body)["choices"][0]["routed_experts"] == "QUJD"
    same(encode(body))


@pytest.mark.parametrize(
    "body",
    [
        encode(answer("a", "\ufffd")),
        encode(answer("token_id:7")),
        encode(answer("a", token_ids=None)),
        encode(answer("a", token_ids=["x]"])),
        encode(answer("a", other={"token_ids": [1]}, token_ids=None)),
        encode(answer("a") | {"prompt_token_ids": None, "more": {"prompt_token_ids": [1]}}),
        encode(answer("a") | {"choices": answer("a")["choices"] * 2}),
        encode(answer("a"))[:-1],
        json.dumps(answer("a")).encode(),
        b"",
    ],
)
def test_other_answers_are_parsed_as_a_whole(body: bytes) -> None:
    assert take_apart(body) is None
    asked = strip_answer(encode(answer("a")), AS_GIVEN)
    assert asked.pieces is None
    assert asked.body == encode(answer("a"))


@given(st.lists(st.lists(st.integers(0, 99_999_999), min_size=1), min_size=1, max_size=3))
def test_ids_are_read(lists: list[list[int]]) -> None:
    read = read_all_ids(*(json.dumps(ids, separators=(",", ":")).encode() for ids in lists))
    assert read is not None
    assert [ids.tolist() for ids in read] == lists
    assert {ids.dtype for ids in read} == {np.dtype(np.int32)}


@pytest.mark.parametrize(
    "array",
    [
        *(b"[]", b"[1,,2]", b"[,1]", b"[1,]", b"[1, 2]", b"[-1]", b"[1.5]", b"[123456789]"),
        *(b"12345", b'"1,2"'),
    ],
)
def test_other_arrays_are_left_to_the_parser(array: bytes) -> None:
    assert read_ids(array) is None
    assert read_all_ids(b"[1,2]", array) is None
    assert read_all_ids(array, b"[1,2]") is None


def test_memory_of_a_large_answer_is_a_few_times_its_size() -> None:
    """10 MB of JSON, as 60,000 tokens: what the agent gets, what the fold needs, and the body."""
    body = encode(answer(*["token"] * 100_000))
    assert len(body) > 8 << 20
    tracemalloc.start()
    try:
        stripped = strip_answer(body, HIDDEN)
        assert stripped.pieces is not None
        held_bytes, _ = tracemalloc.get_traced_memory()
        fold_answer(stripped.pieces, HIDDEN, Vllm(), expect_routes=False)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held_bytes < 3 * len(body)
    assert peak_bytes < 4 * len(body)

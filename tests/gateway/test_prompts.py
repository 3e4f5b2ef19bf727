"""Ends of earlier answers inside a prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftgate.gateway import prompts
from driftgate.gateway.prompts import Prompt, read_prompt

TEXTS = st.text("ab", max_size=40)


@given(earlier=st.lists(st.tuples(TEXTS, TEXTS), max_size=20), asked=TEXTS)
def test_the_ends_that_a_search_by_hand_finds(earlier: list[tuple[str, str]], asked: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "BLOCK_BYTES", 8)
        ends = [Prompt.of_text(prompt).after_text(sampled) for prompt, sampled in earlier]
        lengths: dict[bytes, set[int]] = {}
        for end in ends:
            assert end is not None
            lengths.setdefault(end.block, set()).add(len(end.tail))
        keys = {end.key for end in ends if end}
        found = [n for n, key in Prompt.of_text(asked).known_ends(lengths.get) if key in keys]
    wholes = {prompt + sampled for prompt, sampled in earlier}
    assert found == sorted((len(w) for w in wholes if asked.startswith(w)), reverse=True)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("héy", ("text", 4)),
        (["hi"], ("text", 2)),
        ([1, 2], ("ids", 8)),
        ([[1, 2]], ("ids", 8)),
        (["hi", "ho"], None),
        ([[1], [2]], None),
        ([1, "a"], None),
        ([True], None),
        ([2**40], None),
        ({}, None),
        (None, None),
    ],
)
def test_what_a_request_can_hold(prompt: Any, found: tuple[str, int] | None) -> None:
    read = read_prompt(json.dumps(prompt).encode())
    assert (None if read is None else (read.kind, len(read))) == found


def test_a_text_and_ids_of_equal_bytes_are_not_equal() -> None:
    text, ids = Prompt.of_text("a\0\0\0"), Prompt.of_ids([ord("a")])
    assert ids is not None
    one, other = text.after_text("b\0\0\0"), ids.after_ids([ord("b")])
    assert one is not None
    assert other is not None
    assert one.tail == other.tail
    assert one.key != other.key


def test_what_was_sampled_behind_an_echo() -> None:
    prompt = Prompt.of_text("ab")
    assert prompt.after_text("abc", echoed=True) == prompt.after_text("c")
    assert prompt.after_text("xc", echoed=True) is None

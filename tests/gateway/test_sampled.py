"""Which answer of ours a request goes on from: another spelling of it, never an edit."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec import Raw

from driftgate.gateway.sampled import HIDDEN, Chain, Memory, Sampled, read_chain

USER = {"role": "user", "content": "hi"}
NEXT = {"role": "user", "content": "and then?"}


def chain(messages: list[Any], tokenizer: str | None = None, **fields: Any) -> Chain:
    body = {"model": "tiny", "messages": messages, **fields}
    found = read_chain({k: Raw(json.dumps(v).encode()) for k, v in body.items()}, tokenizer)
    assert found is not None
    return found


def call(arguments: str, call_id: str = "a") -> dict[str, Any]:
    function = {"name": "read", "arguments": arguments}
    calls = [{"id": call_id, "type": "function", "function": function}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def said(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def remember(memory: Memory, asked: Chain, answer: dict[str, Any], name: str = "c0.0") -> None:
    link = asked.after(answer)
    ids = str([len(name), *name.encode()]).replace(" ", "").encode()
    memory.put(
        link, Sampled(name, "run", link.tool_ids, link.thoughts, asked.varying, b"[1,2]", ids)
    )


def found(answer: dict[str, Any], back: dict[str, Any]) -> tuple[bool, str | None]:
    memory = Memory()
    remember(memory, chain([USER]), answer)
    known, why = memory.find(chain([USER, back, NEXT]), "run")
    return known is not None, why


@pytest.mark.parametrize(
    ("answer", "back"),
    [
        (said(" Yes.\n"), said("Yes.")),
        (said("Yes.", reasoning="hm"), said("Yes.")),
        (said("Yes.", reasoning="hm"), said("Yes.", reasoning="hm")),
        (said("Yes.", reasoning="hm"), said("Yes.", reasoning_content="hm")),
        (said("Yes.", refusal=None, annotations=None), said("Yes.")),
        (said("Yes."), said([{"type": "text", "text": "Yes."}])),  # type: ignore[arg-type]
        (call('{"a": 1, "b": [2]}'), call('{"b":[2],"a":1}', "renamed")),
    ],
)
def test_another_spelling_is_the_same_turn(answer: dict[str, Any], back: dict[str, Any]) -> None:
    assert found(answer, back) == (True, None)


@pytest.mark.parametrize(
    ("answer", "back"),
    [
        (said("<think>hm</think> Yes."), said("Yes.")),
        (said("Yes, sir."), said("Yes.")),
        (said("Yes.", reasoning="hm"), said("Yes.", reasoning="ah")),
        (said("Yes."), said("Yes.", reasoning="hm")),
        (said("Yes."), said("Yes.", prefix=True)),
        (call('{"a": 1}'), call('{"a": 2}')),
        (call('{"a": 1}'), said("")),
    ],
)
def test_an_edit_is_not(answer: dict[str, Any], back: dict[str, Any]) -> None:
    was_found, why = found(answer, back)
    assert not was_found
    assert why is not None
    assert why.startswith("message 1: ")


def test_reasoning_that_was_left_out_once_can_come_back() -> None:
    memory = Memory()
    remember(memory, chain([USER]), said("One.", reasoning="hm"), "c0.0")
    second = chain([USER, said("One."), NEXT])
    known, _ = memory.find(second, "run")
    assert known is not None
    link = second.after(said("Two."))
    link = link._replace(thoughts=(*known.thoughts, *link.thoughts[1:]))
    memory.put(link, Sampled("c1.0", "run", frozenset(), link.thoughts, {}, b"[1]", b"[2]"))
    for reasoning, fits in ((None, "c1.0"), ("hm", "c1.0"), ("ah", None)):
        history = [USER, said("One.", reasoning=reasoning), NEXT, said("Two."), NEXT]
        known, _ = memory.find(chain(history), "run")
        assert (known and known.sampled.trace_id) == fits


def test_another_tokenizer_gives_other_ids() -> None:
    memory = Memory()
    remember(memory, chain([USER], "old"), said("Yes."))
    history = [USER, said("Yes."), NEXT]
    assert memory.find(chain(history, "old"), "run")[0] is not None
    assert memory.find(chain(history, "new"), "run")[0] is None


def test_calls_ids_tell_equal_samples_apart() -> None:
    memory = Memory()
    for name in ("a", "b"):
        remember(memory, chain([USER]), call("{}", name), f"c0.{name}")
    known, _ = memory.find(chain([USER, call("{}", "b"), NEXT]), "run")
    assert known is not None
    assert known.sampled.trace_id == "c0.b"
    assert memory.find(chain([USER, call("{}", "renamed"), NEXT]), "run") == (
        None,
        "message 1: 2 samples of this run read the same",
    )


def test_memory_is_bounded_and_forgets_what_was_not_used() -> None:
    memory = Memory(max_bytes=3000)
    for turn in range(3):
        remember(memory, chain([USER], seed=turn), said(f"{turn}"), f"c{turn}.0")
        memory.find(chain([USER, said("0"), NEXT]), "run")
    kept = [memory.find(chain([USER, said(f"{n}"), NEXT]), "run")[0] for n in range(3)]
    assert [known is not None for known in kept] == [True, False, True]


def test_a_thousand_turns_are_one_walk() -> None:
    messages: list[Any] = [USER]
    for turn in range(1000):
        messages += [said(f"{turn}"), NEXT]
    found_chain = chain(messages)
    assert len(found_chain.answers) == 1000
    memory = Memory()
    remember(memory, chain(messages[:-2]), messages[-2])
    known, _ = memory.find(found_chain, "run")
    assert known is not None
    assert known.position == len(messages) - 2


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_several_parts_are_not_the_text_that_they_join_to(role: str) -> None:
    def digest(*texts: str) -> bytes:
        parts = [{"type": "text", "text": text, "cache_control": {}} for text in texts]
        return chain([{"role": role, "content": parts}]).end.digest

    whole = chain([{"role": role, "content": "ab"}]).end.digest
    assert digest("ab") == whole  # a template's content is a text in the end
    assert len({whole, digest("a", "b"), digest("a", "", "b")}) == 3


@pytest.mark.parametrize(
    ("answer", "spoken", "more"),
    [
        (said("Yes."), "Yes.<|im_end|>", False),
        (said(" Yes."), "\nYes.STOP", False),
        (said("Yes."), None, False),
        (said("Yes."), "</think>\n\nYes.", True),
        (said(""), "<|im_end|>", False),
        (said(""), "<think></think>", True),
        (call("{}"), '<tool_call>{"name": "think"}', False),
        (call("{}"), '</think><tool_call>{"name": "read"}', True),
        (call("{}"), '<|END_THINKING|>{"name": "read"}', True),
    ],
)
def test_marks_of_empty_reasoning_are_reasoning(
    answer: dict[str, Any], spoken: str | None, more: bool
) -> None:
    assert (chain([USER]).after(answer, spoken).thoughts == (HIDDEN,)) is more
    assert chain([USER], include_reasoning=False).after(answer).thoughts == (HIDDEN,)
    told = chain([USER]).after({**answer, "reasoning": "hm"}, spoken).thoughts
    assert told not in ((None,), (HIDDEN,))

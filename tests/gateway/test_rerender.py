"""What a template puts behind an answer, against texts written by hand, with a real tokenizer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from msgspec import Raw

from driftgate.gateway import rerender
from driftgate.gateway.sampled import Known, Sampled
from driftgate.testing.checkpoints import CHAT_TEMPLATE, make_tokenizer
from tests.core.rendered import FORGETFUL, TOOLS, UNTHINKING, Run, parsed, tool, user

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNENDED = CHAT_TEMPLATE.replace(
    "{{- '<|im_end|>\\n' }}\n    {%- elif message.role == 'tool'", "{%- elif message.role == 'tool'"
)
"""As GLM's: an answer ends where the next turn begins, with a token that is sampled as the end."""

PLAIN = (
    "{%- for message in messages %}{{- message.role + ': ' + message.content + '\\n\\n' }}"
    "{%- endfor %}{{- 'assistant:' }}"
)
"""Turns without control tokens."""

ONLY_USER = CHAT_TEMPLATE.replace("message.role == 'assistant'", "message.role == 'nobody'")

NEXT = "<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n"
TEMPLATES = {
    "chatml": (CHAT_TEMPLATE, "<|im_end|>\n" + NEXT),
    "drops reasoning": (FORGETFUL, "<|im_end|>\n" + NEXT),
    "puts empty reasoning before answers": (
        UNTHINKING,
        "<|im_end|>\n" + NEXT + "<think>\n\n</think>\n\n",
    ),
    "does not end turns": (UNENDED, NEXT),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def behind(
    run: Run, messages: list[dict[str, Any]], position: int, sampled: str, tools: Any = None
) -> list[int] | str:
    """As ``gateway.exact`` asks for it."""
    fields = {"messages": Raw(json.dumps(messages).encode())}
    last_id = int(run.ids(sampled)[-1])
    answer = Sampled("a", "run", frozenset(), (), {}, b"[1]", b"[2]")
    asked = rerender.asked(fields, Known(position, answer, ()), {})

    def rendering(body: bytes) -> Any:
        return run.render(json.loads(body)["messages"], tools)

    rendered = [rendering(asked.first), rendering(asked.second)]
    if asked.plain is not None:
        if not rerender.ends_turns([rendering(body) for body in asked.plain], last_id):
            return "cut"
        return rerender.behind_calls(rendered, last_id)
    if rerender.needs_third(rendered, last_id):
        rendered.append(rendering(asked.third))
    return rerender.behind(rendered, last_id)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "sampled",
    [
        " forty two",
        "<think> let me see</think> forty two",
        "  forty\n\n",
        '<tool_call>\n{"name": "read", "arguments": {"path":"a"}}\n</tool_call>',
        ' so:\n<tool_call>\n{"name": "read", "arguments": {}}\n</tool_call>',
    ],
)
def test_an_ended_answer(tokenizer: PreTrainedTokenizerFast, name: str, sampled: str) -> None:
    template, expected = TEMPLATES[name]
    end = "<|im_start|>" if name == "does not end turns" else "<|im_end|>"
    run = Run(tokenizer, template)
    messages = [user("hi"), parsed(sampled), user("and then?")]
    found = behind(run, messages, 1, sampled + end)
    assert not isinstance(found, str), found
    assert tokenizer.decode(found) == expected.removeprefix(end)
    assert found == run.ids(expected).tolist()[1:]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_cut_answer_gets_the_end_of_its_turn(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    template, expected = TEMPLATES[name]
    messages = [user("hi"), parsed(" forty"), user("and then?")]
    assert behind(Run(tokenizer, template), messages, 1, " forty") == (
        Run(tokenizer, template).ids(expected).tolist()
    )


def test_where_nothing_breaks_it_is_the_ordinary_rendering(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    run = Run(tokenizer)
    messages = [user("hi"), parsed(" forty two"), user("and then?")]
    found = behind(run, messages, 1, " forty two<|im_end|>")
    assert isinstance(found, list)
    prompt = run.render(messages[:1], None).tolist()
    whole = run.render(messages, None).tolist()
    assert prompt + run.ids(" forty two<|im_end|>").tolist() + found == whole


def test_results_of_tools_and_later_answers_are_behind_it_as_rendered(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    call = '<tool_call>\n{"name": "read", "arguments": {"a": 1}}\n</tool_call>'
    messages = [user("hi"), parsed(call), tool("42"), parsed(" an edited one"), user("and then?")]
    found = behind(Run(tokenizer), messages, 1, call + "<|im_end|>", TOOLS)
    assert isinstance(found, list)
    assert tokenizer.decode(found) == (
        "\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n an edited one<|im_end|>\n" + NEXT
    )


@pytest.mark.parametrize(
    ("template", "sampled", "why"),
    [
        (CHAT_TEMPLATE, '<tool_call>\n{"name": "read", "arguments": {}}\n</tool_call>', "cut"),
        (PLAIN, " forty", "joins the end of a turn"),
        (ONLY_USER, " forty<|im_end|>", "does not show that answer"),
    ],
)
def test_what_cannot_be_known_is_said(
    tokenizer: PreTrainedTokenizerFast, template: str, sampled: str, why: str
) -> None:
    messages = [user("hi"), parsed(sampled.removesuffix("<|im_end|>")), user("and then?")]
    found = behind(Run(tokenizer, template), messages, 1, sampled)
    assert isinstance(found, str)
    assert why in found

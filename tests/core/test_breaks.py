"""Why a prefix broke: each cause as a real template makes it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.core.rendered import FORGETFUL, SYSTEM, TOOLS, UNTHINKING, Run, tool, user

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LONG = "First look at the files, then say what is wrong with them and why."
CALL = '<tool_call>\n{"name": "read", "arguments": {"path": "a.py"}}\n</tool_call>'


def begun(run: Run, sampled: str = LONG, **options: Any) -> list[dict[str, Any]]:
    """One call and its answer, with a next question."""
    messages = [SYSTEM, user("Help me.")]
    answer = run.ask(messages, sampled, **options)
    return [*messages, answer, user("Go on.")]


def test_an_unchanged_history_does_not_break(tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tokenizer)
    run.ask(begun(run), "ok")
    assert run.last().kind == "extension"


def test_reasoning_that_the_agent_drops(tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tokenizer, FORGETFUL)
    *history, answer, question = begun(run, "<think>hm, which one</think>" + LONG)
    run.ask([*history, {**answer, "reasoning": None}, question], "ok")
    node = run.last()
    assert node.broken is not None
    first = run.traces[0]
    assert first.prompt_ids is not None
    assert node.broken.position == len(first.prompt_ids)
    assert node.broken.was.startswith("<think>hm, which one</think>")
    assert node.broken.reasons[0].code == "reasoning_dropped"
    assert "came back without its reasoning" in node.broken.reasons[0].detail
    assert node.parent is None
    assert node.evidence == "messages"


def test_reasoning_that_the_template_drops(tokenizer: PreTrainedTokenizerFast) -> None:
    """It is kept while tools are used, and all of it goes at the next question."""
    run = Run(tokenizer, FORGETFUL)
    messages = [SYSTEM, user("Help me.")]
    for path in ("a.py", "b.py"):
        sampled = f"<think>I need {path}</think>" + CALL.replace("a.py", path)
        messages = [*messages, run.ask(messages, sampled), tool(f"{path} is empty")]
    messages = [*messages, run.ask(messages, LONG)]
    assert [node.kind for node in run.tree().nodes] == ["root", "extension", "extension"]
    run.ask([*messages, user("And then?")], "ok")
    node = run.last()
    assert node.broken is not None
    assert (node.kind, node.after) == ("broken", "c2.0")
    assert [reason.code for reason in node.broken.reasons] == ["reasoning_dropped"]
    assert "the chat template leaves it out" in node.broken.reasons[0].detail


def test_a_tool_call_that_the_template_writes_anew(tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tokenizer)
    sampled = CALL.replace('": "', '":"')
    messages = [SYSTEM, user("Help me.")]
    answer = run.ask(messages, sampled, tools=TOOLS)
    run.ask([*messages, answer, tool("empty")], "ok", tools=TOOLS)
    assert run.cause() == "tool_json_rerendered"
    node = run.last()
    assert node.broken is not None
    assert "sampled as" in node.broken.reasons[0].detail


def test_a_tool_call_that_the_agent_writes_anew(tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tokenizer)
    run.render = lambda messages, tools: run.ids(json.dumps(messages))  # type: ignore[method-assign]
    messages = [SYSTEM, user("Help me.")]
    answer = run.ask(messages, CALL)
    function = answer["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(json.loads(function["arguments"]), indent=1)
    run.ask([*messages, answer, tool("empty")], "ok")
    assert run.cause() == "tool_json_rerendered"
    node = run.last()
    assert node.broken is not None
    assert "became" in node.broken.reasons[0].detail


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        (TOOLS[:1], "removed: write"),
        ([*TOOLS, {"type": "function", "function": {"name": "run"}}], "added: run"),
        (TOOLS[::-1], "another order"),
        (None, "removed: read, write"),
    ],
)
def test_other_tools(tokenizer: PreTrainedTokenizerFast, tools: Any, said: str) -> None:
    run = Run(tokenizer)
    run.ask(begun(run, tools=TOOLS), "ok", tools=tools)
    node = run.last()
    assert node.broken is not None
    assert node.broken.reasons[0].code == "tools_changed"
    assert said in node.broken.reasons[0].detail


def test_another_model_with_another_template(tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tokenizer)
    messages = begun(run)
    run.template = run.template.replace("system\\n'", "system: '")
    run.ask(messages, "ok", model="other")
    assert run.cause() == "model_changed"


@pytest.mark.parametrize(
    ("line", "other", "fix"),
    [
        (
            "x-anthropic-billing-header: cc_version=2.1; cch=0001;",
            "x-anthropic-billing-header: cc_version=2.1; cch=9f2e;",
            "CLAUDE_CODE_ATTRIBUTION_HEADER=0",
        ),
        ("Now it is 10:15.", "Now it is 10:16.", "take the date or time out"),
        ("Be brief.", "Be long.", "keep it the same"),
    ],
)
def test_a_system_line(tokenizer: PreTrainedTokenizerFast, line: str, other: str, fix: str) -> None:
    run = Run(tokenizer)
    messages = [{"role": "system", "content": f"You help.\n{line}"}, user("Help me.")]
    answer = run.ask(messages, LONG)
    messages[0] = {"role": "system", "content": f"You help.\n{other}"}
    run.ask([*messages, answer, user("Go on.")], "ok")
    node = run.last()
    assert node.broken is not None
    (reason,) = node.broken.reasons
    assert reason.code == "system_changed"
    assert json.dumps(line) in reason.detail
    assert fix in reason.fix


def test_a_cut_answer_that_is_sent_back_longer(tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tokenizer)
    *history, answer, question = begun(run, LONG[:-3], end="")
    answer = {**answer, "content": LONG}
    run.ask([*history, answer, question], "ok")
    assert run.cause() == "answer_extended"
    assert run.last().evidence == "tokens"


def test_a_cut_answer_that_is_sent_back_as_it_came(tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tokenizer)
    run.ask(begun(run, LONG, end=""), "ok")
    assert run.last().kind == "extension"


def test_a_tool_result_that_is_shortened_later(tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tokenizer)
    messages = [SYSTEM, user("Help me.")]
    messages = [*messages, run.ask(messages, CALL), tool("line\n" * 30)]
    messages = [*messages, run.ask(messages, LONG), user("Go on.")]
    messages[3] = tool("[old result cleared]")
    run.ask(messages, "ok")
    node = run.last()
    assert node.broken is not None
    assert (node.parent, node.after) == ("c0.0", "c1.0")
    assert node.broken.reasons[0].code == "history_edited"
    assert "message 3 (tool)" in node.broken.reasons[0].detail


def test_messages_that_are_taken_out(tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tokenizer)
    messages = begun(run)
    messages = [*messages, run.ask(messages, LONG + " It is fine."), user("And?")]
    run.ask([messages[0], *messages[3:]], "ok")
    assert run.cause() == "history_edited"
    assert run.last().after == "c1.0"


def test_the_same_text_in_other_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tokenizer)
    letters = [token for char in LONG for token in run.ids(char).tolist()]
    run.ask([SYSTEM, user("Say the words.")], LONG)  # so that the words' texts are known
    messages = begun(run, LONG, sampled_ids=[*letters, *run.ids("<|im_end|>").tolist()])
    run.ask(messages, "ok")
    node = run.last()
    assert node.broken is not None
    assert node.broken.reasons[0].code == "retokenised"
    assert LONG[1:].startswith(node.broken.was)


def test_a_generation_prompt_that_history_does_not_repeat(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    run = Run(tokenizer, UNTHINKING)
    run.ask(begun(run), "ok")
    node = run.last()
    assert node.broken is not None
    assert node.broken.reasons[0].code == "template_differs"
    first = run.traces[0]
    assert first.prompt_ids is not None
    assert node.broken.position < len(first.prompt_ids)


def test_what_no_request_explains(tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tokenizer)
    messages = begun(run)
    run.ask(messages[:-1], "ok")
    for trace in run.traces:
        object.__setattr__(trace, "request", b'{"prompt": "text"}')
    second = run.traces[1].prompt_ids
    assert second is not None
    edited = second.copy()
    first = run.traces[0].prompt_ids
    assert first is not None
    edited[len(first) + 2] = 1999
    object.__setattr__(run.traces[1], "prompt_ids", edited)
    node = run.last()
    assert node.broken is not None
    assert node.broken.reasons[0].code == "unknown_break"
    assert node.broken.position == len(first) + 2
    assert node.broken.now.startswith("⟨1999⟩")


def test_what_differs_behind_the_cause_is_told_too(tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tokenizer)
    messages = [*begun(run, tools=TOOLS)]
    messages[2] = {**messages[2], "content": "Something else, which nobody has sampled."}
    run.ask([*messages, run.ask(messages, LONG * 2, tools=TOOLS), user("And?")], "ok")
    node = run.last()
    assert node.broken is not None
    assert [r.code for r in node.broken.reasons] == ["tools_changed"]

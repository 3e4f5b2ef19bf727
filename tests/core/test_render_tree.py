"""A tree as a terminal shows it: short, whatever its size."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console

from driftgate.render_tree import tree as draw
from driftgate.testing.traces import make_trace
from driftgate.trace import Continuation, Trace
from driftgate.tree import Tree, build_tree
from tests.core.rendered import FORGETFUL, SYSTEM, Run, agent, user

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

START = [SYSTEM, user("Help me.")]
THOUGHT = "<think>I have to look at it.</think>Look at the files, and say what is wrong with them."


def text(found: Tree) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(draw(found))
    return console.export_text()


def test_a_break_says_where_why_and_what_to_do(tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tokenizer, FORGETFUL)
    answer = run.ask(START, THOUGHT)
    run.ask([*START, {**answer, "reasoning": None}, user("Go on.")], "Yes.")
    shown = text(run.tree())
    assert "BROKEN after step 0" in shown
    assert "reasoning_dropped: message 2 came back without its reasoning (21 chars)" in shown
    assert "was “<think>I have to look at it.</think>" in shown
    assert "! reasoning_dropped ×1: send `reasoning` back" in shown
    tokens = run.tree().tokens
    assert f"{tokens.sent} sent, {tokens.once} scored once: 0.0% merge" in shown


def test_a_sub_agent_is_indented_and_named(tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tokenizer)
    answer = run.ask(START, "Look.", agent=agent("main"))
    run.ask([user("Look.")], "Yes.", agent=agent("child", "main"))
    run.ask([*START, answer, user("Go on.")], "Yes.", agent=agent("main"))
    lines = text(run.tree()).splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [["0", "root"], ["└", "1"], ["2", "extends"]]
    assert "sub-agent after step 0" in lines[1]
    assert lines[1].endswith("by headers  agent child")


def test_how_calls_went_on_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tokenizer)
    messages = [*START, run.ask(START, "Look."), user("Go on.")]
    exact = Continuation(way="exact", after="c0.0", kept=30)
    messages = [*messages, run.ask(messages, "Yes.", continuation=exact), user("Go on.")]
    for message in (3, 5):
        why = f"message {message}: its reasoning, or one before, came back changed"
        run.ask(messages, "No.", continuation=Continuation(way="ordinary", reason=why))
    assert "continuation" not in text(build_tree("t", [], dict[str, Trace]().get))
    shown = "exact ×1, ordinary (its reasoning, or one before, came back changed) ×2"
    assert f"exact continuation: {shown}" in text(run.tree())


def test_a_thousand_turns_are_two_lines() -> None:
    traces: list[Trace] = []
    for step in range(1000):
        base = traces[-1] if traces else None
        traces.append(make_trace(step=step, prompt=20, response=10, base=base, routed=False))
    by_id = {trace.meta.trace_id: trace for trace in traces}
    found = build_tree("t1", [trace.meta for trace in traces], by_id.__getitem__)
    lines = text(found).splitlines()[2:]
    assert len(lines) == 2
    assert lines[1].startswith("1 – 999   extends ×999  19,980 new prompt tokens, 9,990 sampled")


def test_a_thousand_branches_are_one_line_below_their_root() -> None:
    root = make_trace(routed=False)
    fan = [make_trace(step=n, base=root, routed=False) for n in range(1, 1001)]
    by_id = {trace.meta.trace_id: trace for trace in [root, *fan]}
    found = build_tree("t1", [trace.meta for trace in by_id.values()], by_id.__getitem__)
    lines = text(found).splitlines()[2:]
    assert [line.split()[:3] for line in lines] == [
        ["0", "root", "12"],
        ["└", "2", "–"],
        ["1", "extends", "12"],
    ]


def test_texts_cannot_steer_the_terminal(tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tokenizer)
    answer = run.ask(START, "Look at the files, and say what is wrong with them.")
    edited = {**answer, "content": "\x1b[31mred"}
    run.ask([*START, edited, user("Go on.")], "Yes.")
    assert "\x1b[31m" not in text(run.tree())
    assert "BROKEN" in text(run.tree())

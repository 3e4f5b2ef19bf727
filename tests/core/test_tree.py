"""The shapes that a run can have, from the tokens of a real template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given

from driftgate import forest
from driftgate.forest import Forest
from driftgate.samples import lines
from driftgate.teacher.sequences import assemble
from driftgate.testing.traces import make_trace
from driftgate.testing.trajectories import runs
from driftgate.trace import I32, Trace
from driftgate.tree import Node, Tree, build_tree
from tests.core.rendered import SYSTEM, Run, agent, parsed, tool, user

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

START = [SYSTEM, user("Help me.")]
PLAN = "First look at the files, then say what is wrong with them and why."
TASK = "Read every file in the folder and tell me which of them is empty."
SPAWN = '<tool_call>\n{"name": "agent", "arguments": {"prompt": "' + TASK + '"}}\n</tool_call>'
TRANSFER = '<tool_call>\n{"name": "transfer_to_writer", "arguments": {}}\n</tool_call>'

MAIN: dict[str, Any] = {"agent": agent("main")}


@pytest.fixture
def run(tokenizer: PreTrainedTokenizerFast) -> Run:
    return Run(tokenizer)


def place(node: Node) -> tuple[str, str | None, str | None, str | None]:
    return node.kind, node.parent, node.after, node.evidence


def test_extensions(run: Run) -> None:
    messages: list[Any] = START
    for turn in range(3):
        messages = [*messages, run.ask(messages, f"Answer {turn}."), user(f"And {turn}?")]
    assert [place(node) for node in run.tree().nodes] == [
        ("root", None, None, None),
        ("extension", "c0.0", "c0.0", "tokens"),
        ("extension", "c1.0", "c1.0", "tokens"),
    ]


def test_a_regenerated_turn(run: Run) -> None:
    messages = [*START, run.ask(START, PLAN), user("Go on.")]
    run.ask(messages, "One.")
    run.ask(messages, "Two.")
    assert place(run.last()) == ("branch", "c0.0", "c1.0", "tokens")
    assert run.last().known == run.last().prompt_len


def test_a_regenerated_first_turn(run: Run) -> None:
    run.ask(START, "One.")
    run.ask(START, "Two.")
    assert place(run.last()) == ("branch", None, "c0.0", "tokens")


def test_an_edited_turn(run: Run) -> None:
    messages = [*START, run.ask(START, PLAN)]
    run.ask([*messages, user("Go on.")], "One.")
    run.ask([*messages, user("Stop.")], "Two.")
    assert place(run.last()) == ("branch", "c0.0", "c0.0", "tokens")


def test_parallel_calls(run: Run) -> None:
    messages = [*START, run.ask(START, PLAN)]
    run.ask([*messages, user("Go left.")], "One.")
    run.ask([*messages, user("Go right.")], "Two.", beside=True)
    assert {node.kind for node in run.tree().nodes} == {"root", "extension", "parallel"}


def test_choices_are_siblings_and_each_can_be_continued(run: Run) -> None:
    first = run.ask(START, "Left it is.", choices=("Right it is.",))
    second = parsed("Right it is.")
    for message in (first, second):
        run.ask([*START, message, user("Go on.")], "Yes.")
    nodes = run.tree().nodes
    assert place(nodes[1]) == ("choice", None, "c0.0", "tokens")
    assert [place(node)[:2] for node in nodes[2:]] == [
        ("extension", "c0.0"),
        ("extension", "c0.1"),
    ]


def test_equal_choices_are_ambiguous(run: Run) -> None:
    answer = run.ask(START, "Yes.", choices=("Yes.",))
    run.ask([*START, answer, user("Go on.")], "One.")
    assert place(run.last())[:2] == ("extension", "c0.0")
    assert run.last().ambiguous == ["c0.1"]


def test_a_sub_agent_is_linked_to_its_parents_last_call(run: Run) -> None:
    messages = [*START, run.ask(START, SPAWN, **MAIN)]
    child: dict[str, Any] = {"agent": agent("child", "main", kind="Explore")}
    inner = [{"role": "system", "content": "You explore."}, user("Look around.")]
    inner = [*inner, run.ask(inner, "Done.", **child), user("Go on.")]
    run.ask(inner, "Yes.", **child)
    run.ask(inner[:2], "Mine.", agent=agent("grandchild", "child"))
    run.ask([*messages, tool("Nothing is there.")], "Good.", **MAIN)
    assert [place(node) for node in run.tree().nodes[1:]] == [
        ("sub_agent", None, "c0.0", "headers"),
        ("extension", "c1.0", "c1.0", "tokens"),
        ("sub_agent", None, "c2.0", "headers"),
        ("extension", "c0.0", "c0.0", "tokens"),
    ]


def test_a_sub_agent_that_takes_the_context_over(run: Run) -> None:
    """A fork begins with its parent's tokens, and is a sub-agent all the same."""
    messages = [*START, run.ask(START, PLAN, **MAIN)]
    run.ask([*messages, user("Try it.")], "One.", agent=agent("fork", "main"))
    assert place(run.last()) == ("sub_agent", "c0.0", "c0.0", "headers")


def test_a_parent_in_another_trajectory_is_named(run: Run) -> None:
    run.ask(START, "One.", agent=agent("child", "elsewhere"))
    assert place(run.last()) == ("sub_agent", None, None, "headers")
    assert run.tree().outside == ["elsewhere"]


@pytest.mark.parametrize("after", [{"compacted": True}, {"window": "main:1"}])
def test_a_compaction_that_headers_tell(run: Run, after: dict[str, Any]) -> None:
    run.ask(START, PLAN, agent=agent("main", window="main:0" if "window" in after else None))
    run.ask([SYSTEM, user("Summary: a plan was made.")], "Yes.", agent=agent("main", **after))
    assert place(run.last()) == ("compaction", None, "c0.0", "headers")


def test_a_compaction_that_quotes_its_summary(run: Run) -> None:
    messages = [*START, run.ask(START, "I begin."), user("Sum it up.")]
    run.ask(messages, PLAN)
    run.ask([SYSTEM, user(f"It was said before: {PLAN} Go on from there.")], "Yes.")
    assert place(run.last()) == ("compaction", None, "c1.0", "text")


def test_a_sub_agent_that_quotes_its_task(run: Run) -> None:
    run.ask(START, SPAWN)
    run.ask([{"role": "system", "content": "You read files."}, user(TASK)], "None.")
    assert place(run.last()) == ("sub_agent", None, "c0.0", "text")


def test_what_nothing_proves_is_a_root(run: Run) -> None:
    run.ask(START, "Done.")
    run.ask([SYSTEM, user("Say when you are Done. Or not.")], "Yes.")
    assert place(run.last()) == ("root", None, None, None)


def test_a_retried_answer_is_no_sample(run: Run) -> None:
    run.ask(START, "Cut before it arri", end="")
    answer = run.ask(START, PLAN, step=0, retry=1)
    run.ask([*START, answer, user("Go on.")], "Yes.")
    tree = run.tree()
    assert [(node.kind, node.retry) for node in tree.nodes] == [
        ("retried", 0),
        ("root", 1),
        ("extension", 0),
    ]
    assert tree.samples == 2
    assert tree.tokens.once == len(whole(run.traces[2]))


def test_an_answer_without_tokens_has_no_place() -> None:
    trace = make_trace()
    object.__setattr__(trace, "prompt_ids", None)
    (node,) = build_tree("t1", [trace.meta], lambda _: trace).nodes
    assert node.kind == "no_tokens"
    assert build_tree("t1", [trace.meta], lambda _: None).nodes == [node]


# Independent formulas, over random runs of three tokens.


def whole(trace: Trace) -> tuple[int, ...]:
    assert trace.prompt_ids is not None
    assert trace.response_ids is not None
    return (*trace.prompt_ids.tolist(), *trace.response_ids.tolist())


def tree_of(traces: list[Trace]) -> Tree:
    by_id = {trace.meta.trace_id: trace for trace in traces}
    return build_tree("t1", [trace.meta for trace in traces], by_id.__getitem__)


def prefixes(tokens: tuple[int, ...]) -> set[tuple[int, ...]]:
    return {tokens[: n + 1] for n in range(len(tokens))}


@given(traces=runs())
def test_tokens_are_counted_once_where_calls_merge(traces: list[Trace]) -> None:
    found = tree_of(traces).tokens
    every = [whole(trace) for trace in traces]
    ends = {one for one in every if not any(o[: len(one)] == one for o in every if o != one)}
    assert found.sent == sum(map(len, every))
    assert found.lines == len(ends)
    assert found.once == sum(map(len, ends))
    assert found.distinct == len(set().union(*map(prefixes, every)))


@given(traces=runs())
def test_the_lines_are_those_that_the_teacher_scores(traces: list[Trace]) -> None:
    """But for a line whose last token alone is another: that token is never fed."""
    found = tree_of(traces).tokens
    sequences = assemble(traces)
    assert len(sequences) <= found.lines
    assert sum(len(s.ids) + 1 for s in sequences) <= found.once
    if len(sequences) == found.lines:
        assert sum(len(s.ids) + 1 for s in sequences) == found.once


@given(traces=runs())
def test_a_parent_is_the_longest_earlier_call_that_a_prompt_begins_with(
    traces: list[Trace],
) -> None:
    by_id = {trace.meta.trace_id: trace for trace in traces}
    for index, node in enumerate(tree_of(traces).nodes):
        prompt = traces[index].prompt_ids
        assert prompt is not None
        earlier = [whole(trace) for trace in traces[:index]]
        begun = [one for one in earlier if tuple(prompt[: len(one)].tolist()) == one]
        expected = max(map(len, begun), default=0)
        assert (len(whole(by_id[node.parent])) if node.parent else 0) == expected


# Size.


class Compared:
    """Counts the ids that are compared."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ids = 0
        original = forest._common

        def counted(a: I32, b: I32) -> int:
            self.ids += min(len(a), len(b))
            return original(a, b)

        monkeypatch.setattr(forest, "_common", counted)


def test_a_thousand_turns_cost_two_comparisons_each(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = Compared(monkeypatch)
    traces: list[Trace] = []
    for step in range(1000):
        base = traces[-1] if traces else None
        traces.append(make_trace(step=step, prompt=20, response=10, base=base, routed=False))
    tree = tree_of(traces)
    assert tree.kinds == {"root": 1, "extension": 999}
    assert tree.tokens.lines == 1
    assert tree.tokens.once == tree.tokens.distinct == len(whole(traces[-1]))
    assert compared.ids <= 2 * tree.tokens.sent


def test_a_thousand_branches_cost_two_comparisons_each(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = Compared(monkeypatch)
    root = make_trace(prompt=400, routed=False)
    fan = [make_trace(step=n, prompt=20, base=root, routed=False) for n in range(1, 1001)]
    tree = tree_of([root, *fan])
    assert tree.kinds == {"root": 1, "extension": 1, "branch": 999}
    assert tree.tokens.once == sum(len(whole(trace)) for trace in fan)
    assert compared.ids <= 3 * tree.tokens.sent


def test_a_forest_holds_each_token_once() -> None:
    found = Forest()
    ids = np.arange(100, dtype=np.int32)
    for index, size in enumerate((40, 80, 60)):
        found.add(index, ids[:size], ids[size : size + 10])
    assert (found.lines, found.distinct, found.whole) == (1, 90, 90)
    assert found.walk(ids).continued() == (90, [1])
    assert found.walk(ids[:75]).continued() == (70, [2])
    assert found.walk(ids[:75]).repeated() == (60, [2])


def test_samples_and_tree_agree_on_lines(run: Run) -> None:
    messages: list[Any] = START
    for turn in range(3):
        messages = [*messages, run.ask(messages, f"Answer {turn}."), user(f"And {turn}?")]
    pairs = [(t.prompt_ids, t.response_ids) for t in run.traces]
    assert len(lines([(p, r) for p, r in pairs if p is not None and r is not None])) == 1
    assert run.tree().tokens.lines == 1


def test_a_handoff_to_an_agent_with_its_own_system_message(run: Run) -> None:
    called = run.ask(START, TRANSFER)
    history = [called, tool("{}")]
    run.ask([{"role": "system", "content": "You write."}, START[1], *history], PLAN)
    assert place(run.last()) == ("handoff", None, "c0.0", "messages")
    run.ask([*START, *history, parsed(PLAN), user("Go on.")], "Done.")
    assert place(run.last()) == ("extension", "c0.0", "c0.0", "tokens")


def test_an_edited_history_after_a_transfer_is_no_handoff(run: Run) -> None:
    called = run.ask(START, TRANSFER)
    run.ask([START[0], user("Help us."), called, tool("{}")], PLAN)
    assert run.last().kind == "broken"

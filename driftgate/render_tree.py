"""Draws a run's tree for a terminal: as many lines as it has shapes, runs of equal calls are one.

Calls that go on in one context stand below one another; what leaves it (a branch, a parallel call,
a sub-agent, a further choice) is indented under the call that it left. Nothing recurses: a tree may
be 1,000 calls deep.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text

from driftgate.breaks import BREAKS
from driftgate.terminal import number, percent, safe
from driftgate.tree import Node, Tree
from driftgate.words import counted

__all__ = ["tree"]

GOES_ON = ("extension", "broken", "handoff", "compaction")
"""Kinds that stay in the column of the call that they follow."""

MAX_INDENT = 12
"""Deeper branches are not indented further."""

TEXT_CHARS = 40
"""Of the texts on both sides of a break."""

NAMES = {
    "root": "root",
    "extension": "extends",
    "branch": "branch",
    "parallel": "parallel call",
    "choice": "choice",
    "broken": "BROKEN",
    "handoff": "handoff",
    "sub_agent": "sub-agent",
    "compaction": "compaction",
    "retried": "retried, no sample",
    "no_tokens": "no tokens",
}
STYLES = {
    "broken": "bold red",
    "compaction": "yellow",
    "handoff": "cyan",
    "sub_agent": "cyan",
    "retried": "dim",
}


def tree(found: Tree) -> RenderableType:
    """The tree, the causes of its breaks with what to do, and how many tokens merge."""
    lines = [_head(found), *_body(found.nodes)]
    for code, count in sorted(found.breaks.items(), key=lambda item: -item[1]):
        line = Text("! ", "yellow").append(code, "bold").append(f" ×{count}: ", "default")
        lines.append(line.append(safe(_fix(found, code)), "default"))
    lines.extend(
        Text(safe(f"! agent {name}, which started one of these, made no call in this run"))
        for name in found.outside
    )
    return Group(*lines)


def _head(found: Tree) -> Text:
    tokens = found.tokens
    shapes = ", ".join(f"{count} {kind}" for kind, count in sorted(found.kinds.items()))
    text = Text("tree: ", "bold").append(counted(found.samples, "sample"))
    text.append(f" in {counted(tokens.lines, 'line')} ")
    text.append(f"({shapes or 'nothing'})\n", "dim")
    text.append(f"tokens: {number(tokens.sent)} sent, {number(tokens.once)} scored once: ")
    text.append(f"{percent(tokens.merged_share)} merge", "bold")
    ways = sorted(found.continuations.items(), key=lambda way: way[0] != "exact")
    if ways:
        text.append("\nexact continuation: ")
        told = (f"{why if why == 'exact' else f'ordinary ({why})'} ×{n}" for why, n in ways)
        text.append(safe(", ".join(told)))
    return text


def _fix(found: Tree, code: str) -> str:
    fixes = (n.broken.reasons[0] for n in found.nodes if n.broken)
    return next((r.fix for r in fixes if r.code == code), BREAKS[code][1])


def _body(nodes: Sequence[Node]) -> Iterator[Text]:
    known = {node.trace_id for node in nodes}
    heirs: dict[str, Node] = {}
    sides: defaultdict[str | None, list[Node]] = defaultdict(list)
    for node in nodes:
        after = node.after if node.after in known else None
        if after is not None and node.kind in GOES_ON and after not in heirs:
            heirs[after] = node
        else:
            sides[after].append(node)
    lone = {n.trace_id for n in nodes if n.trace_id not in heirs and n.trace_id not in sides}
    places = {node.trace_id: _place(node) for node in nodes}
    stack = [(group, 0, True) for group in reversed(list(_fans(sides[None], lone)))]
    while stack:
        run, depth, leaves = stack.pop()
        while len(run) == 1 or run[-1].trace_id in heirs:
            heir = heirs.get(run[-1].trace_id)
            if heir is None or run[-1].trace_id in sides or _shape(heir) != _shape(run[-1]):
                break
            run.append(heir)
        yield from _line(run, depth, leaves, places)
        last = run[-1].trace_id
        if last in heirs:
            stack.append(([heirs[last]], depth, False))
        fans = reversed(list(_fans(sides[last], lone)))
        stack.extend((group, depth + 1, True) for group in fans)


def _fans(nodes: Sequence[Node], lone: set[str]) -> Iterator[list[Node]]:
    """Neighbours of one shape that nothing follows are drawn as one."""
    for (alone, _), group in groupby(nodes, key=lambda n: (n.trace_id in lone, _shape(n))):
        members = list(group)
        yield from [members] if alone else ([member] for member in members)


def _shape(node: Node) -> tuple[str, str, str | None, bool]:
    cause = node.broken.reasons[0].code if node.broken else ""
    return node.kind, cause, node.agent, bool(node.ambiguous)


def _line(
    run: Sequence[Node], depth: int, leaves: bool, places: Mapping[str, str]
) -> Iterator[Text]:
    """``leaves``: its first call leaves the column of the one that it follows."""
    first, last = run[0], run[-1]
    indent = "  " * min(depth, MAX_INDENT) + (("└ " if leaves else "  ") if depth else "")
    place = _place(first) if len(run) == 1 else f"{_place(first)} – {_place(last)}"
    text = Text(f"{indent}{place:<9} ").append(NAMES[first.kind], STYLES.get(first.kind, "bold"))
    if len(run) > 1:
        text.append(f" ×{len(run)}")
    if first.kind not in ("extension", "root") and first.after is not None:
        after = places.get(first.after)
        text.append(safe(f" after step {after}" if after else f" after {first.after}"), "dim")
    text.append(_counts(run), "dim")
    if first.evidence not in (None, "tokens"):
        text.append(f"  by {first.evidence}", "dim")
    if first.agent is not None and first.kind in ("root", "sub_agent"):
        text.append(safe(f"  agent {first.agent}"), "dim")
    if first.ambiguous:
        text.append(f"  ambiguous: {len(first.ambiguous)} others could be meant", "yellow")
    yield text
    yield from _break(first, " " * (len(indent) + 10), "the first at" if len(run) > 1 else "at")


def _break(node: Node, indent: str, at: str) -> Iterator[Text]:
    if node.broken is None:
        return
    found = node.broken
    where = f"{indent}{at} token {number(found.position)} of {number(found.of)}: "
    cause, *others = found.reasons
    yield Text(where).append(cause.code, "bold").append(safe(f": {cause.detail}"), "default")
    yield Text(safe(f"{indent}was {_quoted(found.was)}  now {_quoted(found.now)}"), "dim")
    if others:
        yield Text(f"{indent}and behind it: {', '.join(reason.code for reason in others)}", "dim")


def _counts(run: Sequence[Node]) -> str:
    """Prompt tokens that are new here, and sampled ones."""
    if any(node.prompt_len is None or node.response_len is None for node in run):
        return ""
    new = sum((node.prompt_len or 0) - node.known for node in run)
    sampled = sum(node.response_len or 0 for node in run)
    return f"  {number(new)} new prompt tokens, {number(sampled)} sampled"


def _place(node: Node) -> str:
    return f"{node.step}.{node.choice}" if node.choice else str(node.step)


def _quoted(text: str) -> str:
    shown = text.replace("\n", "⏎")
    return f"“{shown if len(shown) <= TEXT_CHARS else shown[:TEXT_CHARS] + '…'}”"

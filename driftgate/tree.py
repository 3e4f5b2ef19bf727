"""The tree that a run really is: which call continues which, by exact tokens. Pure.

A call whose prompt begins with all tokens of an earlier one, prompt and answer, continues it; that
alone is an edge of the forest, and that alone can be trained as one sequence. A call that begins
afresh may still follow another one: a prefix that broke, a sub-agent, a compacted context. It is
linked where tokens, messages, headers or a quoted text prove it, and says which of them did. What
proves several things lists them in ``ambiguous``; what proves nothing is a root.

Traces are looked at in order of their start and are not kept: ids go into a
``driftgate.forest.Forest``, which holds each token once. A trace is loaded a second time only where
a prefix broke. ``driftgate.placing`` decides what a call follows; this module declares the result
and walks over the run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import msgspec

from driftgate.breaks import Broken
from driftgate.placing import Evidence, Found, Kind, Placing
from driftgate.trace import Trace, TraceMeta

__all__ = ["Node", "Tokens", "Tree", "build_tree", "retried_calls"]


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One stored answer in the tree."""

    trace_id: str
    step: int
    choice: int
    retry: int = 0
    kind: Kind
    parent: str | None = None
    """Trace whose tokens, prompt and answer, the prompt begins with."""
    after: str | None = None
    """Trace that it follows; ``parent`` where that is all there is to say. None for a root."""
    evidence: Evidence | None = None
    """None where ``after`` is."""
    ambiguous: list[str] = []
    """Traces that ``after`` could equally be; trajectories where the run itself is uncertain."""
    agent: str | None = None
    """By its headers."""
    prompt_len: int | None = None
    response_len: int | None = None
    known: int = 0
    """Leading prompt tokens that some earlier call of the run had as well."""
    broken: Broken | None = None
    """Set exactly for the kind ``broken``."""


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """What merging saves a trainer."""

    sent: int
    """Prompt and answer of every sample, as if each were a sequence of its own."""
    once: int
    """Fed when calls that continue one another are one sequence: one forward for each line."""
    distinct: int
    """Of those, tokens at different places of the tree: what prefix sharing between lines could
    come down to."""
    lines: int
    """Sequences."""

    @property
    def merged_share(self) -> float | None:
        """Share of ``sent`` that is not fed again; None where nothing was sent."""
        return 1 - self.once / self.sent if self.sent else None


class Tree(msgspec.Struct, frozen=True, kw_only=True):
    """A trajectory as a forest of calls."""

    trajectory: str
    nodes: list[Node]
    """In order of their start."""
    kinds: dict[str, int]
    """Nodes by kind."""
    breaks: dict[str, int]
    """Broken prefixes by their cause."""
    samples: int
    """Nodes without those that were retried."""
    tokens: Tokens
    continuations: dict[str, int] = {}
    """Calls with exact-token continuation: ``exact`` where it was done, else why it was not."""
    outside: list[str] = []
    """Agents that started one of this run's and made no call in it: with OpenCode the trajectory of
    the parent session."""


def build_tree(
    trajectory: str, metas: Sequence[TraceMeta], load: Callable[[str], Trace | None]
) -> Tree:
    """The tree of a trajectory's traces. ``load`` reads one; None where it is lost or damaged."""
    placing = Placing(load)
    retried = retried_calls(metas)
    nodes: list[Node] = []
    for call in _calls(metas):
        if call[0].call_id in retried:
            nodes += [_node(meta, Found(kind="retried")) for meta in call]
            continue
        nodes += [_node(meta, found) for meta, found in placing.call(call)]
    samples = [node for node in nodes if node.kind != "retried"]
    forest = placing.forest
    causes = (node.broken.reasons[0].code for node in nodes if node.broken)
    return Tree(
        trajectory=trajectory,
        nodes=nodes,
        kinds=dict(Counter[str](node.kind for node in nodes)),
        breaks=dict(Counter(causes)),
        samples=len(samples),
        tokens=Tokens(
            sent=sum((node.prompt_len or 0) + (node.response_len or 0) for node in samples),
            once=forest.whole,
            distinct=forest.distinct,
            lines=forest.lines,
        ),
        continuations=dict(Counter(_ways(metas))),
        outside=sorted(placing.outside),
    )


def _ways(metas: Sequence[TraceMeta]) -> Iterator[str]:
    """How each call went on, where exact continuation was asked for."""
    for meta in metas:
        if meta.choice == 0 and (how := meta.continuation) is not None:
            why = re.sub(r"^message \d+: ", "", how.reason or "")
            yield "exact" if how.way == "exact" else why


def _calls(metas: Sequence[TraceMeta]) -> Iterator[list[TraceMeta]]:
    """The answers of each call, in order of its start."""
    ordered = sorted(metas, key=lambda meta: (meta.started_ns, meta.call_id, meta.choice))
    for _, call in groupby(ordered, key=lambda meta: meta.call_id):
        yield list(call)


def retried_calls(metas: Sequence[TraceMeta]) -> set[str]:
    """Calls whose client asked again, and got an answer, because this one did not reach it."""
    last: dict[int, int] = {}
    for meta in metas:
        last[meta.step] = max(last.get(meta.step, 0), meta.retry)
    return {meta.call_id for meta in metas if meta.retry < last[meta.step]}


def _node(meta: TraceMeta, found: Found) -> Node:
    return Node(
        trace_id=meta.trace_id,
        step=meta.step,
        choice=meta.choice,
        retry=meta.retry,
        kind=found.kind,
        parent=found.parent,
        after=found.after,
        evidence=found.evidence,
        ambiguous=[*found.ambiguous, *meta.ambiguous],
        agent=meta.agent.id if meta.agent else None,
        prompt_len=found.prompt_len,
        response_len=found.response_len,
        known=found.known,
        broken=found.broken,
    )

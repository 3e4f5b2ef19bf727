"""What a call of a run follows, and what proves it: the rules behind ``driftgate.tree``. Pure.

The first rule that holds: the prompt begins with the tokens of a call that nothing continues yet;
headers name an agent that is new here, or a context that was compacted; an answer of ours is the
last one among the messages; the prompt begins with another call's prompt; it continues a call that
something else continues too; a text that was sampled is quoted in it; nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec
import numpy as np

from driftgate.breaks import Broken, Parted, why_broken
from driftgate.dialogue import Dialogue, Said, dialogue_of, read_answer
from driftgate.forest import Forest, Walk
from driftgate.trace import I32, Trace, TraceMeta

__all__ = ["Evidence", "Found", "Kind", "Placing"]

Kind = Literal[
    "root",
    "extension",
    "branch",
    "parallel",
    "choice",
    "broken",
    "handoff",
    "sub_agent",
    "compaction",
    "retried",
    "no_tokens",
]
"""``root``: begins afresh, nothing says after what. ``extension``: continues a call that nothing
else has continued before. ``branch``: continues one that something else did, or repeats its prompt:
an edited or regenerated turn. ``parallel``: a branch that was under way at the same time.
``choice``: a further answer of one call (``n`` > 1). ``broken``: follows a call without repeating
its tokens. ``handoff``: another agent, with a system message or tools of its own, takes over after
a call of ``transfer_to_…``. ``sub_agent``, ``compaction``: begins afresh after a call of another
agent, or after its context was summed up. ``retried``: the client asked again, and this answer is
no sample. ``no_tokens``: the engine gave none, or the trace cannot be read."""

Evidence = Literal["tokens", "messages", "headers", "text"]
"""What proves that a call follows another one: its tokens; an answer of ours among its messages;
the agent's headers; a text that was sampled, quoted in its messages."""

QUOTE_CHARS = 40
"""A sampled text that comes back is a sign of its answer from this length on: shorter ones
("Done.") come back by chance."""

QUOTED_CALLS = 64
"""Latest answers that are looked for as quotations, so that a fan of roots costs no square."""


@dataclass(slots=True, kw_only=True)
class Found:
    """Where an answer belongs; traces by id."""

    kind: Kind
    parent: str | None = None
    after: str | None = None
    evidence: Evidence | None = None
    ambiguous: list[str] = field(default_factory=list)
    broken: Broken | None = None
    prompt_len: int | None = None
    response_len: int | None = None
    known: int = 0


@dataclass(slots=True, eq=False)
class _Seen:
    """What is kept of a trace."""

    meta: TraceMeta
    end: int
    """Tokens of prompt and answer."""
    parent: _Seen | None
    continued: bool = False
    busy_until_ns: int = 0
    """End of the last call that continues it, or repeats its prompt."""
    summary: str = ""
    """Its text, where it is long enough to be known again."""
    tasks: tuple[str, ...] = ()
    """Texts in the arguments of its tool calls, likewise."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """One answer of the call that is being placed."""

    meta: TraceMeta
    trace: Trace
    prompt: I32
    response: I32
    walk: Walk


class Placing:
    """Places the calls of one run, in order of their start."""

    def __init__(self, load: Callable[[str], Trace | None]) -> None:
        self.forest = Forest()
        self.outside: set[str] = set()
        """Agents that started one of the run's and made no call in it."""
        self._load = load
        self._seen: list[_Seen] = []
        self._answers: dict[bytes, list[_Seen]] = {}
        self._agents: dict[str, list[_Seen]] = {}
        self._texts: dict[int, bytes] = {}

    def call(self, metas: Sequence[TraceMeta]) -> Iterator[tuple[TraceMeta, Found]]:
        """Each answer of one call and where it belongs."""
        placed: list[tuple[_Asked, Found, _Seen | None]] = []
        for meta in metas:
            asked = self._asked(meta)
            if asked is None:
                yield meta, Found(kind="no_tokens")
                continue
            twin = next((p for p in placed if np.array_equal(p[0].prompt, asked.prompt)), None)
            if twin is None:
                found, parent = self._find(asked)
            else:
                first, parent = twin[0].meta.trace_id, twin[2]
                found = Found(kind="choice", parent=twin[1].parent, after=first, evidence="tokens")
            found.prompt_len, found.response_len = len(asked.prompt), len(asked.response)
            found.known = asked.walk.common if twin is None else len(asked.prompt)
            placed.append((asked, found, parent))
            yield meta, found
        for asked, _, parent in placed:
            self._remember(asked, parent)

    def _asked(self, meta: TraceMeta) -> _Asked | None:
        trace = self._load(meta.trace_id)
        if trace is None or trace.prompt_ids is None or trace.response_ids is None:
            return None
        if not len(trace.prompt_ids):
            return None
        walk = self.forest.walk(trace.prompt_ids)
        return _Asked(meta, trace, trace.prompt_ids, trace.response_ids, walk)

    def _find(self, asked: _Asked) -> tuple[Found, _Seen | None]:
        """Where the call belongs, and the trace whose tokens it begins with."""
        end, indices = asked.walk.continued()
        parents = [self._seen[index] for index in indices]
        parent = next((p for p in parents if not p.continued), parents[0] if parents else None)
        twins = _ids(p for p in parents if p is not parent)
        if parent is not None and not parent.continued and _same_agent(parent.meta, asked.meta):
            found = _follows("extension", parent, "tokens", ambiguous=twins)
        else:
            found = self._by_rules(asked, parent, end)
            if parent is not None:
                found.ambiguous += twins
        found.parent = parent.meta.trace_id if parent else None
        return found, parent

    def _by_rules(self, asked: _Asked, parent: _Seen | None, end: int) -> Found:
        if (found := self._by_headers(asked.meta)) is not None:
            return found
        dialogue = dialogue_of(asked.trace)
        if dialogue is not None and (found := self._by_messages(asked, dialogue)) is not None:
            return found
        position, indices = asked.walk.repeated()
        if indices and position > end:
            before = [self._seen[index] for index in indices]
            if position < len(asked.prompt):
                return self._broken(asked, before, "tokens")
            return self._beside(asked.meta, before[0], ambiguous=[])
        if parent is not None:
            return self._beside(asked.meta, parent, ambiguous=[])
        quoted = self._by_quotes(dialogue) if dialogue is not None else None
        return quoted or Found(kind="root")

    def _beside(self, meta: TraceMeta, other: _Seen, *, ambiguous: list[str]) -> Found:
        """A second continuation of a call, or its prompt a second time."""
        under_way = meta.started_ns < other.busy_until_ns
        kind: Kind = "parallel" if under_way else "branch"
        other.busy_until_ns = max(other.busy_until_ns, meta.ended_ns)
        return _follows(kind, other, "tokens", ambiguous=ambiguous)

    def _by_headers(self, meta: TraceMeta) -> Found | None:
        """A new agent that says who started it, or one whose context is a new one."""
        agent = meta.agent
        if agent is None:
            return None
        own = self._agents.get(agent.id)
        if not own and agent.parent is not None:
            starters = self._agents.get(agent.parent)
            if not starters:
                self.outside.add(agent.parent)
                return Found(kind="sub_agent", evidence="headers")
            return _follows("sub_agent", _before(starters, meta), "headers")
        if own:
            last = _before(own, meta)
            window = last.meta.agent.window if last.meta.agent else None
            if agent.compacted or agent.window != window:
                return _follows("compaction", last, "headers")
        return None

    def _by_messages(self, asked: _Asked, dialogue: Dialogue) -> Found | None:
        """The last answer of ours among the messages, if its tokens are not in the prompt."""
        for turn in range(len(dialogue.messages) - 1, -1, -1):
            said = dialogue.messages[turn]
            givers = self._answers.get(said.key) if said.role == "assistant" else None
            if not givers:
                continue
            if any(self._is_in(giver, asked) for giver in givers):
                return None
            known = [g for g in givers if _same_agent(g.meta, asked.meta)] or givers
            if len(known) > 1 or not _telling(said):
                known = [g for g in known if self._stood_at(g, turn, dialogue)]
            if known and said.hands_over and self._head_of(known[-1]) != _head(dialogue):
                return _follows("handoff", known[-1], "messages", ambiguous=_ids(known[:-1]))
            if known:
                return self._broken(asked, known, "messages")
        return None

    def _is_in(self, giver: _Seen, asked: _Asked) -> bool:
        """The prompt begins with all of that call's tokens."""
        trace = self._load(giver.meta.trace_id) if giver.end <= asked.walk.common else None
        return trace is not None and np.array_equal(_whole(trace), asked.prompt[: giver.end])

    def _stood_at(self, giver: _Seen, turn: int, dialogue: Dialogue) -> bool:
        """That answer was given at the same place of a conversation with the same beginning."""
        trace = self._load(giver.meta.trace_id)
        old = dialogue_of(trace) if trace is not None else None
        return (
            old is not None
            and len(old.messages) == turn
            and (turn == 0 or old.messages[turn - 1] == dialogue.messages[turn - 1])
        )

    def _broken(self, asked: _Asked, givers: Sequence[_Seen], evidence: Evidence) -> Found:
        last = givers[-1]
        found = _follows("broken", last, evidence, ambiguous=_ids(givers[:-1]))
        trace = self._load(last.meta.trace_id)
        if trace is None:
            return replace(found, kind="root", after=None, evidence=None)
        position = _common(_whole(trace), asked.prompt)
        at, before = last, last.parent
        while before is not None and before.end > position:
            at, before = before, before.parent
        parted = Parted(
            last=trace,
            at=self._load(at.meta.trace_id) or trace,
            before=self._load(before.meta.trace_id) if before is not None else None,
            now=asked.trace,
            position=position,
        )
        found.broken = why_broken(parted, self._texts)
        return found

    def _by_quotes(self, dialogue: Dialogue) -> Found | None:
        """A call whose answer, or the argument of whose tool call, the messages quote in full.

        With the same system message and tools it is the same agent with its context summed up."""
        given = [said.text for said in dialogue.messages if said.role != "assistant"]
        for seen in reversed(self._seen[-QUOTED_CALLS:]):
            if any(task in text for task in seen.tasks for text in given):
                return _follows("sub_agent", seen, "text")
            if seen.summary and any(seen.summary in text for text in given):
                same = self._head_of(seen) == _head(dialogue)
                return _follows("compaction" if same else "sub_agent", seen, "text")
        return None

    def _head_of(self, seen: _Seen) -> bytes | None:
        trace = self._load(seen.meta.trace_id)
        dialogue = dialogue_of(trace) if trace is not None else None
        return _head(dialogue) if dialogue is not None else None

    def _remember(self, asked: _Asked, parent: _Seen | None) -> None:
        meta, trace = asked.meta, asked.trace
        seen = _Seen(meta, len(asked.prompt) + len(asked.response), parent, False, meta.ended_ns)
        if parent is not None:
            first = not parent.continued
            busy = meta.ended_ns if first else max(parent.busy_until_ns, meta.ended_ns)
            parent.continued, parent.busy_until_ns = True, busy
        self.forest.add(len(self._seen), asked.prompt, asked.response)
        self._seen.append(seen)
        if meta.agent is not None:
            self._agents.setdefault(meta.agent.id, []).append(seen)
        answer = read_answer(trace.response)
        if answer is not None:
            self._answers.setdefault(answer.key, []).append(seen)
            _keep_quotes(seen, answer)
        self._learn(asked.response, trace)

    def _learn(self, response: I32, trace: Trace) -> None:
        """The texts of tokens that were not sampled before."""
        offsets = trace.token_offsets
        if offsets is None or len(offsets) != len(response) + 1:
            return
        tokens, places = np.unique(response, return_index=True)
        for token, place in zip(tokens.tolist(), places.tolist(), strict=True):
            if token not in self._texts:
                self._texts[token] = trace.token_bytes[offsets[place] : offsets[place + 1]]


def _keep_quotes(seen: _Seen, answer: Said) -> None:
    text = answer.text.strip()
    seen.summary = text if len(text) >= QUOTE_CHARS else ""
    arguments = (value for call in answer.calls for value in _strings(call.arguments))
    seen.tasks = tuple(value for value in arguments if len(value) >= QUOTE_CHARS)


def _follows(
    kind: Kind, seen: _Seen, evidence: Evidence, *, ambiguous: Sequence[str] = ()
) -> Found:
    return Found(kind=kind, after=seen.meta.trace_id, evidence=evidence, ambiguous=list(ambiguous))


def _before(calls: Sequence[_Seen], meta: TraceMeta) -> _Seen:
    """The last that had ended when the call began; the last of all where none had."""
    ended = (seen for seen in reversed(calls) if seen.meta.ended_ns <= meta.started_ns)
    return next(ended, calls[-1])


def _ids(seen: Any) -> list[str]:
    return [one.meta.trace_id for one in seen]


def _same_agent(one: TraceMeta, other: TraceMeta) -> bool:
    return (one.agent and one.agent.id) == (other.agent and other.agent.id)


def _telling(said: Said) -> bool:
    """Long enough that it does not come back by chance."""
    return len(said.text) >= QUOTE_CHARS or bool(said.calls)


def _head(dialogue: Dialogue) -> bytes:
    """Model, tools and system messages."""
    system = [said.text for said in dialogue.messages if said.role in ("system", "developer")]
    return msgspec.json.encode([dialogue.model, list(dialogue.tools.items()), system])


def _strings(arguments: str) -> Iterator[str]:
    """The texts among the values of a tool call's arguments."""
    try:
        values = msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return
    yield from (value for value in values.values() if isinstance(value, str))


def _whole(trace: Trace) -> I32:
    assert trace.prompt_ids is not None
    assert trace.response_ids is not None
    return np.concatenate([trace.prompt_ids, trace.response_ids])


def _common(a: I32, b: I32) -> int:
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    return int(differ.argmax()) if differ.any() else size

"""Which trajectory and step a call belongs to (DESIGN 7). Pure: no clock, no I/O; lives on the
event loop.

The first rule that applies names the trajectory: URL, header, minted key, agents' session headers,
metadata, the response that the call names, the longest prefix of the conversation or prompt that
ends in an answer we gave, the last tool call of ours by its random id (after a handoff the system
message is another one, and a context that was cut has no such prefix), else a new one.
Nothing is guessed: a call without an answer of ours in it is a new trajectory even when its prompt
equals another's, and one that several trajectories could have led to is a new one that lists them.

Memory is bounded: least recently used trajectories, answers and calls are forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from driftgate.errors import RequestError
from driftgate.gateway.agents import read_agent
from driftgate.gateway.conversation import Conversation, Turn
from driftgate.gateway.history import History
from driftgate.gateway.keys import TrajectoryKeys, minted_keys
from driftgate.gateway.names import check_trajectory, is_trajectory, new_trajectory
from driftgate.gateway.prompts import End, Kind, Prompt
from driftgate.gateway.recent import Recent
from driftgate.trace import Agent, Attribution

if TYPE_CHECKING:
    from driftgate.gateway.telemetry import CallSpan

__all__ = [
    "TRAJECTORY_HEADER",
    "Begun",
    "Call",
    "Place",
    "Sessions",
]

TRAJECTORY_HEADER = "x-driftgate-trajectory"
SESSION_HEADERS = ("x-claude-code-session-id", "session-id", "x-session-id")
"""Claude Code, Codex, OpenCode."""

MAX_TRAJECTORIES = 50_000
"""Step counters kept; a forgotten one is read from the index again. About 10 MB."""

MAX_UNREAD = 10_000
"""Trajectories to be asked for again: those of an index that cannot be read for a while."""

MAX_TURNS = 100_000
"""Answers that can be continued: about 40 MB; an agent that comes back later starts a new
trajectory."""

MAX_TOOL_CALLS = 50_000
"""Ids that can be recognised: about 15 MB."""

MAX_CANDIDATES = 64
"""Equal answers kept apart by their tool-call ids: a large group of rollouts."""

MAX_CALLS = 20_000
"""Calls that a retry can repeat; SDKs retry within minutes."""

Scope: TypeAlias = tuple[str | None, str]
"""The trajectory where the agent named it, and the body's digest."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a call belongs, before it has a step."""

    trajectory: str
    attribution: Attribution
    ambiguous: tuple[str, ...] = ()
    agent: Agent | None = None

    @property
    def named(self) -> bool:
        """The agent named the trajectory itself."""
        return self.attribution not in ("prefix", "tool_call", "new")


@dataclass(slots=True, eq=False)
class Call:
    """One call under way or over."""

    call_id: str
    place: Place
    step: int
    retry: int
    body_sha256: str
    failed: bool = False
    repeated: bool = False
    """A retry of it has come."""
    span: CallSpan | None = None
    """Where spans are asked for."""


@dataclass(slots=True)
class _Known:
    """Trajectories that gave one and the same answer to the same conversation."""

    givers: tuple[tuple[str, frozenset[str]], ...] = ()
    """Nearly always one, of which a hundred thousand are kept: a tuple is the smallest."""

    def add(self, giver: tuple[str, frozenset[str]]) -> None:
        """One more, where it is none of them yet; the oldest makes room."""
        if giver not in self.givers:
            self.givers = (*self.givers, giver)[-MAX_CANDIDATES:]

    def trajectories(self, tool_ids: frozenset[str]) -> list[str]:
        """Those that could be meant by a history with these tool-call ids."""
        every = list(dict.fromkeys(trajectory for trajectory, _ in self.givers))
        if len(every) == 1:
            return every
        same = dict.fromkeys(trajectory for trajectory, ids in self.givers if ids == tool_ids)
        return list(same) or every


class Begun(NamedTuple):
    """How a trajectory began that could have been one of several others."""

    kind: Kind
    size_bytes: int
    """Of its first prompt."""
    instead_of: tuple[str, ...]


class Sessions:
    """What the gateway remembers of trajectories. Not thread-safe: use it on the event loop."""

    def __init__(self, keys: TrajectoryKeys | None = None) -> None:
        self._keys = keys or TrajectoryKeys()
        self._steps: Recent[str, int] = Recent(MAX_TRAJECTORIES)
        self._unread: set[str] = set()
        self._turns: Recent[bytes, _Known] = Recent(MAX_TURNS)
        self._lengths: Recent[bytes, set[int]] = Recent(MAX_TURNS)
        self._tool_calls: Recent[str, tuple[str, ...]] = Recent(MAX_TOOL_CALLS)
        self._begun: Recent[str, Begun] = Recent(MAX_TRAJECTORIES)
        self._calls: Recent[Scope, list[Call]] = Recent(MAX_CALLS)

    def mint(self, trajectory: str | None = None) -> tuple[str, str]:
        """``(trajectory, key)``: an API key that names the trajectory. RequestError for a bad name.

        The key is the trajectory's own: minting it again gives the same one.
        """
        name = new_trajectory() if trajectory is None else check_trajectory(trajectory)
        return name, self._keys.make(name)

    def owner(self, headers: Mapping[str, str]) -> str | None:
        """The only trajectory that the request's key opens; None where it carries none of a
        trajectory, and opens all. RequestError where it carries such keys and none is known."""
        keys = minted_keys(headers)
        for key in keys:  # the guard asks for one good key among them, not for the first
            if (trajectory := self._keys.trajectory_of(key)) is not None:
                return trajectory
        if keys:
            raise RequestError(
                "this driftgate key is not known: keys end with the gateway's process unless "
                "it has a signing_key; mint a new one with POST /api/trajectories"
            )
        return None

    def place(
        self,
        *,
        url: str | None,
        headers: Mapping[str, str],
        metadata: Mapping[str, Any] | None,
        history: History,
        previous: str | None = None,
    ) -> Place:
        """The first rule that applies. RequestError for an id or a minted key that is not valid.

        ``headers`` must find names in any case; ``previous``: the trajectory of the response that
        the call goes on from.
        """
        place = self._by_rules(url, headers, metadata, history, previous)
        agent = read_agent(headers)
        return place if agent is None else replace(place, agent=agent)

    def _by_rules(
        self,
        url: str | None,
        headers: Mapping[str, str],
        metadata: Mapping[str, Any] | None,
        history: History,
        previous: str | None,
    ) -> Place:
        if url is not None:
            return Place(check_trajectory(url), "url")
        if (named := headers.get(TRAJECTORY_HEADER)) is not None:
            return Place(check_trajectory(named), "header")
        if (trajectory := self.owner(headers)) is not None:
            return Place(trajectory, "key")
        for name in SESSION_HEADERS:
            if is_trajectory(headers.get(name)):
                return Place(headers[name], "session_header")
        if metadata and is_trajectory(named := metadata.get("trajectory_id")):
            return Place(named, "metadata")
        if previous is not None:
            return Place(previous, "previous_response")
        if isinstance(history, Conversation):
            found = self._givers_of_last_turn(history)
            return _one_of(found) if found else self._by_tool_call(history)
        if isinstance(history, Prompt):
            return self._by_ends(history)
        return Place(new_trajectory(), "new")

    def _givers_of_last_turn(self, conversation: Conversation) -> list[str]:
        for turn in reversed(conversation.turns):
            if (known := self._turns.get(turn.key)) is not None:
                return known.trajectories(turn.tool_ids)
        return []

    def _by_tool_call(self, conversation: Conversation) -> Place:
        """Whoever got the last tool call of ours in it."""
        for turn in reversed(conversation.turns):
            known = (self._tool_calls.get(tool_id) for tool_id in turn.told)
            if found := {name for names in known for name in names or ()}:
                return _one_of(sorted(found), "tool_call")
        return Place(new_trajectory(), "new")

    def _by_ends(self, prompt: Prompt) -> Place:
        """Every trajectory with an answer that ends in this prompt can be meant.

        Not only that of the last one: nothing tells what was sampled from what the agent wrote
        itself. But one that began because others could not be told apart stands for those of them
        that have no answer behind its beginning."""
        last_ends: dict[str, int] = {}
        for end, key in prompt.known_ends(self._lengths.get):
            known = self._turns.get(key)
            for trajectory in known.trajectories(frozenset()) if known else ():
                last_ends.setdefault(trajectory, end)
        stood_for = {
            other
            for trajectory in last_ends
            if (begun := self._begun.get(trajectory)) and begun.kind == prompt.kind
            for other in begun.instead_of
            if last_ends.get(other, 0) <= begun.size_bytes
        }
        place = _one_of([name for name in last_ends if name not in stood_for])
        if place.ambiguous:
            self._begun.put(place.trajectory, Begun(prompt.kind, len(prompt), place.ambiguous))
        return place

    def is_known(self, place: Place) -> bool:
        """False where the index has to be asked for the next step first; then ``resume``, or
        ``unread`` where it gave no answer."""
        known = self._steps.get(place.trajectory) is not None
        return place.attribution == "new" or (known and place.trajectory not in self._unread)

    def resume(self, trajectory: str, next_step: int, calls: Iterable[Call] = ()) -> None:
        """Number on from what the index holds, unless steps were given here in the meantime.
        ``calls``: those that a retry can repeat."""
        for call in () if self._has_calls_of(trajectory) else calls:
            self._calls.put(*self._with_earlier(call))
        self._unread.discard(trajectory)
        self._steps.put(trajectory, max(next_step, self._steps.get(trajectory) or 0))

    def _has_calls_of(self, trajectory: str) -> bool:
        """Those of the store are here too, and it may say less of them than is known here."""
        return self._steps.peek(trajectory) is not None and trajectory not in self._unread

    def _with_earlier(self, call: Call) -> tuple[Scope, list[Call]]:
        scope = _scope_of(call.place, call.body_sha256)
        here = self._calls.peek(scope) or []
        is_here = any(call.call_id == other.call_id for other in here)
        return scope, here if is_here else [call, *here]

    def unread(self, trajectory: str) -> None:
        """Number on from memory until the index can be asked."""
        if len(self._unread) < MAX_UNREAD:
            self._unread.add(trajectory)

    def next_step(self, place: Place, *, body_sha256: str, sdk_retry: int) -> int | None:
        """The step that ``begin`` would give to a call that repeats none; None where it does."""
        earlier = self._calls.get(_scope_of(place, body_sha256)) or []
        if _repeated(earlier, place, sdk_retry) is not None:
            return None
        return self._steps.get(place.trajectory) or 0

    def begin(
        self,
        place: Place,
        *,
        call_id: str,
        body_sha256: str,
        sdk_retry: int,
        step: int | None = None,
    ) -> Call:
        """Give the call its step: that of the call it repeats, or the next one; ``step`` is one
        that was given out for it elsewhere."""
        scope = _scope_of(place, body_sha256)
        earlier = self._calls.get(scope) or []
        first = _repeated(earlier, place, sdk_retry)
        if first is not None:
            first.repeated = True
            retry = max(sdk_retry, first.retry + 1)
            known = first.place.ambiguous or place.ambiguous  # a restored one may have lost its own
            where = replace(first.place, ambiguous=known, agent=place.agent)
            call = Call(call_id, where, first.step, retry, body_sha256)
        else:
            if place.attribution == "new" and sdk_retry > 0:
                others = (call.place.trajectory for call in earlier if not call.repeated)
                place = replace(place, ambiguous=tuple(dict.fromkeys((*place.ambiguous, *others))))
            following = self._steps.get(place.trajectory) or 0
            step = following if step is None else step
            self._steps.put(place.trajectory, max(following, step + 1))
            call = Call(call_id, place, step, sdk_retry, body_sha256)
        self._calls.put(scope, [*(c for c in earlier if not c.repeated), call][-MAX_CANDIDATES:])
        return call

    def answered(self, call: Call, turns: Iterable[Turn | End]) -> None:
        """Remember the answers, so that a call that continues one of them is recognised.

        Call it before the end of the answer is sent: the next call may come at once.
        """
        if call.failed:
            return  # broken off with an error: no agent goes on from there
        for turn in turns:
            known = self._turns.get(turn.key) or _Known()
            known.add((call.place.trajectory, _tool_ids(turn)))
            self._turns.put(turn.key, known)
            for tool_id in _told(turn):
                names = (*(self._tool_calls.get(tool_id) or ()), call.place.trajectory)
                self._tool_calls.put(tool_id, tuple(dict.fromkeys(names))[-MAX_CANDIDATES:])
            if isinstance(turn, End):
                lengths = self._lengths.get(turn.block) or set()
                lengths.add(len(turn.tail))
                self._lengths.put(turn.block, lengths)

    def failed(self, call: Call) -> None:
        """The call got no whole answer: the same body again is a retry of it."""
        call.failed = True

    @property
    def full(self) -> bool:
        """No older answer can be remembered."""
        return self._turns.full

    def restore(
        self,
        trajectory: str,
        turns: Iterable[Turn | End],
        calls: Iterable[Call],
        begun: Begun | None,
    ) -> None:
        """Remember a trajectory from before the start, as older than all that is here."""
        for turn in turns:
            known = self._turns.peek(turn.key) or _Known()
            if len(known.givers) < MAX_CANDIDATES:
                known.add((trajectory, _tool_ids(turn)))
            self._turns.put_oldest(turn.key, known)
            for tool_id in _told(turn):
                names = (trajectory, *(self._tool_calls.peek(tool_id) or ()))
                self._tool_calls.put_oldest(tool_id, tuple(dict.fromkeys(names)))
            if isinstance(turn, End):
                lengths = self._lengths.peek(turn.block) or set()
                lengths.add(len(turn.tail))
                self._lengths.put_oldest(turn.block, lengths)
        for call in () if self._has_calls_of(trajectory) else calls:
            self._calls.put_oldest(*self._with_earlier(call))
        if begun is not None:
            self._begun.put_oldest(trajectory, begun)


def _scope_of(place: Place, body_sha256: str) -> Scope:
    """What the calls of one retried call have in common."""
    return place.trajectory if place.named else None, body_sha256


def _one_of(found: Sequence[str], rule: Attribution = "prefix") -> Place:
    if len(found) == 1:
        return Place(found[0], rule)
    return Place(new_trajectory(), "new", tuple(found))


def _tool_ids(turn: Turn | End) -> frozenset[str]:
    return turn.tool_ids if isinstance(turn, Turn) else frozenset()


def _told(turn: Turn | End) -> frozenset[str]:
    return turn.told if isinstance(turn, Turn) else frozenset()


def _repeated(earlier: list[Call], place: Place, sdk_retry: int) -> Call | None:
    """The call with this body that the new one repeats.

    Where nothing but the body is known, only a failed call that began its trajectory is taken: it
    does not matter by whom, because it gave nothing. Any other may be another agent's; a header
    does not say whose retry it is when the first try never came here."""
    waiting = [call for call in earlier if not call.repeated]
    if place.attribution == "new":
        return next((c for c in waiting if c.failed and c.place.attribution == "new"), None)
    own = [call for call in waiting if call.place.trajectory == place.trajectory]
    failed = [call for call in own if call.failed]
    if sdk_retry > 0 and not failed:
        return next((call for call in reversed(own) if call.retry < sdk_retry), None)
    return failed[0] if failed else None

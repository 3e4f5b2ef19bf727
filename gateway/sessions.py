"""Which trajectory and step a call belongs to (DESIGN 7). Pure: no clock, no I/O; lives on the
event loop.

The first rule that applies names the trajectory: URL, header, minted key, agents' session headers,
metadata, the longest prefix of the conversation that ends in an answer we gave, else a new one.
Nothing is guessed: a call without an answer of ours in it is a new trajectory even when its prompt
equals another's, and one that several trajectories could have led to is a new one that lists them.

Memory is bounded: least recently used trajectories, answers and calls are forgotten.
"""

from __future__ import annotations

import secrets
import unicodedata
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from driftgate.errors import RequestError
from driftgate.gateway.conversation import Conversation
from driftgate.trace import Attribution

__all__ = ["KEY_PREFIX", "TRAJECTORY_HEADER", "Call", "Place", "Sessions", "check_trajectory"]

K = TypeVar("K")
V = TypeVar("V")

TRAJECTORY_HEADER = "x-driftgate-trajectory"
SESSION_HEADERS = ("x-claude-code-session-id", "session-id", "x-session-id")
"""Claude Code, Codex, OpenCode."""

KEY_PREFIX = "dgk_"

MAX_ID_CHARS = 200
"""Twice the longest session id seen; an id stands in every record."""

MAX_TRAJECTORIES = 50_000
"""Step counters kept; a forgotten one is read from the index again. About 10 MB."""

MAX_TURNS = 100_000
"""Answers that can be continued: about 40 MB; an agent that comes back later starts a new
trajectory."""

MAX_CANDIDATES = 64
"""Equal answers kept apart by their tool-call ids: a large group of rollouts."""

MAX_CALLS = 20_000
"""Calls that a retry can repeat; SDKs retry within minutes."""

MAX_KEYS = 50_000
"""Minted keys."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a call belongs, before it has a step."""

    trajectory: str
    attribution: Attribution
    ambiguous: tuple[str, ...] = ()

    @property
    def named(self) -> bool:
        """The agent named the trajectory itself."""
        return self.attribution not in ("prefix", "new")


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


@dataclass(slots=True)
class _Known:
    """Trajectories that gave one and the same answer to the same conversation."""

    givers: dict[tuple[str, frozenset[str]], None] = field(default_factory=dict)

    def trajectories(self, tool_ids: frozenset[str]) -> list[str]:
        """Those that could be meant by a history with these tool-call ids."""
        every = list(dict.fromkeys(trajectory for trajectory, _ in self.givers))
        if len(every) == 1:
            return every
        same = dict.fromkeys(trajectory for trajectory, ids in self.givers if ids == tool_ids)
        return list(same) or every


class _Recent(Generic[K, V]):
    """A dict of bounded size that forgets what was not used for longest."""

    def __init__(self, limit: int) -> None:
        self._items: OrderedDict[K, V] = OrderedDict()
        self._limit = limit

    def get(self, key: K) -> V | None:
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: K, value: V) -> None:
        self._items[key] = value
        self._items.move_to_end(key)
        if len(self._items) > self._limit:
            self._items.popitem(last=False)

    def __len__(self) -> int:
        return len(self._items)


class Sessions:
    """What the gateway remembers of trajectories. Not thread-safe: use it on the event loop."""

    def __init__(self) -> None:
        self._steps: _Recent[str, int] = _Recent(MAX_TRAJECTORIES)
        self._turns: _Recent[bytes, _Known] = _Recent(MAX_TURNS)
        self._calls: _Recent[tuple[str | None, str], list[Call]] = _Recent(MAX_CALLS)
        self._keys: _Recent[str, str] = _Recent(MAX_KEYS)

    def mint(self, trajectory: str | None = None) -> tuple[str, str]:
        """``(trajectory, key)``: an API key that names the trajectory. RequestError for a bad name.

        Keys are kept in memory: they end with the gateway's process.
        """
        name = new_trajectory() if trajectory is None else check_trajectory(trajectory)
        key = KEY_PREFIX + secrets.token_urlsafe(24)
        self._keys.put(key, name)
        return name, key

    def place(
        self,
        *,
        url: str | None,
        headers: Mapping[str, str],
        metadata: Mapping[str, Any] | None,
        conversation: Conversation | None,
    ) -> Place:
        """The first rule that applies. RequestError for an id or a minted key that is not valid.

        ``headers`` must find names in any case.
        """
        if url is not None:
            return Place(check_trajectory(url), "url")
        if (named := headers.get(TRAJECTORY_HEADER)) is not None:
            return Place(check_trajectory(named), "header")
        if (key := minted_key(headers)) is not None:
            trajectory = self._keys.get(key)
            if trajectory is None:
                raise RequestError(
                    "this driftgate key is not known: keys end with the gateway's process; "
                    "mint a new one with POST /api/trajectories"
                )
            return Place(trajectory, "key")
        for name in SESSION_HEADERS:
            if headers.get(name):
                return Place(check_trajectory(headers[name]), "session_header")
        if metadata and isinstance(named := metadata.get("trajectory_id"), str):
            return Place(check_trajectory(named), "metadata")
        return self._by_prefix(conversation)

    def _by_prefix(self, conversation: Conversation | None) -> Place:
        for turn in reversed(conversation.turns if conversation else ()):
            known = self._turns.get(turn.digest)
            if known is None:
                continue
            found = known.trajectories(turn.tool_ids)
            if len(found) == 1:
                return Place(found[0], "prefix")
            return Place(new_trajectory(), "new", tuple(found))
        return Place(new_trajectory(), "new")

    def is_known(self, place: Place) -> bool:
        """False where the index has to be asked for the next step first; then ``resume``."""
        return place.attribution == "new" or self._steps.get(place.trajectory) is not None

    def resume(self, trajectory: str, next_step: int) -> None:
        """Number on from what the index holds, unless steps were given here in the meantime."""
        self._steps.put(trajectory, max(next_step, self._steps.get(trajectory) or 0))

    def begin(self, place: Place, *, call_id: str, body_sha256: str, sdk_retry: int) -> Call:
        """Give the call its step: that of the call it repeats, or the next one."""
        scope = (place.trajectory if place.named else None, body_sha256)
        earlier = self._calls.get(scope) or []
        found = _repeated(earlier, sdk_retry)
        if len(found) == 1:
            first = found[0]
            first.repeated = True
            retry = max(sdk_retry, first.retry + 1)
            call = Call(call_id, first.place, first.step, retry, body_sha256)
        else:
            if found:
                names = dict.fromkeys((*place.ambiguous, *(c.place.trajectory for c in found)))
                place = Place(new_trajectory(), "new", tuple(names))
            step = self._steps.get(place.trajectory) or 0
            self._steps.put(place.trajectory, step + 1)
            call = Call(call_id, place, step, sdk_retry, body_sha256)
        self._calls.put(scope, [*(c for c in earlier if not c.repeated), call][-MAX_CANDIDATES:])
        return call

    def answered(
        self, call: Call, conversation: Conversation | None, messages: Iterable[Mapping[str, Any]]
    ) -> None:
        """Remember the answers, so that a call that continues one of them is recognised.

        Call it before the end of the answer is sent: the next call may come at once.
        """
        if conversation is None:
            return
        for message in messages:
            turn = conversation.answered(message)
            known = self._turns.get(turn.digest) or _Known()
            known.givers[(call.place.trajectory, turn.tool_ids)] = None
            if len(known.givers) > MAX_CANDIDATES:
                del known.givers[next(iter(known.givers))]
            self._turns.put(turn.digest, known)

    def failed(self, call: Call) -> None:
        """The call got no whole answer: the same body again is a retry of it."""
        call.failed = True


def _repeated(earlier: list[Call], sdk_retry: int) -> list[Call]:
    """Calls with this body that the new call may repeat; several where they cannot be told
    apart."""
    waiting = [call for call in earlier if not call.repeated]
    if failed := [call for call in waiting if call.failed]:
        return failed[:1]  # failed calls of one body differ in nothing: take them in turn
    if sdk_retry > 0:
        return [call for call in waiting if call.retry < sdk_retry]
    return []


def minted_key(headers: Mapping[str, str]) -> str | None:
    """The minted key that a request carries as its API key."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.startswith(KEY_PREFIX) else None


def new_trajectory() -> str:
    """A fresh id."""
    return f"t-{secrets.token_hex(8)}"


def check_trajectory(name: str) -> str:
    """``name`` if it can be a trajectory's id, else RequestError. Ids are names, never paths."""
    if not 0 < len(name) <= MAX_ID_CHARS:
        raise RequestError(f"a trajectory id has 1 to {MAX_ID_CHARS} characters, not {len(name)}")
    if name != name.strip() or any(unicodedata.category(c)[0] == "C" for c in name):
        raise RequestError(
            f"trajectory id {name[:40]!r} starts or ends with a space or holds control characters"
        )
    return name

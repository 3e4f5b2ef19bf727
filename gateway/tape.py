"""One stream while it comes: of each event what the agent is to get, and what the fold will need.

The events are not kept: a token of a stream is 400 bytes of JSON and 20 of content. Nearly all of
them have one form, which a pattern matches as a whole: the match proves what the event is, says
where the fields stand that the agent did not ask for, and gives the few bytes that carry the token.
These are parsed some hundred events at a time. Every other event is parsed as JSON, which is exact
and four times slower."""

from __future__ import annotations

import re
from typing import TypeAlias

import msgspec

from driftgate.errors import UNREADABLE
from driftgate.gateway import sse
from driftgate.gateway.draft import HEAD, Draft, Odd, Usage, given, read_choice
from driftgate.gateway.messages import Delta
from driftgate.gateway.openai import Plan, strip_event

__all__ = ["BATCH_BYTES", "Tape"]

BATCH_BYTES = 1 << 16
"""Events, as they came, whose tokens wait to be parsed: 150 of them, a tenth of a millisecond. With
what a parsed token takes (some 20 bytes) this bounds the memory of a stream."""

ERROR_BYTES = 500
"""Of an engine's error, in a trace."""

_TEXT = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_ROW = rb'\{"token":%b,"logprob":[-+.\deE]++,"bytes":\[[\d,]*+\],"top_logprobs":\[\]\}' % _TEXT
_CALL = rb'\{"index":\d++,"function":\{"arguments":%b\}\}' % _TEXT
_DELTA = rb'\{(?:"(?:content|reasoning|reasoning_content)":%b|"tool_calls":\[%b\])\}' % (
    _TEXT,
    _CALL,
)
_FRONT = re.compile(
    rb'data: \{(?:"(?:id|object|created|model)":(?:%b|\d++),)*+"choices":\[\{"index":' % _TEXT
)
"""The same in all events of a stream, so that it is matched once and then compared."""

_USUAL = re.compile(
    rb'(\d++),"delta":(%b),"logprobs":(\{"content":\[(%b(?:,%b)*+)\]\}),"finish_reason":null,'
    rb'"token_ids":\[(\d[\d,]*+)\]\}\]\}\n\n' % (_DELTA, _ROW, _ROW)
)
"""What follows: index, delta, logprobs, their rows, ids. A JSON text has no bare quote in it, so
what looks like a key here is one."""

_USUAL_END = b'null,"finish_reason":null,"token_ids":null}]}\n\n'
"""From the value of ``logprobs`` on, for an agent that asked for neither."""

Token: TypeAlias = tuple[bytes, bytes, bytes, bytes]
"""Index, delta, rows and ids of a usual event."""

_DELTAS = msgspec.json.Decoder(list[Delta])


class Tape:
    """What has come of one stream. Used up to ``[DONE]`` on the event loop, then for the fold."""

    def __init__(self, plan: Plan, *, limit_bytes: int) -> None:
        """``limit_bytes``: of a longer stream nothing is kept; ``over`` says so."""
        self.plan = plan
        self.done = self.over = False
        self.prompt_ids: bytes | None = None
        self.usage: Usage | None = None
        self.fingerprint: str | None = None
        self.error: str | None = None
        """The engine's own, in words."""
        self.unread = 0
        """Events that are no chunks."""
        self.first_unread = ""
        self.odd: Odd = {}
        """What of other events cannot be read and belongs to no choice."""
        self._limit_bytes = limit_bytes
        self._came_bytes = 0
        self._drafts: dict[int, Draft] = {}
        self._waiting: list[Token] = []
        self._waiting_bytes = 0
        hides = {"logprobs", "token_ids"} & plan.hide_choice
        self._strips = len(hides) == 2
        self._has_usual = plan.api == "chat" and plan.uncaptured is None and len(hides) != 1
        self._front = b""
        """How usual events of this stream begin; empty where that is not known."""

    @property
    def size_bytes(self) -> int:
        """Memory, about."""
        drafts = sum(draft.size_bytes for draft in self._drafts.values())
        return drafts + self._waiting_bytes + len(self.prompt_ids or b"")

    def take(self, event: bytes) -> bytes | None:
        """The event as the agent would have got it; None for one that it would not have got.

        What follows ``[DONE]`` is passed on and belongs to no answer.
        """
        if self._front and event.startswith(self._front):
            usual = _USUAL.fullmatch(event, len(self._front))
            if usual is not None:
                if not self.done:
                    index, delta, _, rows, ids = usual.groups()
                    self._keep(len(event), (index, delta, rows, ids))
                return event[: usual.start(3)] + _USUAL_END if self._strips else event
        return self._take_other(event)

    def counts(self) -> dict[int, int]:
        """How many tokens have come, by index of the choice."""
        self._parse()
        return {index: draft.count_ids() for index, draft in self._drafts.items()}

    def drafts(self) -> list[Draft]:
        """What came, in order of choices."""
        self._parse()
        return [self._drafts[index] for index in sorted(self._drafts)]

    def _keep(self, size_bytes: int, token: Token) -> None:
        self._came_bytes += size_bytes
        self._waiting_bytes += size_bytes
        self._waiting.append(token)
        if self._came_bytes > self._limit_bytes:
            self._drop()
        elif self._waiting_bytes >= BATCH_BYTES:
            self._parse()

    def _drop(self) -> None:
        self.over = True
        self._drafts.clear()
        self._waiting.clear()
        self._waiting_bytes = 0

    def _take_other(self, event: bytes) -> bytes | None:
        if sse.event_data(event) == sse.DONE:
            self._parse()
            self.done = True
            return event
        passed = strip_event(event, self.plan)  # first: of a large event, each makes copies
        if not self.done:
            self._came_bytes += len(event)
            self._parse()
            if self._came_bytes > self._limit_bytes:
                self._drop()
            else:
                self._read(event)
        if self._has_usual:
            front = _FRONT.match(event)
            self._front = front.group() if front is not None else self._front
        return passed

    def _read(self, event: bytes) -> None:
        """Any event, as JSON."""
        data = sse.event_data(event)
        if data is None:
            return
        try:
            head = HEAD.decode(data)
            choices = [read_choice(raw) for raw in head.choices]
        except UNREADABLE as error:
            self._cannot_read(error)
            return
        for choice, odd in choices:
            self._draft(choice.index).add(choice, odd)
        if (prompt_ids := given(head.prompt_token_ids)) is not None:
            self.prompt_ids = bytes(prompt_ids)
        if not choices:
            self.usage = head.usage(self.odd) or self.usage
            # beside choices it is the continuous usage of one of them
        self.fingerprint = head.fingerprint(self.odd) or self.fingerprint
        if given(head.error) is not None:
            said = bytes(head.error)[:ERROR_BYTES].decode(errors="replace")
            self.error = f"the engine ended the stream with an error: {said}"

    def _parse(self) -> None:
        """Move what waits into the drafts."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        by_index: dict[bytes, list[Token]] = {}
        for token in waiting:
            by_index.setdefault(token[0], []).append(token)
        for index, tokens in by_index.items():
            draft = self._draft(int(index))
            if not self._add(draft, tokens):
                for token in tokens:
                    self._add(draft, [token], alone=True)

    def _add(self, draft: Draft, tokens: list[Token], *, alone: bool = False) -> bool:
        """Tokens of one choice; False where one of them cannot be read and nothing was added."""
        _, deltas, rows, ids = zip(*tokens, strict=True)
        parsed, odd = list[Delta](), Odd()
        try:
            parsed = _DELTAS.decode(b"[%b]" % b",".join(deltas))
        except UNREADABLE as error:
            if not alone:
                return False
            odd["delta"] = str(error)  # its token can still be read
        try:
            draft.add_rows(b"[%b]" % b",".join(rows))
        except UNREADABLE as error:
            if alone:
                self._cannot_read(error)
            return False
        draft.odd = odd | draft.odd
        draft.add_deltas(parsed)
        draft.add_ids(b",".join(ids))
        return True

    def _cannot_read(self, error: Exception) -> None:
        self.first_unread = self.first_unread or str(error)
        self.unread += 1

    def _draft(self, index: int) -> Draft:
        draft = self._drafts.get(index)
        if draft is None:
            draft = self._drafts[index] = Draft(index=index)
        return draft

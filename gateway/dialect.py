"""An agent's API other than chat completions: its answer told from the engine's chat answer. Pure.

The engine is always asked for a chat completion, because that is where it gives token ids, logprobs
and routes. A ``Teller`` reads the chat answer, a chunk at a time, and says the same in the agent's
API, an event at a time: nothing is held back, so the first token comes when it comes. An answer in
one piece is told as one chunk; so streams and JSON cannot differ. Log-probabilities are those of
the text's own tokens: a stream has them with its pieces, in one piece they are found.

Chat deltas are gathered into blocks (thinking, text, tool call), which both APIs have under names
of their own. The last events are told when the engine's stream ends, after the answer is recorded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, Literal, TypeAlias

import msgspec
from msgspec import Raw

from driftgate.errors import UNREADABLE, UpstreamError
from driftgate.gateway import sse
from driftgate.gateway.draft import Usage, given
from driftgate.gateway.messages import Delta, Function
from driftgate.gateway.texts import place_of, token_texts

__all__ = ["Dialect", "Said", "Teller", "event_of", "message_in"]

Kind: TypeAlias = Literal["thinking", "text", "tool"]

CLEAN = frozenset(("stop", "length", "tool_calls", "function_call", "content_filter"))
"""Of ``finish_reason``: the model or the request ended the answer. Engines have others (``abort``
where a trainer pauses vLLM, ``error``, ``repetition``), of an answer that is not whole."""

NOT_WHOLE_STATUS = 503
"""Of such an answer in one piece: SDKs ask again by themselves."""

SAID_CHARS = 500
"""Of an engine's error that is no JSON."""


class _Row(msgspec.Struct):
    token: str = ""
    bytes: list[int] | None = None


class _Logprobs(msgspec.Struct):
    content: list[Raw] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: Delta | None = None
    message: Delta | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    matched_stop: int | str | None = None
    """SGLang's name for it."""
    prompt_token_ids: Raw = Raw()
    """SGLang's place for them."""


class Chunk(msgspec.Struct):
    """A chat chunk, or a whole chat answer."""

    created: int = 0
    model: str = ""
    choices: list[_Choice] = []
    usage: Usage | None = None
    prompt_token_ids: Raw = Raw()
    error: Raw = Raw()


class _Error(msgspec.Struct):
    message: str = ""


class _ErrorBody(msgspec.Struct):
    message: str = ""
    error: _Error | str | None = None


_ROW = msgspec.json.Decoder(_Row)
_CHUNK = msgspec.json.Decoder(Chunk)
_ERROR_BODY = msgspec.json.Decoder(_ErrorBody)


@dataclass(slots=True, eq=False)
class Said:
    """One block of an answer: a thought, a text, or a tool call."""

    kind: Kind
    index: int
    """Among the answer's blocks."""
    call_id: str = ""
    name: str = ""
    logprobs: list[Raw] = field(default_factory=list)
    """Rows of a text, as the engine spelled them; only where the agent asked for them."""
    closed: bool = False
    _text: StringIO = field(default_factory=StringIO)

    @property
    def text(self) -> str:
        """What has come of it; of a tool call its arguments."""
        return self._text.getvalue()

    def add(self, text: str) -> None:
        """More of it."""
        self._text.write(text)


class Teller(ABC):
    """Tells one answer. ``take`` each chat event, ``end`` once at ``[DONE]``."""

    def __init__(self, *, shows_logprobs: bool = False) -> None:
        self.said: list[Said] = []
        self.created = 0
        self.model = ""
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.usage: Usage | None = None
        self.prompt_tokens = 0
        """Counted from the prompt's ids: the usage comes only at the end of a stream."""
        self.error: str | None = None
        """Why the answer is none, in the engine's words or in ours."""
        self.not_whole = False
        """That is because the engine ended it early."""
        self.ended = False
        """All of the answer has come."""
        self.whole = False
        """The answer came in one piece: a text's rows are looked for among all of them."""
        self._shows_logprobs = shows_logprobs
        self._rows: list[Raw] = []
        """Of an answer in one piece, which are not its text's alone."""
        self._begun = False
        self._open: Said | None = None
        self._tools: dict[int, Said] = {}

    def take(self, event: bytes) -> list[bytes]:
        """The agent's events for one of the engine's. What is no chunk says nothing to the agent,
        but a comment, which keeps connections alive."""
        data = sse.event_data(event)
        if data is None:
            return [event]
        try:
            return list(self._tell(_CHUNK.decode(data)))
        except UNREADABLE:
            return []  # the tape counts it, and the trace names it

    def end(self) -> list[bytes]:
        """The last events, at the end of the engine's stream."""
        if self.ended:
            return []
        self.ended = True
        if not self._begun:
            return []
        if self.error is None and self.finish_reason not in CLEAN:
            self.not_whole = True
            self.error = (
                f"the engine ended its answer early (finish_reason {self.finish_reason!r}): what "
                "came is not all of it; ask again"
            )
            return [*self._fail(self.error), *self._end()]
        return [*([] if self.error else self._close()), *self._end()]

    def answer(self, chat: bytes) -> bytes:
        """A whole answer; ``error`` says where it is none. UpstreamError where the engine's is no
        completion."""
        try:
            chunk = _CHUNK.decode(chat)
        except UNREADABLE as error:
            raise UpstreamError(f"the engine's answer is not a completion: {error}") from error
        if not chunk.choices:
            raise UpstreamError("the engine's answer is not a completion: it has no choices")
        self.whole = True
        for _ in self._tell(chunk):
            pass
        self.end()
        return self.body()

    @abstractmethod
    def body(self) -> bytes:
        """The answer in one piece, as far as it has come."""

    def stored_body(self, body: bytes) -> bytes:
        """``body`` as it may be stored: without what is redacted in the request that it repeats."""
        return body

    def _tell(self, chunk: Chunk) -> Iterator[bytes]:
        if (error := given(chunk.error)) is not None:
            self.error = message_in(bytes(error))
            yield from self._fail(self.error)
            return
        if not self._begun and chunk.choices:
            self._begun = True
            self.created, self.model = chunk.created, chunk.model
            ids = given(chunk.prompt_token_ids) or given(chunk.choices[0].prompt_token_ids)
            if ids is not None:
                self.prompt_tokens = bytes(ids).count(b",") + 1
            yield from self._begin()
        self.usage = chunk.usage or self.usage
        for choice in chunk.choices:
            if choice.index == 0:
                yield from self._add(choice)

    def _add(self, choice: _Choice) -> Iterator[bytes]:
        said = choice.delta or choice.message or Delta()
        rows = (choice.logprobs and choice.logprobs.content) or []
        if self._shows_logprobs and self.whole:
            self._rows += rows
        if thought := said.reasoning or said.reasoning_content:
            yield from self._grow(self._going("thinking"), thought)
        if said.content:
            shown = self._rows_of(said.content, rows) if self._shows_logprobs else ()
            yield from self._grow(self._going("text"), said.content, shown)
        for position, call in enumerate(said.tool_calls or ()):
            # An answer in one piece does not number its calls.
            number = call.index if choice.message is None else position
            function = call.function or Function()
            if number not in self._tools:
                name = function.name or ""
                self._tools[number] = Said("tool", len(self.said), call.id or "", name)
            yield from self._grow(self._tools[number], function.arguments or "")
        self.finish_reason = choice.finish_reason or self.finish_reason
        for stop in (choice.stop_reason, choice.matched_stop):
            self.stop_reason = self.stop_reason if stop is None else stop

    def _rows_of(self, text: str, came: Sequence[Raw]) -> Sequence[Raw]:
        """A text's rows. A stream's pieces may lag behind their tokens: what came stays theirs."""
        if self.whole:
            return _spelling(self._rows, text)
        return _spelling(came, text) or came

    def _going(self, kind: Kind) -> Said:
        """The block of this kind that is being told, or a new one."""
        if self._open is not None and self._open.kind == kind:
            return self._open
        return Said(kind, len(self.said))

    def _grow(self, block: Said, text: str, rows: Sequence[Raw] = ()) -> Iterator[bytes]:
        if block.index == len(self.said):
            yield from self._close()
            self._open = block
            self.said.append(block)
            yield from self._opened(block)
        if text:
            block.add(text)
            block.logprobs += rows
            yield from self._grew(block, text, rows)

    def _close(self) -> Iterator[bytes]:
        block, self._open = self._open, None
        if block is not None:
            block.closed = True
            yield from self._closed(block)

    @abstractmethod
    def _begin(self) -> Iterator[bytes]:
        """Events before the first block."""

    @abstractmethod
    def _opened(self, block: Said) -> Iterator[bytes]:
        """A block begins."""

    @abstractmethod
    def _grew(self, block: Said, text: str, rows: Sequence[Raw]) -> Iterator[bytes]:
        """``text`` came for a block, with ``rows`` of logprobs where they are shown."""

    @abstractmethod
    def _closed(self, block: Said) -> Iterator[bytes]:
        """Nothing more comes for a block."""

    @abstractmethod
    def _end(self) -> Iterator[bytes]:
        """Events behind the last block."""

    @abstractmethod
    def _fail(self, message: str) -> Iterator[bytes]:
        """The engine ended the stream with an error."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one call needs to be answered in its agent's API."""

    teller: Teller
    error: Callable[[int, str], bytes]
    """The body of an error, by status and message."""
    remember: Callable[[bytes], None] | None = None
    """Called with an answer's body before its end is sent, where a later call may name it."""

    def engine_error(self, status: int, body: bytes) -> bytes:
        """The engine's error, in the agent's API."""
        return self.error(status, message_in(body))


def _spelling(rows: Sequence[Raw], text: str) -> Sequence[Raw]:
    """The rows of an answer's text, without those of its reasoning, tool calls and marks; none
    where it cannot be said which they are."""
    read = [_ROW.decode(row) for row in rows]
    place = place_of(token_texts((row.token, row.bytes) for row in read), text.encode())
    return () if place is None else rows[place]


def event_of(name: str, data: Any) -> bytes:
    """A server-sent event with a name."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))


def message_in(body: bytes) -> str:
    """What an engine's error says."""
    try:
        said = _ERROR_BODY.decode(body)
    except UNREADABLE:
        return body[:SAID_CHARS].decode(errors="replace")
    if isinstance(said.error, _Error):
        return said.error.message
    return said.error or said.message or body[:SAID_CHARS].decode(errors="replace")

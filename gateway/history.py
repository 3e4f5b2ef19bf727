"""What a call's request tells of earlier answers, and what its own answer lets later calls
continue. Pure.

Only what the agent has been given counts: its token ids can be continued where it asked for them,
or where it sent ids itself; a text as it was sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
from msgspec import Raw

from driftgate.errors import JSON_ERRORS
from driftgate.gateway import sse
from driftgate.gateway.conversation import Conversation, Seen, Turn, read_conversation
from driftgate.gateway.messages import streamed_messages
from driftgate.gateway.openai import Fields, Plan
from driftgate.gateway.prompts import End, Prompt, read_prompt
from driftgate.gateway.recent import Recent

__all__ = [
    "History",
    "Output",
    "continues",
    "ends",
    "read_history",
    "turns_of_answer",
    "turns_of_stream",
]

History: TypeAlias = Conversation | Prompt | None
"""None: nothing can be continued by it, such as several prompts in one call."""


class _Choice(msgspec.Struct):
    index: int = 0
    text: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []
    prompt_token_ids: list[int] | None = None


_ANSWER = msgspec.json.Decoder(_Answer)
_OBJECT = msgspec.json.Decoder(dict[str, Any])


@dataclass(slots=True)
class Output:
    """What was sampled, of one choice."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)


def read_history(fields: Fields, plan: Plan, known: Recent[bytes, Seen] | None = None) -> History:
    """The request's conversation or prompt. ``known`` as in ``read_conversation``."""
    if plan.api == "chat":
        return read_conversation(bytes(fields.get("messages", b"")), known)
    return read_prompt(bytes(fields.get("prompt", b"")))


def continues(history: History) -> bool:
    """Whether an earlier answer may be in it."""
    return bool(history.turns) if isinstance(history, Conversation) else history is not None


def turns_of_answer(
    history: History, plan: Plan, body: bytes, messages: Iterable[Raw]
) -> list[Turn | End]:
    """What can be continued of a JSON answer, given as it came and its ``messages``."""
    turns = list[Turn | End]()
    if isinstance(history, Conversation):
        turns += [history.answered(message) for message in _objects(messages)]
    if _has_ends(history, plan):
        turns += ends(history, plan, _outputs([body]))
    return turns


def turns_of_stream(history: History, plan: Plan, events: Sequence[bytes]) -> list[Turn | End]:
    """What can be continued of a stream, given as it came."""
    turns = list[Turn | End]()
    if isinstance(history, Conversation):
        turns += [history.answered(message) for message in streamed_messages(events)]
    if _has_ends(history, plan):
        datas = (sse.event_data(event) for event in events)
        turns += ends(history, plan, _outputs(data for data in datas if data is not None))
    return turns


def _has_ends(history: History, plan: Plan) -> bool:
    return isinstance(history, Prompt) or (history is not None and plan.ids_asked)


def ends(history: History, plan: Plan, outputs: Iterable[Output]) -> Iterator[End]:
    """Where the outputs end as prompts. An empty one has no end: it would be the prompt's own, and
    the same prompt again is no sign of having been given it."""
    prompt = history if isinstance(history, Prompt) else None
    for output in outputs:
        if prompt is not None and prompt.kind == "text" and output.text:
            yield from _given(prompt.after_text(output.text, echoed=plan.echo))
        with_ids = prompt if prompt is not None and prompt.kind == "ids" else None
        if with_ids is None and plan.ids_asked and output.prompt_ids:
            with_ids = Prompt.of_ids(output.prompt_ids)
        if with_ids is not None and output.ids:
            yield from _given(with_ids.after_ids(output.ids))


def _given(end: End | None) -> Iterator[End]:
    if end is not None:
        yield end


def _outputs(parts: Iterable[bytes]) -> Iterable[Output]:
    """Of an answer that came in one part or in many."""
    outputs: dict[int, Output] = {}
    prompt_ids = list[int]()
    for part in parts:
        try:
            answer = _ANSWER.decode(part)
        except JSON_ERRORS:
            continue  # the fold names it
        prompt_ids = answer.prompt_token_ids or prompt_ids
        for choice in answer.choices:
            output = outputs.setdefault(choice.index, Output())
            output.text += choice.text or ""
            output.ids += choice.token_ids or ()
            output.prompt_ids = choice.prompt_token_ids or output.prompt_ids
    for output in outputs.values():
        output.prompt_ids = output.prompt_ids or prompt_ids
    return outputs.values()


def _objects(messages: Iterable[Raw]) -> Iterator[dict[str, Any]]:
    for message in messages:
        try:
            yield _OBJECT.decode(message)
        except JSON_ERRORS:
            continue  # the fold names it

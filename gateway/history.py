"""What a call's request tells of earlier answers, and what its own answer lets later calls
continue. Pure.

Only what the agent has been given counts: its token ids can be continued where it asked for them,
or where it sent ids itself; a text as it was sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
from msgspec import Raw

from driftgate.errors import UNREADABLE
from driftgate.gateway.conversation import Conversation, Seen, Turn, read_conversation
from driftgate.gateway.draft import Draft
from driftgate.gateway.openai import Fields, Plan
from driftgate.gateway.prompts import End, Prompt, read_prompt
from driftgate.gateway.recent import Recent
from driftgate.gateway.tape import Tape

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
    text: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []
    prompt_token_ids: list[int] | None = None


_ANSWER = msgspec.json.Decoder(_Answer)
_IDS = msgspec.json.Decoder(list[int])
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
        return read_conversation(fields.get("messages", b""), known)
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
        turns += ends(history, plan, _outputs(body))
    return turns


def turns_of_stream(history: History, tape: Tape) -> list[Turn | End]:
    """What can be continued of a stream that has come."""
    turns = list[Turn | End]()
    drafts = tape.drafts()
    if isinstance(history, Conversation):
        turns += [history.answered(d.message.body()) for d in drafts if d.message is not None]
    if _has_ends(history, tape.plan):
        turns += ends(history, tape.plan, [_came(draft, tape.prompt_ids) for draft in drafts])
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


def _outputs(body: bytes) -> Iterator[Output]:
    """Of an answer in one piece."""
    try:
        answer = _ANSWER.decode(body)
    except UNREADABLE:
        return  # the fold names it
    for choice in answer.choices:
        yield Output(
            text=choice.text or "",
            ids=choice.token_ids or [],
            prompt_ids=choice.prompt_token_ids or answer.prompt_token_ids or [],
        )


def _came(draft: Draft, prompt_ids: bytes | None) -> Output:
    """Of one choice of a stream."""
    return Output(
        text="" if draft.text is None else draft.text.getvalue(),
        ids=_read_ids(draft.ids_array() or b"[]"),
        prompt_ids=_read_ids(draft.prompt_ids or prompt_ids or b"[]"),
    )


def _read_ids(array: bytes) -> list[int]:
    try:
        return _IDS.decode(array)
    except UNREADABLE:
        return []  # the fold names it


def _objects(messages: Iterable[Raw]) -> Iterator[dict[str, Any]]:
    for message in messages:
        try:
            yield _OBJECT.decode(message)
        except UNREADABLE:
            continue  # the fold names it

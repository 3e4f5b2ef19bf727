"""Answers and events held against the types of OpenAI's and Anthropic's own SDKs, strictly: right
types, and no field that the SDK does not know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import anthropic.types
import openai.types.responses
import pydantic
from anthropic.lib.streaming._messages import accumulate_event
from pydantic import TypeAdapter

from driftgate.gateway import sse

__all__ = ["anthropic_message", "message_of_stream", "openai_response", "response_of_stream"]

NOT_IN_THE_SDK = {"store"}
"""The API answers with it."""

_RESPONSE = TypeAdapter(openai.types.responses.Response)
_MESSAGE = TypeAdapter(anthropic.types.Message)


def _by_type(union: Any) -> dict[str, TypeAdapter[Any]]:
    """The events of a union by the name that each has."""
    kinds = get_args(get_args(union)[0])
    return {get_args(k.model_fields["type"].annotation)[0]: TypeAdapter(k) for k in kinds}


_RESPONSE_EVENTS = _by_type(openai.types.responses.ResponseStreamEvent)
_MESSAGE_EVENTS = _by_type(anthropic.types.RawMessageStreamEvent)


def strictly(adapter: TypeAdapter[Any], data: bytes) -> Any:
    """``data`` as the SDK's type, with nothing left over."""
    value = adapter.validate_json(data, strict=True)
    assert set(_extras(value)) <= NOT_IN_THE_SDK, set(_extras(value))
    return value


def _extras(value: Any) -> Iterator[str]:
    if isinstance(value, pydantic.BaseModel):
        yield from value.model_extra or ()
        for name in type(value).model_fields:
            yield from _extras(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            yield from _extras(item)


def openai_response(data: bytes) -> openai.types.responses.Response:
    """A response."""
    value: openai.types.responses.Response = strictly(_RESPONSE, data)
    return value


def anthropic_message(data: bytes) -> anthropic.types.Message:
    """A message."""
    value: anthropic.types.Message = strictly(_MESSAGE, data)
    return value


def _events(stream: bytes) -> Iterator[tuple[str, bytes]]:
    splitter = sse.Splitter()
    for event in splitter.feed(stream):
        name = event.split(b"\n")[0].removeprefix(b"event: ").decode()
        data = sse.event_data(event)
        assert data is not None
        yield name, data
    assert splitter.rest() == b""


def response_of_stream(stream: bytes) -> openai.types.responses.Response:
    """The response at a stream's end. Each event is checked, and that the deltas give the items."""
    texts: dict[str, str] = {}
    done: list[Any] = []
    for number, (name, data) in enumerate(_events(stream)):
        event = strictly(_RESPONSE_EVENTS[name], data)
        assert event.sequence_number == number
        if name.endswith(".delta"):
            texts[event.item_id] = texts.get(event.item_id, "") + event.delta
        elif name == "response.output_item.done":
            assert event.output_index == len(done)
            done.append(event.item)
    response: openai.types.responses.Response = event.response
    assert done == response.output
    assert texts == {item.id: said for item in done if (said := _text(item))}
    return response


def _text(item: Any) -> str:
    return str(item.arguments if item.type == "function_call" else item.content[0].text)


def message_of_stream(stream: bytes) -> anthropic.types.Message:
    """The message that Anthropic's SDK gathers from a stream whose events are all checked."""
    message: Any = None
    buffers: dict[int, bytes] = {}
    for name, data in _events(stream):
        event = strictly(_MESSAGE_EVENTS[name], data)
        message = accumulate_event(event=event, current_snapshot=message, json_bufs=buffers)
    assert name == "message_stop"
    gathered = message.model_dump()
    for block in gathered["content"]:
        block.pop("parsed_output", None)  # the SDK's own
    found: anthropic.types.Message = _MESSAGE.validate_python(gathered)
    return found

"""OpenAI's Responses API: its request as a chat request. Pure.

What a chat completion cannot do (built-in tools, files, background work, …) is refused in words
that name what there is; fields that change nothing about the sampled tokens are echoed or ignored,
as the real API does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from msgspec import Raw

from driftgate.errors import UNREADABLE, RequestError
from driftgate.gateway import engine_fields
from driftgate.gateway.draft import given
from driftgate.gateway.openai import Fields
from driftgate.histories import led, messages_of_input, said

__all__ = ["LOGPROBS", "chat_request"]

_ENCODE = msgspec.json.encode

_REFUSED_FIELDS = {
    "background": "background work is not supported: ask with stream or wait for the answer",
    "conversation": "conversations are not supported: use previous_response_id",
    "prompt": "stored prompts are not supported: send instructions and input",
}


class _Tool(msgspec.Struct):
    type: str = ""
    name: str = ""
    description: str | None = None
    parameters: Raw = Raw()
    strict: bool | None = None


class _Format(msgspec.Struct):
    type: str = "text"
    name: str = ""
    description: str | None = None
    schema: Raw = Raw(b"{}")
    strict: bool | None = None


class _Text(msgspec.Struct):
    format: _Format | None = None


class _Choice(msgspec.Struct):
    type: str = ""
    name: str = ""


class _Reasoning(msgspec.Struct):
    effort: str | None = None


class _Asked(msgspec.Struct):
    """The fields that are read of a request."""

    input: Raw = Raw(b'""')
    instructions: str | None = None
    tools: list[_Tool] | None = None
    tool_choice: str | _Choice | None = None
    text: _Text | None = None
    reasoning: _Reasoning | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    max_output_tokens: int | None = None
    truncation: str | None = None


_ASKED = msgspec.json.Decoder(_Asked)

LOGPROBS = "message.output_text.logprobs"
"""Of ``include``: the agent wants the texts' logprobs."""


def chat_request(body: bytes, fields: Fields, earlier: Iterable[Any] = ()) -> Fields:
    """The chat request for a Responses request. ``earlier``: chat messages of the conversation
    that ``previous_response_id`` names. RequestError for what is not supported."""
    for name, why in _REFUSED_FIELDS.items():
        if bytes(fields.get(name, b"null")) not in (b"null", b"false"):
            raise RequestError(f"{name}: {why}")
    if "input" not in fields:
        raise RequestError("input is missing: send a text or a list of items")
    try:
        asked = _ASKED.decode(body)
    except UNREADABLE as error:
        raise RequestError(f"the request does not have the form of one: {error}") from error
    if asked.truncation == "auto":
        raise RequestError("truncation: only 'disabled' is supported: send less, or compact it")
    system = [] if asked.instructions is None else [said("system", asked.instructions)]
    out = engine_fields.passed(fields)
    out["messages"] = Raw(_ENCODE(led([*system, *earlier, *messages_of_input(asked.input)])))
    new = dict(_options(asked))
    return out | {name: Raw(_ENCODE(value)) for name, value in new.items()}


def _options(asked: _Asked) -> Iterator[tuple[str, Any]]:
    if asked.max_output_tokens is not None:
        yield "max_completion_tokens", asked.max_output_tokens
    if asked.tools:
        yield "tools", [_chat_tool(tool) for tool in asked.tools]
        yield "tool_choice", _chat_choice(asked.tool_choice)
    if asked.reasoning is not None and asked.reasoning.effort is not None:
        yield "reasoning_effort", asked.reasoning.effort
    if (
        asked.text is not None
        and asked.text.format is not None
        and asked.text.format.type != "text"
    ):
        yield "response_format", _chat_format(asked.text.format)
    if LOGPROBS in (asked.include or ()):
        yield "logprobs", True
        yield "top_logprobs", asked.top_logprobs or 0


def _chat_tool(tool: _Tool) -> dict[str, Any]:
    if tool.type == "custom":
        raise RequestError(
            "tools: 'custom' is not supported, because a chat completion's tools take JSON; send a "
            "'function' whose only parameter is a string"
        )
    if tool.type != "function":
        raise RequestError(
            f"tools: {tool.type!r} is not supported, because the engine has no tools of its own; "
            "only 'function' is, which the agent runs itself"
        )
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    if given(tool.parameters) is not None:
        function["parameters"] = tool.parameters
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _chat_choice(choice: str | _Choice | None) -> Any:
    if isinstance(choice, _Choice):
        if choice.type != "function":
            raise RequestError(
                f"tool_choice: {choice.type!r} is not supported; 'auto', 'none', 'required' and a "
                "function by its name are"
            )
        return {"type": "function", "function": {"name": choice.name}}
    return choice or "auto"


def _chat_format(asked: _Format) -> dict[str, Any]:
    if asked.type != "json_schema":
        return {"type": asked.type}
    schema: dict[str, Any] = {"name": asked.name, "schema": asked.schema}
    if asked.strict is not None:
        schema["strict"] = asked.strict
    return {"type": "json_schema", "json_schema": schema}

"""Anthropic's Messages API: its request as a chat request. Pure.

What a chat completion cannot do (server tools, documents, …) is refused in words that name what
there is; fields that change nothing about the sampled tokens are ignored. So are two that would, as
vLLM's own Messages route does: ``thinking.budget_tokens``, because vLLM refuses a budget unless it
has a reasoning parser, and would force tokens where it ends (``thinking_token_budget`` asks for
it), and ``tool_result.is_error``, for which chat completions have no place.
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
from driftgate.histories import Message, messages_of_blocks
from driftgate.spoken import Block

__all__ = ["chat_request", "count_request"]

_ENCODE = msgspec.json.encode


class _Tool(msgspec.Struct):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: Raw = Raw(b"{}")
    strict: bool | None = None


class _Choice(msgspec.Struct):
    type: str
    name: str = ""
    disable_parallel_tool_use: bool | None = None


class _Format(msgspec.Struct):
    type: str = ""
    schema: Raw = Raw(b"{}")


class _Config(msgspec.Struct):
    format: _Format | None = None
    effort: str | None = None


class _Thinking(msgspec.Struct):
    type: str = ""


class _Asked(msgspec.Struct):
    """The fields that are read of a request."""

    messages: list[Message]
    system: str | list[Block] | None = None
    max_tokens: int | None = None
    stop_sequences: list[str] | None = None
    tools: list[_Tool] | None = None
    tool_choice: _Choice | None = None
    thinking: _Thinking | None = None
    output_config: _Config | None = None
    output_format: _Format | None = None
    mcp_servers: list[Raw] | None = None
    container: Raw = Raw()


_ASKED = msgspec.json.Decoder(_Asked)


def chat_request(body: bytes, fields: Fields) -> Fields:
    """The chat request for a Messages request. RequestError for what is not supported."""
    asked = _read(body)
    if asked.max_tokens is None:
        raise RequestError("max_tokens: field required")
    return engine_fields.passed(fields) | _prompt(asked, fields) | _raw(_options(asked))


def count_request(body: bytes, fields: Fields) -> Fields:
    """The engine's ``/tokenize`` request for a ``count_tokens`` request."""
    asked = _read(body)
    prompt = _prompt(asked, fields)
    if asked.tools:
        prompt["tools"] = Raw(_ENCODE([_chat_tool(tool) for tool in asked.tools]))
    return {"model": fields.get("model", Raw(b"null"))} | prompt


def _read(body: bytes) -> _Asked:
    try:
        asked = _ASKED.decode(body)
    except UNREADABLE as error:
        raise RequestError(f"the request does not have the form of one: {error}") from error
    if asked.mcp_servers or given(asked.container) is not None:
        raise RequestError("mcp_servers and container are not supported: run tools in the agent")
    return asked


def _raw(options: Iterable[tuple[str, Any]]) -> Fields:
    return {name: Raw(_ENCODE(value)) for name, value in options}


def _prompt(asked: _Asked, fields: Fields) -> Fields:
    """All that shapes the prompt, beside the tools."""
    messages = messages_of_blocks(asked.system, asked.messages)
    out = {"messages": Raw(_ENCODE(messages))}
    if asked.messages and asked.messages[-1].role == "assistant":
        # The answer goes on from these words of its own.
        out |= _raw([("continue_final_message", True), ("add_generation_prompt", False)])
    template = engine_fields.object_of(fields, "chat_template_kwargs")
    if asked.thinking is not None and asked.thinking.type:
        template = {"enable_thinking": Raw(_ENCODE(asked.thinking.type != "disabled"))} | template
    return out | _raw([("chat_template_kwargs", template)] if template else [])


def _options(asked: _Asked) -> Iterator[tuple[str, Any]]:
    yield "max_completion_tokens", asked.max_tokens
    if asked.stop_sequences:
        yield "stop", asked.stop_sequences
    if asked.tools:
        yield "tools", [_chat_tool(tool) for tool in asked.tools]
        yield "tool_choice", _chat_choice(asked.tool_choice)
        if asked.tool_choice is not None and asked.tool_choice.disable_parallel_tool_use:
            yield "parallel_tool_calls", False
    config = asked.output_config or _Config()
    if config.effort is not None:
        yield "reasoning_effort", config.effort
    wanted = config.format or asked.output_format
    if wanted is not None:
        schema = {"name": "output", "schema": wanted.schema}
        yield "response_format", {"type": "json_schema", "json_schema": schema}


def _chat_tool(tool: _Tool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise RequestError(
            f"tools: {tool.type!r} is not supported, because the engine has no tools of its own; "
            "only 'custom' is, which the agent runs itself"
        )
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.input_schema
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _chat_choice(choice: _Choice | None) -> Any:
    if choice is None:
        return "auto"
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    names = {"auto": "auto", "any": "required", "none": "none"}
    if choice.type not in names:
        raise RequestError(
            f"tool_choice: {choice.type!r} is not supported; auto, any, tool and none are"
        )
    return names[choice.type]

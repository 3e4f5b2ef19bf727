"""A chat request and an answer as what a template renders: who said what, with which tools. Pure.

Two readings of one message are kept apart: as it is spelled, for finding what an agent changed
between two calls, and its sense (``key``), for recognising an answer of ours that comes back in
other clothes: without its reasoning, with the arguments of its tool calls written anew.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw

from driftgate.errors import UNREADABLE, RequestError
from driftgate.histories import Message, led, messages_of_blocks, messages_of_input, said
from driftgate.spoken import Block, message_of
from driftgate.trace import Api, Trace

__all__ = ["Dialogue", "Said", "ToolCall", "dialogue_of", "read_answer", "read_dialogue"]

THOUGHT = re.compile(r"\A\s*(?:<think>)?(?P<thought>.*?)</think>", re.DOTALL)
"""Reasoning in the text itself, where the engine has no reasoning parser. Its first mark may stand
in the prompt already."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""What engines and agents call it."""

COMPARED = ("role", "content", "tool_calls", *REASONING)
"""Keys of a message that have a field of their own here."""

SILENT = ("cache_control", "refusal", "annotations", "audio", "function_call", "name")
"""Keys that clients drop or add while the text stays the same; ``name`` is in ``others`` where it
is a tool's."""

TEMPLATE_KEYS = (
    "add_generation_prompt",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "reasoning_effort",
)
"""Of a request: what vLLM gives the template besides messages and tools."""


class _Responses(msgspec.Struct):
    input: Raw = Raw(b'""')
    instructions: str | None = None


class _Blocks(msgspec.Struct):
    messages: list[Message]
    system: str | list[Block] | None = None


_RESPONSES = msgspec.json.Decoder(_Responses)
_BLOCKS = msgspec.json.Decoder(_Blocks)
_OBJECT = msgspec.json.Decoder(dict[str, Any])


class ToolCall(NamedTuple):
    """One call of a tool."""

    name: str
    arguments: str
    """As spelled; JSON where they came as an object."""


class Said(NamedTuple):
    """One message."""

    role: str
    text: str
    """Without reasoning that stands in it."""
    reasoning: str
    calls: tuple[ToolCall, ...]
    others: str
    """Canonical JSON of what else may be rendered: images, ids of tool calls, …"""

    @property
    def hands_over(self) -> bool:
        """It called the tool by which openai-agents, LangGraph's supervisor and swarm and AutoGen
        pass a conversation on to another agent."""
        return any(call.name.startswith("transfer_to_") for call in self.calls)

    @property
    def key(self) -> bytes:
        """Equal for one answer in all its clothes."""
        calls = [(call.name, _value(call.arguments)) for call in self.calls]
        sense = _canonical([self.text.strip(), calls])
        return hashlib.sha256(sense.encode(errors="surrogatepass")).digest()[:16]


class Dialogue(NamedTuple):
    """What a chat request gives the template."""

    model: str
    tools: dict[str, str]
    """Canonical JSON by name, in their order."""
    template: dict[str, str]
    """Canonical JSON of each of ``TEMPLATE_KEYS`` that was sent."""
    messages: tuple[Said, ...]


def read_dialogue(request: bytes, api: Api = "chat") -> Dialogue | None:
    """Of a request body as the engine was asked it; None where it holds no whole conversation."""
    fields = _object(request)
    if fields is None:
        return None
    messages = _messages(request, fields, api)
    if messages is None or not all(isinstance(message, dict) for message in messages):
        return None
    tools = fields.get("tools")
    return Dialogue(
        model=str(fields.get("model")),
        tools=dict(_tools(tools)) if isinstance(tools, list) else {},
        template={key: _canonical(fields[key]) for key in TEMPLATE_KEYS if key in fields},
        messages=tuple(map(_said, messages)),
    )


def dialogue_of(trace: Trace) -> Dialogue | None:
    """Of a trace's request."""
    return read_dialogue(trace.request, trace.meta.api)


def read_answer(choice: bytes) -> Said | None:
    """Of an answer in any API; None where it holds no message."""
    message = message_of(choice)
    return _said({**message, "role": "assistant"}) if message else None


def _messages(request: bytes, fields: Mapping[str, Any], api: Api) -> list[Any] | None:
    """Chat messages of a request."""
    try:
        if api == "responses" and not fields.get("previous_response_id"):
            asked = _RESPONSES.decode(request)
            system = [] if asked.instructions is None else [said("system", asked.instructions)]
            return led([*system, *messages_of_input(asked.input)])
        if api == "messages":
            blocks = _BLOCKS.decode(request)
            return messages_of_blocks(blocks.system, blocks.messages)
    except (*UNREADABLE, RequestError):
        return None
    messages = fields.get("messages")
    return messages if isinstance(messages, list) else None


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        return _OBJECT.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return None


def _said(message: Mapping[str, Any]) -> Said:
    role = str(message.get("role"))
    text, parts = _text(message.get("content"))
    reasoning = next((str(message[key]) for key in REASONING if message.get(key)), "")
    if role == "assistant" and not reasoning and (thought := THOUGHT.match(text)):
        reasoning, text = thought["thought"], text[thought.end() :]
    others = {
        key: value
        for key, value in message.items()
        if key not in COMPARED and key not in SILENT and value is not None
    }
    if parts:
        others["content"] = parts
    return Said(role, text, reasoning, tuple(_calls(message)), _canonical(others))


def _text(content: object) -> tuple[str, list[Any]]:
    """The text, and the parts that are something else."""
    if not isinstance(content, list):
        return (content if isinstance(content, str) else ""), []
    texts, parts = list[str](), list[Any]()
    for part in content:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            parts.append(part)
    return "".join(texts), parts


def _calls(message: Mapping[str, Any]) -> Iterator[ToolCall]:
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            arguments = function.get("arguments")
            spelled = arguments if isinstance(arguments, str) else _canonical(arguments)
            yield ToolCall(str(function.get("name")), spelled)


def _tools(tools: list[Any]) -> Iterator[tuple[str, str]]:
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        named = function if isinstance(function, dict) else tool
        name = named.get("name") if isinstance(named, dict) else None
        yield str(name) if name is not None else f"#{index}", msgspec.json.encode(tool).decode()


def _value(arguments: str) -> Any:
    """What arguments spell; themselves where they are no JSON."""
    try:
        return msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return arguments


def _canonical(value: object) -> str:
    return msgspec.json.encode(value, order="sorted").decode()

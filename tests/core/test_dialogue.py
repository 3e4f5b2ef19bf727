"""One conversation in the requests of three APIs is one dialogue."""

from __future__ import annotations

import json
from typing import Any

from driftgate.dialogue import Dialogue, read_dialogue
from driftgate.trace import Api

ARGUMENTS = '{"left":6,"right":7}'
CHAT: Any = {
    "model": "tiny",
    "tools": [{"type": "function", "function": {"name": "product"}}],
    "messages": [
        {"role": "system", "content": "You multiply."},
        {"role": "user", "content": "How much?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [{"id": "a", "function": {"name": "product", "arguments": ARGUMENTS}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "42"},
    ],
}
RESPONSES: Any = {
    "model": "tiny",
    "tools": [{"type": "function", "name": "product"}],
    "instructions": "You multiply.",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "How much?"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Let me see."}],
        },
        {"type": "function_call", "call_id": "a", "name": "product", "arguments": ARGUMENTS},
        {"type": "function_call_output", "call_id": "a", "output": "42"},
    ],
}
MESSAGES: Any = {
    "model": "tiny",
    "max_tokens": 9,
    "tools": [{"name": "product", "input_schema": {}}],
    "system": [{"type": "text", "text": "You multiply."}],
    "messages": [
        {"role": "user", "content": "How much?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "a", "name": "product", "input": json.loads(ARGUMENTS)},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "42"}]},
    ],
}


def read(request: Any, api: Api) -> Dialogue | None:
    return read_dialogue(json.dumps(request).encode(), api)


def sense(dialogue: Dialogue | None) -> Any:
    assert dialogue is not None
    return list(dialogue.tools), [(said.role, said.key) for said in dialogue.messages]


def test_one_conversation_in_three_apis() -> None:
    assert sense(read(RESPONSES, "responses")) == sense(read(CHAT, "chat"))
    assert sense(read(MESSAGES, "messages")) == sense(read(CHAT, "chat"))


def test_what_holds_no_whole_conversation_is_none() -> None:
    assert read(RESPONSES | {"previous_response_id": "resp_1"}, "responses") is None
    assert read({"input": [{"type": "item_reference"}]}, "responses") is None
    assert read({"messages": "hi"}, "messages") is None
    assert read({"messages": "hi"}, "chat") is None

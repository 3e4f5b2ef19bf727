"""Requests of Responses and Messages as chat requests, by table; what is refused, and how."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from driftgate.errors import RequestError
from driftgate.gateway import anthropic
from driftgate.gateway.dialects import chat_fields
from driftgate.gateway.openai import Translated, read_request

USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"x": {"type": "number"}}}


def chat(api: Translated, request: dict[str, Any], **more: Any) -> dict[str, Any]:
    body = json.dumps({"model": "tiny", **request}).encode()
    fields = chat_fields(api, body, read_request(body), **more)
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(fields))
    assert found.pop("model") == "tiny"
    return found


def called(call_id: str, arguments: str) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


INPUTS: list[tuple[Any, list[dict[str, Any]]]] = [
    ("hi", [USER]),
    ([{"role": "user", "content": "hi"}], [USER]),
    ([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
     [USER]),
    ([{"role": "developer", "content": "be"}], [{"role": "system", "content": "be"}]),
    ([{"role": "user", "content": [{"type": "input_text", "text": "a"},
                                   {"type": "input_image", "image_url": "data:x"}]}],
     [{"role": "user", "content": [{"type": "text", "text": "a"},
                                   {"type": "image_url", "image_url": {"url": "data:x"}}]}]),
    # One answer, sent back: reasoning, text and two calls are one message.
    ([USER,
      {"type": "reasoning", "id": "rs_1", "summary": [],
       "content": [{"type": "reasoning_text", "text": "hm"}]},
      {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
       "content": [{"type": "output_text", "text": "So:", "annotations": []}]},
      {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
      {"type": "function_call", "call_id": "c2", "name": "f", "arguments": '{"x":1.50}'},
      {"type": "function_call_output", "call_id": "c1", "output": "1"},
      {"type": "function_call_output", "call_id": "c2",
       "output": [{"type": "input_text", "text": "2"}]}],
     [USER,
      {"role": "assistant", "content": "So:", "reasoning": "hm",
       "tool_calls": [called("c1", "{}"), called("c2", '{"x":1.50}')]},
      {"role": "tool", "tool_call_id": "c1", "content": "1"},
      {"role": "tool", "tool_call_id": "c2", "content": "2"}]),
    # Two answers side by side stay two.
    ([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
     [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]),
]  # fmt: skip


@pytest.mark.parametrize(("given", "messages"), INPUTS)
def test_responses_input(given: Any, messages: list[dict[str, Any]]) -> None:
    assert chat("responses", {"input": given})["messages"] == messages


BLOCKS: list[tuple[Any, list[dict[str, Any]]]] = [
    ([USER], [USER]),
    ([{"role": "user", "content": [{"type": "text", "text": "hi",
                                    "cache_control": {"type": "ephemeral"}}]}], [USER]),
    ([{"role": "user", "content": [
        {"type": "text", "text": "a"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}},
        {"type": "image", "source": {"type": "url", "url": "http://x/y"}}]}],
     [{"role": "user", "content": [
         {"type": "text", "text": "a"},
         {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
         {"type": "image_url", "image_url": {"url": "http://x/y"}}]}]),
    ([USER,
      {"role": "assistant", "content": [
          {"type": "thinking", "thinking": "hm", "signature": "s"},
          {"type": "redacted_thinking", "data": "x"},
          {"type": "text", "text": "So:"},
          {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1.5}}]},
      {"role": "user", "content": [
          {"type": "tool_result", "tool_use_id": "c1", "content": "1", "is_error": False},
          {"type": "text", "text": "go on"}]}],
     [USER,
      {"role": "assistant", "content": "So:", "reasoning": "hm",
       "tool_calls": [called("c1", '{"x": 1.5}')]},
      {"role": "tool", "tool_call_id": "c1", "content": "1"},
      {"role": "user", "content": "go on"}]),
    ([USER, {"role": "assistant", "content": [
        {"type": "tool_use", "id": "c1", "name": "f", "input": {"INVALID_JSON": '{"x"'}}]},
      {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1"}]}],
     [USER, {"role": "assistant", "content": None, "tool_calls": [called("c1", '{"x"')]},
      {"role": "tool", "tool_call_id": "c1", "content": ""}]),
]  # fmt: skip


@pytest.mark.parametrize(("given", "messages"), BLOCKS)
def test_messages_blocks(given: Any, messages: list[dict[str, Any]]) -> None:
    assert chat("messages", {"messages": given, "max_tokens": 5})["messages"] == messages


BILLED = "x-anthropic-billing-header: cc_version=2.1; cch=1;"
SYSTEMS: list[tuple[Translated, dict[str, Any], list[tuple[str, Any]]]] = [
    ("responses", {"instructions": "a", "input": [
        {"role": "developer", "content": [{"type": "input_text", "text": "b"},
                                          {"type": "input_text", "text": "c"}]},
        {"role": "system", "content": "d"}, USER, {"role": "developer", "content": "e"}]},
     [("system", "a\n\nb\nc\n\nd"), ("user", "hi"), ("system", "e")]),
    ("messages", {"system": "a", "messages": [{"role": "system", "content": "b"}, USER]},
     [("system", "a\n\nb"), ("user", "hi")]),
    ("messages", {"system": BILLED, "messages": [
        {"role": "system", "content": BILLED}, USER,
        {"role": "system", "content": [{"type": "text", "text": BILLED},
                                       {"type": "text", "text": "a"},
                                       {"type": "text", "text": "b"}]}, USER]},
     [("user", "hi"), ("system", "ab"), ("user", "hi")]),
]  # fmt: skip


@pytest.mark.parametrize(("api", "request_", "messages"), SYSTEMS)
def test_system_messages_at_the_beginning_are_one(
    api: Translated, request_: dict[str, Any], messages: list[tuple[str, Any]]
) -> None:
    found = chat(api, request_ | {"max_tokens": 5})["messages"]
    assert [(m["role"], m["content"]) for m in found] == messages


FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}
NAMED = {"type": "function", "function": {"name": "f"}}
R_TOOLS = {"tools": [{"type": "function", **FUNCTION}]}
M_TOOL = {"name": "f", "description": "d", "input_schema": SCHEMA, "strict": True}

OPTIONS: list[tuple[Translated, dict[str, Any], dict[str, Any]]] = [
    ("responses", {"temperature": 1.5, "top_p": 0.5, "seed": 3, "ignore_eos": True},
     {"temperature": 1.5, "top_p": 0.5, "seed": 3, "ignore_eos": True}),
    ("responses", {"max_output_tokens": 9}, {"max_completion_tokens": 9}),
    ("responses", {"stream": True},
     {"stream": True, "stream_options": {"include_usage": True}}),
    ("responses", {"reasoning": {"effort": "low", "summary": "auto"}},
     {"reasoning_effort": "low"}),
    ("responses", R_TOOLS, {"tools": [TOOL], "tool_choice": "auto"}),
    ("responses", {**R_TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
     {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}),
    ("responses", {**R_TOOLS, "tool_choice": {"type": "function", "name": "f"}},
     {"tools": [TOOL], "tool_choice": NAMED}),
    ("responses", {"tools": [], "tool_choice": "auto", "store": False, "truncation": "disabled",
                   "background": False, "conversation": None, "include": [],
                   "prompt_cache_key": "x", "service_tier": "auto", "no_such_field": 1}, {}),
    ("responses", {"text": {"format": {"type": "text"}, "verbosity": "low"}}, {}),
    ("responses", {"text": {"format": {"type": "json_object"}}},
     {"response_format": {"type": "json_object"}}),
    ("responses", {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA,
                                       "strict": True}}},
     {"response_format": {"type": "json_schema", "json_schema": {
         "name": "n", "schema": SCHEMA, "strict": True}}}),
    ("responses", {"include": ["message.output_text.logprobs", "reasoning.encrypted_content"],
                   "top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
    ("messages", {"temperature": 0.5, "top_p": 0.5, "top_k": 4, "stop_sequences": ["END"]},
     {"temperature": 0.5, "top_p": 0.5, "top_k": 4, "stop": ["END"]}),
    ("messages", {"tools": [M_TOOL]}, {"tools": [TOOL], "tool_choice": "auto"}),
    ("messages", {"tools": [M_TOOL], "tool_choice": {"type": "any"}},
     {"tools": [TOOL], "tool_choice": "required"}),
    ("messages", {"tools": [{**M_TOOL, "type": "custom"}],
                  "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True}},
     {"tools": [TOOL], "tool_choice": NAMED, "parallel_tool_calls": False}),
    ("messages", {"tools": [M_TOOL], "tool_choice": {"type": "none"}},
     {"tools": [TOOL], "tool_choice": "none"}),
    ("messages", {"thinking": {"type": "enabled", "budget_tokens": 1024}},
     {"chat_template_kwargs": {"enable_thinking": True}}),
    ("messages", {"thinking": {"type": "disabled"}, "chat_template_kwargs": {"a": 1}},
     {"chat_template_kwargs": {"enable_thinking": False, "a": 1}}),
    ("messages", {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA},
                                    "effort": "low"}},
     {"reasoning_effort": "low", "response_format": {"type": "json_schema", "json_schema": {
         "name": "output", "schema": SCHEMA}}}),
    ("messages", {"service_tier": "auto", "container": None, "context_management": {}}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("api", "given", "options"), OPTIONS)
def test_options(api: Translated, given: dict[str, Any], options: dict[str, Any]) -> None:
    ask: dict[str, Any] = {"input": "hi"}
    if api == "messages":
        ask, options = (
            {"messages": [USER], "max_tokens": 5},
            {
                "max_completion_tokens": 5,
                **options,
            },
        )
    assert chat(api, {**ask, **given}) == {"messages": [USER], **options}


def test_instructions_and_earlier_messages_come_first() -> None:
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = chat("responses", {"instructions": "be", "input": "hi"}, earlier=earlier)
    assert found["messages"] == [{"role": "system", "content": "be"}, *earlier, USER]


@pytest.mark.parametrize(
    ("system", "said"),
    [
        ("be", [{"role": "system", "content": "be"}]),
        ([{"type": "text", "text": "be "}, {"type": "text", "text": "so"}],
         [{"role": "system", "content": "be so"}]),
        ([{"type": "text", "text": "x-anthropic-billing-header: cch=1;"},
          {"type": "text", "text": "be"}], [{"role": "system", "content": "be"}]),
        ([], []),
    ],
)  # fmt: skip
def test_system(system: Any, said: list[dict[str, Any]]) -> None:
    request = {"messages": [USER], "system": system, "max_tokens": 5}
    assert chat("messages", request)["messages"] == [*said, USER]


def test_an_answer_that_was_begun_goes_on() -> None:
    begun = {"role": "assistant", "content": "So"}
    found = chat("messages", {"messages": [USER, begun], "max_tokens": 5})
    assert (found["continue_final_message"], found["add_generation_prompt"]) == (True, False)


def test_counting_asks_for_the_same_prompt() -> None:
    request = {"model": "tiny", "messages": [USER], "system": "be", "tools": [M_TOOL]}
    body = json.dumps(request).encode()
    counted = msgspec.json.encode(anthropic.count_request(body, read_request(body)))
    sent = chat("messages", {**request, "max_tokens": 5})
    assert json.loads(counted) == {
        "model": "tiny",
        "messages": sent["messages"],
        "tools": sent["tools"],
    }


def tool_use(given: Any) -> list[dict[str, Any]]:
    block = {"type": "tool_use", "id": "c", "name": "f", "input": given}
    return [USER, {"role": "assistant", "content": [block]}]


REFUSED: list[tuple[Translated, dict[str, Any], str]] = [
    ("responses", {"input": "hi", "background": True}, "background"),
    ("responses", {"input": "hi", "conversation": "conv_1"}, "previous_response_id"),
    ("responses", {"input": "hi", "prompt": {"id": "p"}}, "prompt"),
    ("responses", {"input": "hi", "truncation": "auto"}, "truncation"),
    ("responses", {}, "input is missing"),
    ("responses", {"input": 3}, "input"),
    ("responses", {"input": [{"type": "item_reference", "id": "x"}]}, "'item_reference'"),
    ("responses", {"input": [{"type": "computer_call"}]}, "function_call_output"),
    ("responses", {"input": [{"role": "wizard", "content": "x"}]}, "'wizard'"),
    ("responses", {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
     "'input_file'"),
    ("responses", {"input": [{"role": "user", "content": [
        {"type": "input_image", "file_id": "f"}]}]}, "without image_url"),
    ("responses", {"input": "hi", "tools": [{"type": "web_search"}]}, "'web_search'"),
    ("responses", {"input": "hi", "tools": [{"type": "custom", "name": "apply_patch"}]},
     "'function' whose only parameter is a string"),
    ("responses", {"input": "hi", **R_TOOLS, "tool_choice": {"type": "mcp"}}, "'mcp'"),
    ("messages", {"messages": [USER]}, "max_tokens"),
    ("messages", {"max_tokens": 5}, "messages"),
    ("messages", {"messages": [{"role": "tool", "content": "x"}], "max_tokens": 5}, "'tool'"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "document"}]}],
                  "max_tokens": 5}, "'document'"),
    ("messages", {"messages": [USER], "max_tokens": 5, "mcp_servers": [{}]}, "mcp_servers"),
    ("messages", {"messages": [USER], "max_tokens": 5,
                  "tools": [{"type": "bash_20250124", "name": "bash"}]}, "'bash_20250124'"),
    ("messages", {"messages": [USER], "max_tokens": 5, "tools": [M_TOOL],
                  "tool_choice": {"type": "some"}}, "'some'"),
    ("messages", {"messages": tool_use("text"), "max_tokens": 5}, "tool_use"),
    ("messages", {"messages": tool_use([]), "max_tokens": 5}, "tool_use"),
    ("messages", {"messages": tool_use(None), "max_tokens": 5}, "tool_use"),
    ("messages", {"messages": tool_use({"INVALID_JSON": 5}), "max_tokens": 5}, "tool_use"),
]  # fmt: skip


@pytest.mark.parametrize(("api", "request_", "named"), REFUSED)
def test_what_is_not_supported_is_named(
    api: Translated, request_: dict[str, Any], named: str
) -> None:
    with pytest.raises(RequestError, match=named):
        chat(api, request_)

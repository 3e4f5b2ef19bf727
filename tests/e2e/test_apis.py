"""One conversation through chat, Responses and Messages samples the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from driftgate.testing.engine import EngineProcess
from driftgate.trace import Trace
from tests.e2e.support import Proxied, proxy

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

SYSTEM = "You are a guide."
FIRST, THEN = "What is six times seven?", "Say it again."
FACTOR = {"type": "integer", "enum": [2, 3, 5, 6, 7]}
"""A random model ends a list of choices; of digits it need not."""

PARAMETERS: Any = {
    "type": "object",
    "properties": {"left": FACTOR, "right": FACTOR},
    "required": ["left", "right"],
    "additionalProperties": False,
}
FUNCTION: Any = {"name": "product", "description": "Multiply.", "parameters": PARAMETERS}
RESULT, TOKENS = "42", 24


async def by_chat(proxied: Proxied, name: str) -> None:
    """A forced tool call, its result, an answer, another turn."""
    tools: Any = [{"type": "function", "function": FUNCTION}]
    messages: list[Any] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": FIRST},
    ]
    async with AsyncOpenAI(base_url=f"{proxied.url}/t/{name}/v1", api_key="none") as client:
        for seed in range(3):
            choice: Any = {"type": "function", "function": {"name": "product"}}
            answer = await client.chat.completions.create(
                model=proxied.engine.model,
                messages=messages,
                tools=tools,
                tool_choice=choice if seed == 0 else "none",
                max_completion_tokens=96 if seed == 0 else TOKENS,
                seed=seed,
                extra_body={"ignore_eos": seed > 0},
            )
            said = answer.choices[0].message
            messages.append(said.model_dump(exclude_none=True))
            results: list[Any] = [
                {"role": "tool", "tool_call_id": call.id, "content": RESULT}
                for call in said.tool_calls or ()
            ]
            messages += results or [{"role": "user", "content": THEN}]


async def by_responses(proxied: Proxied, name: str, *, stream: bool, named: bool) -> None:
    """The same; ``named``: by previous_response_id, else the whole history each time."""
    items: list[Any] = [{"role": "user", "content": FIRST}]
    previous = None
    async with AsyncOpenAI(base_url=f"{proxied.url}/t/{name}/v1", api_key="none") as client:
        for seed in range(3):
            asked: dict[str, Any] = {
                "model": proxied.engine.model,
                "instructions": SYSTEM,
                "input": items,
                "tools": [{"type": "function", **FUNCTION}],
                "tool_choice": {"type": "function", "name": "product"} if seed == 0 else "none",
                "max_output_tokens": 96 if seed == 0 else TOKENS,
                "extra_body": {"seed": seed, "ignore_eos": seed > 0},
            }
            if previous is not None:
                asked["previous_response_id"] = previous
            if stream:
                async with client.responses.stream(**asked) as events:
                    answer: Any = [event async for event in events][-1]
                    answer = answer.response  # the helper's own end takes no incomplete one
            else:
                answer = await client.responses.create(**asked)
            assert answer.usage.output_tokens > 0
            calls = [item for item in answer.output if item.type == "function_call"]
            new: list[Any] = [
                {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
                for call in calls
            ] or [{"role": "user", "content": THEN}]
            if named:
                items, previous = new, answer.id
            else:
                items += [i.model_dump(exclude_none=True, mode="json") for i in answer.output]
                items += new


async def by_messages(proxied: Proxied, name: str, *, stream: bool) -> None:
    """The same."""
    turns: list[Any] = [{"role": "user", "content": FIRST}]
    tool = {"name": "product", "description": "Multiply.", "input_schema": PARAMETERS}
    async with AsyncAnthropic(base_url=f"{proxied.url}/t/{name}", api_key="none") as client:
        for seed in range(3):
            forced = {"type": "tool", "name": "product"}
            asked: dict[str, Any] = {
                "model": proxied.engine.model,
                "system": SYSTEM,
                "messages": turns,
                "tools": [tool],
                "tool_choice": forced if seed == 0 else {"type": "none"},
                "max_tokens": 96 if seed == 0 else TOKENS,
                "extra_body": {"seed": seed, "ignore_eos": seed > 0},
            }
            if stream:
                async with client.messages.stream(**asked) as events:
                    answer: Any = await events.get_final_message()
            else:
                answer = await client.messages.create(**asked)
            content = [block.model_dump(exclude_none=True) for block in answer.content]
            for block in content:
                block.pop("parsed_output", None)
            results: list[Any] = [
                {"type": "tool_result", "tool_use_id": use["id"], "content": RESULT}
                for use in content
                if use["type"] == "tool_use"
            ]
            turns += [
                {"role": "assistant", "content": content},
                {"role": "user", "content": results or THEN},
            ]


def same(a: Trace, b: Trace) -> None:
    """The same tokens with the same numbers."""
    for name in ("prompt_ids", "response_ids", "logprobs", "routes"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), (name, b.meta.api)


@pytest.mark.parametrize("mode", ["plugin", "synthesise"])
async def test_one_conversation_in_three_apis(
    engines: dict[str, EngineProcess], tmp_path: Path, mode: Any
) -> None:
    async with proxy(engines["moe"], tmp_path, streaming_routes=mode) as proxied:
        await by_chat(proxied, "chat")
        ways = {
            "responses": by_responses(proxied, "responses", stream=False, named=False),
            "responses-stream": by_responses(proxied, "responses-stream", stream=True, named=False),
            "previous": by_responses(proxied, "previous", stream=False, named=True),
            "messages": by_messages(proxied, "messages", stream=False),
            "messages-stream": by_messages(proxied, "messages-stream", stream=True),
        }
        for way in ways.values():
            await way
    chat = proxied.traces("chat")
    assert [t.meta.sampling.structured for t in chat] == ["tool_choice=named", None, None]
    for name in ways:
        traces = proxied.traces(name)
        assert [t.meta.missing for t in traces] == [[]] * 3
        assert [t.meta.streamed for t in traces] == [name.endswith("stream")] * 3
        for a, b in zip(chat, traces, strict=True):
            same(a, b)

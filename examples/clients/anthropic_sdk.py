"""Anthropic's SDK: messages with tools, and its stream helper.

``python -m examples.clients.anthropic_sdk stream --model NAME``
"""

from __future__ import annotations

from typing import Any

from anthropic import Anthropic

from examples.clients import task

TOOL: Any = {
    "name": "product",
    "description": "Multiply two numbers.",
    "input_schema": {
        "type": "object",
        "properties": {
            "left": {"type": "integer", "enum": [2, 3, 5, 6, 7]},
            "right": {"type": "integer", "enum": [2, 3, 5, 6, 7]},
        },
        "required": ["left", "right"],
        "additionalProperties": False,
    },
}


def converse(options: task.Options) -> list[Any]:
    """A forced tool call, its result, an answer, another."""
    turns: list[Any] = [{"role": "user", "content": task.QUESTION}]
    transcript = []
    with Anthropic() as client:
        for step in range(3):
            request: dict[str, Any] = {
                "model": options.model,
                "system": task.SYSTEM,
                "messages": turns,
                "tools": [TOOL],
                "tool_choice": {"type": "tool", "name": "product"}
                if step == 0
                else {"type": "none"},
                "max_tokens": task.FIRST_TOKENS if step == 0 else task.TOKENS,
                "extra_body": {"seed": options.run, "min_tokens": task.MIN_TOKENS},
            }
            if options.variant == "stream":
                with client.messages.stream(**request) as events:
                    for _ in events:
                        pass
                    answer: Any = events.get_final_message()
            else:
                answer = client.messages.create(**request)
            uses = [block for block in answer.content if block.type == "tool_use"]
            text = "".join(block.text for block in answer.content if block.type == "text")
            transcript.append(task.said(text, (task.call(use.name, use.input) for use in uses)))
            results: list[Any] = [
                {
                    "type": "tool_result",
                    "tool_use_id": use.id,
                    "content": task.product(**use.input),
                }
                for use in uses
            ]
            turns += [
                {"role": "assistant", "content": answer.content},
                {"role": "user", "content": results or task.AGAIN},
            ]
    return transcript


if __name__ == "__main__":
    task.main(("anthropic",), {"messages": converse, "stream": converse})

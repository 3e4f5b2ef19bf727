"""OpenAI's SDK: sync, async, its stream helper, ``parse``, and the Responses API both ways.

``python -m examples.clients.openai_sdk stream --model NAME``
"""

from __future__ import annotations

from typing import Any

from openai import AsyncOpenAI, OpenAI, pydantic_function_tool
from pydantic import BaseModel

from examples.clients import task


class Product(BaseModel):
    """Multiply two numbers."""

    left: task.Factor
    right: task.Factor


TOOL: Any = pydantic_function_tool(Product, name="product")
FORCED: Any = {"type": "function", "function": {"name": "product"}}
RESPONSES_TOOL: Any = {"type": "function", **TOOL["function"]}


def asked(options: task.Options, messages: list[Any], *, forced: bool) -> dict[str, Any]:
    """A chat request."""
    return {
        "model": options.model,
        "messages": messages,
        "tools": [TOOL],
        "tool_choice": FORCED if forced else "none",
        "max_completion_tokens": task.FIRST_TOKENS if forced else task.TOKENS,
        "seed": options.run,
        "extra_body": {"min_tokens": task.MIN_TOKENS},
    }


class Chat:
    """A conversation and what the model said in it."""

    def __init__(self) -> None:
        self.messages: list[Any] = [
            {"role": "system", "content": task.SYSTEM},
            {"role": "user", "content": task.QUESTION},
        ]
        self.transcript: list[Any] = []

    def take(self, message: Any) -> None:
        """Add an answer, and the results of its calls or the next question."""
        calls = message.tool_calls or []
        self.transcript.append(
            task.said(
                message.content,
                (task.call(c.function.name, c.function.arguments) for c in calls),
            )
        )
        self.messages.append(message.model_dump(exclude_none=True, exclude={"parsed"}))
        for call in calls:
            call.function.__dict__.pop("parsed_arguments", None)
            numbers = Product.model_validate_json(call.function.arguments)
            result = task.product(numbers.left, numbers.right)
            self.messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        if not calls:
            self.messages.append({"role": "user", "content": task.AGAIN})


def sync(options: task.Options) -> list[Any]:
    """``client.chat.completions.create``."""
    chat = Chat()
    with OpenAI() as client:
        for step in range(3):
            answer = client.chat.completions.create(
                **asked(options, chat.messages, forced=step == 0)
            )
            chat.take(answer.choices[0].message)
    return chat.transcript


async def asynchronous(options: task.Options) -> list[Any]:
    """The same by ``AsyncOpenAI``."""
    chat = Chat()
    async with AsyncOpenAI() as client:
        for step in range(3):
            answer = await client.chat.completions.create(
                **asked(options, chat.messages, forced=step == 0)
            )
            chat.take(answer.choices[0].message)
    return chat.transcript


def stream(options: task.Options) -> list[Any]:
    """``client.chat.completions.stream``, which puts the answer together from typed events."""
    chat = Chat()
    with OpenAI() as client:
        for step in range(3):
            with client.chat.completions.stream(
                **asked(options, chat.messages, forced=step == 0)
            ) as events:
                for _ in events:
                    pass
                chat.take(events.get_final_completion().choices[0].message)
    return chat.transcript


def parse(options: task.Options) -> list[Any]:
    """``client.chat.completions.parse``: a tool call and two answers that are objects."""
    chat = Chat()
    with OpenAI() as client:
        for step in range(3):
            request = asked(options, chat.messages, forced=step == 0)
            if step > 0:
                request["response_format"] = Product
            message = client.chat.completions.parse(**request).choices[0].message
            if step > 0:
                assert isinstance(message.parsed, Product)
            else:
                assert message.tool_calls is not None
                assert isinstance(message.tool_calls[0].function.parsed_arguments, Product)
            chat.take(message)
    return chat.transcript


def responses(options: task.Options) -> list[Any]:
    """``client.responses.create`` with the history, then ``parse`` by ``previous_response_id``."""
    return _respond(options, stream=False)


def responses_stream(options: task.Options) -> list[Any]:
    """``client.responses.stream``, which checks and adds up the typed events."""
    return _respond(options, stream=True)


def _respond(options: task.Options, *, stream: bool) -> list[Any]:
    items: list[Any] = [{"role": "user", "content": task.QUESTION}]
    transcript = []
    with OpenAI() as client:
        for step in range(3):
            request: dict[str, Any] = {
                "model": options.model,
                "instructions": task.SYSTEM,
                "input": items,
                "tools": [RESPONSES_TOOL],
                "tool_choice": {"type": "function", "name": "product"} if step == 0 else "none",
                "max_output_tokens": task.FIRST_TOKENS if step == 0 else task.TOKENS,
                "extra_body": {"seed": options.run, "min_tokens": task.MIN_TOKENS},
            }
            if stream:
                with client.responses.stream(**request) as events:
                    for _ in events:
                        pass
                    answer: Any = events.get_final_response()
            else:
                answer = client.responses.create(**request)
            calls = [item for item in answer.output if item.type == "function_call"]
            transcript.append(
                task.said(answer.output_text, (task.call(c.name, c.arguments) for c in calls))
            )
            items += [_sent_back(item) for item in answer.output]
            for call in calls:
                numbers = Product.model_validate_json(call.arguments)
                result = task.product(numbers.left, numbers.right)
                items.append(
                    {"type": "function_call_output", "call_id": call.call_id, "output": result}
                )
            if not calls:
                items.append({"role": "user", "content": task.AGAIN})
    return transcript


def _sent_back(item: Any) -> Any:
    return item.model_dump(exclude_none=True, mode="json", exclude={"parsed_arguments"})


VARIANTS: dict[str, task.Variant] = {
    "sync": sync,
    "async": asynchronous,
    "stream": stream,
    "parse": parse,
    "responses": responses,
    "responses-stream": responses_stream,
}

if __name__ == "__main__":
    task.main(("openai",), VARIANTS)

"""openai-agents: a handoff, a function tool, a helper that is a tool; Responses or chat.

``python -m examples.clients.openai_agents responses --model NAME``
"""

from __future__ import annotations

from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    Runner,
    function_tool,
    set_default_openai_api,
    set_tracing_disabled,
)
from pydantic import BaseModel

from examples.clients import task


class Errand(BaseModel):
    """What the guide asks the helper; a grammar bounds it, as it bounds all forced calls."""

    task: Literal[
        "Count the files of the folder that the user named.",
        "Find out who wrote most of the files in the folder.",
    ]


def settings(options: task.Options, choice: str | None = None) -> Any:
    """After a tool has run, the library itself sets the choice back to the model's own."""
    return ModelSettings(
        tool_choice=choice,
        max_tokens=task.TOKENS,
        extra_body={"seed": options.run, "min_tokens": task.MIN_TOKENS},
    )


def crew(options: task.Options) -> Any:
    """A guide who hands over to a reckoner, who multiplies and answers."""
    reckoner = Agent(
        name="reckoner",
        instructions="You multiply.",
        model=options.model,
        tools=[function_tool(task.product)],
        model_settings=settings(options, "product"),
    )
    return Agent(
        name="guide",
        instructions=task.SYSTEM,
        model=options.model,
        handoffs=[reckoner],
        model_settings=settings(options, "transfer_to_reckoner"),
    )


def with_helper(options: task.Options, inner: list[Any]) -> Any:
    """A guide who asks a helper, an agent with a conversation of its own; ``inner`` takes what the
    helper said."""

    async def keep(result: Any) -> str:
        inner.extend(_said(answer.output) for answer in result.raw_responses)
        return str(result.final_output)

    helper = Agent(
        name="helper",
        instructions="You run errands.",
        model=options.model,
        model_settings=settings(options),
    )
    tool = helper.as_tool(
        "ask_helper", "Have an errand run.", custom_output_extractor=keep, parameters=Errand
    )
    return Agent(
        name="guide",
        instructions=task.SYSTEM,
        model=options.model,
        tools=[tool],
        model_settings=settings(options, "ask_helper"),
    )


async def run(options: task.Options) -> list[Any]:
    """One run; ``-stream``: by ``run_streamed``."""
    set_tracing_disabled(True)
    api, _, streamed = options.variant.partition("-")
    set_default_openai_api("responses" if api == "responses" else "chat_completions")
    inner: list[Any] = []
    agent = with_helper(options, inner) if api == "helper" else crew(options)
    if streamed:
        result: Any = Runner.run_streamed(agent, task.QUESTION)
        async for _ in result.stream_events():
            pass
    else:
        result = await Runner.run(agent, task.QUESTION)
    first, *rest = [_said(answer.output) for answer in result.raw_responses]
    return [first, *inner, *rest]


def _said(output: list[Any]) -> dict[str, Any]:
    texts = [part.text for item in output if item.type == "message" for part in item.content]
    calls = [task.call(i.name, i.arguments) for i in output if i.type == "function_call"]
    return task.said("".join(texts), calls)


VARIANTS = ("responses", "responses-stream", "chat", "chat-stream", "helper")

if __name__ == "__main__":
    task.main(("openai-agents",), dict.fromkeys(VARIANTS, run))

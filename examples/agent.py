"""A tool-using agent on the OpenAI SDK that knows nothing of driftgate.

It takes its endpoint from ``OPENAI_BASE_URL`` like any other. Its tools are real (they read a
folder and calculate), its conversations have several turns, some are streamed, and the last may
sample two answers. A tiny random model never decides to call a tool by itself, so the tool turn
forces the choice; every other turn samples freely.
"""

from __future__ import annotations

import argparse
import json
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openai import OpenAI

__all__ = ["Task", "run", "tasks"]

MAX_TOKENS = 48
"""Enough for drift statistics, little enough for a CPU."""

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "list_files",
            "description": "List the files of the workspace.",
            "parameters": {
                "type": "object",
                "properties": {"suffix": {"type": "string", "enum": [".txt", ".py", ""]}},
                "required": ["suffix"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "calculate",
            "description": "Evaluate an arithmetic expression of two integers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "left": {"type": "integer", "enum": [2, 3, 5, 7, 11]},
                    "op": {"type": "string", "enum": ["+", "-", "*"]},
                    "right": {"type": "integer", "enum": [1, 4, 6, 8, 9]},
                },
                "required": ["left", "op", "right"],
                "additionalProperties": False,
            },
        },
    },
]

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}


@dataclass(frozen=True, slots=True)
class Task:
    """One run of the agent."""

    question: str
    tool: str
    follow_ups: tuple[str, ...]
    seed: int
    stream: bool = False
    last_n: int = 1
    """Answers sampled for the last question."""
    temperature: float = 1.0
    forced: bool = True
    """The tool turn forces its tool; else the model chooses, and a random one never does."""


def run(task: Task, *, model: str, workspace: Path) -> list[Any]:
    """Run ``task`` to its end against ``OPENAI_BASE_URL`` and return the conversation."""
    with OpenAI() as client:
        messages: list[Any] = [
            {"role": "system", "content": "You are a careful assistant with tools."},
            {"role": "user", "content": task.question},
        ]
        ask = _Asker(client, model, task)
        call = ask(messages, tool=task.tool)
        messages.append(call)
        messages.extend(_run_tools(call, workspace))
        messages.append(ask(messages))
        for number, question in enumerate(task.follow_ups, 1):
            messages.append({"role": "user", "content": question})
            last = number == len(task.follow_ups)
            messages.append(ask(messages, n=task.last_n if last else 1))
        return messages


@dataclass(slots=True)
class _Asker:
    """One model call after another, streamed or not, with a seed of its own for each."""

    client: OpenAI
    model: str
    task: Task
    calls: int = 0

    def __call__(self, messages: list[Any], *, tool: str | None = None, n: int = 1) -> Any:
        options: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "tools": TOOLS,
            "tool_choice": self._choice(tool),
            "max_completion_tokens": 128 if tool else MAX_TOKENS,
            "temperature": self.task.temperature,
            "top_p": 1.0,
            "seed": self.task.seed * 1000 + self.calls,
        }
        self.calls += 1
        if self.task.stream and n == 1:
            return _read_stream(self.client.chat.completions.create(stream=True, **options))
        answer = self.client.chat.completions.create(n=n, **options)
        return answer.choices[0].message.model_dump(exclude_none=True)

    def _choice(self, tool: str | None) -> Any:
        if tool is None:
            return "none"
        if not self.task.forced:
            return "auto"
        return {"type": "function", "function": {"name": tool}}


def _read_stream(stream: Any) -> dict[str, Any]:
    """Join the deltas of a stream into the assistant's message."""
    content = ""
    calls: dict[int, Any] = {}
    for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            for delta in choice.delta.tool_calls or []:
                call = calls.setdefault(
                    delta.index,
                    {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
                )
                call["id"] += delta.id or ""
                call["function"]["name"] += delta.function.name or ""
                call["function"]["arguments"] += delta.function.arguments or ""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    return message | ({"tool_calls": list(calls.values())} if calls else {})


def _run_tools(message: dict[str, Any], workspace: Path) -> list[dict[str, Any]]:
    """Do what the model asked for; a call that makes no sense gets its error as the result."""
    results = []
    for call in message.get("tool_calls", []):
        try:
            arguments = json.loads(call["function"]["arguments"])
            result = _tool(call["function"]["name"], arguments, workspace)
        except (ValueError, KeyError, TypeError) as error:
            result = f"error: {error}"
        results.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    return results


def _tool(name: str, arguments: dict[str, Any], workspace: Path) -> str:
    if name == "list_files":
        names = sorted(p.name for p in workspace.iterdir() if p.name.endswith(arguments["suffix"]))
        return "\n".join(names[:8]) or "no such file"
    if name == "calculate":
        apply = OPERATORS[arguments["op"]]
        return str(apply(int(arguments["left"]), int(arguments["right"])))
    raise KeyError(f"there is no tool named {name}")


def tasks(count: int) -> list[Task]:
    """``count`` different runs: every second one streams, every third samples two last answers."""
    questions = ["What is in the workspace?", "What is the product?", "Where do I start?"]
    return [
        Task(
            question=f"{questions[number % 3]} This is run {number}.",
            tool=("list_files", "calculate")[number % 2],
            follow_ups=("Say it in other words.", "And what would you do next?"),
            seed=number + 1,
            stream=number % 2 == 1,
            last_n=2 if number % 3 == 2 else 1,
        )
        for number in range(count)
    ]


def main() -> None:
    """Run ``--runs`` conversations, three at a time."""
    parser = argparse.ArgumentParser(description="A tool-using agent on the OpenAI SDK.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--workspace", type=Path, default=Path())
    parser.add_argument("--once", action="store_true", help="do not repeat the first run")
    parser.add_argument("--free", action="store_true", help="force no tool choice")
    options = parser.parse_args()
    chosen = [replace(task, forced=not options.free) for task in tasks(options.runs)]
    # The first run is repeated word for word, seed included: the engine's own noise floor.
    again = [] if options.once else chosen[:1]
    with ThreadPoolExecutor(max_workers=3) as pool:
        for _ in pool.map(
            lambda task: run(task, model=options.model, workspace=options.workspace),
            [*chosen, *again],
        ):
            print(".", end="", flush=True)
    print()


if __name__ == "__main__":
    main()

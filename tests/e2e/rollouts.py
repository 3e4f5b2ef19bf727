"""An agent's runs, captured from a real engine: what is scored, and what faults are planted in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from driftgate.testing.engine import EngineProcess
from tests.e2e.support import CHAT, COMPLETIONS, Proxied, proxy

TOKENS = 48
"""Of most answers: above the 32 that naming a wrong checkpoint takes."""

LONG_TOKENS = 240
"""Of the trajectory ``long``: above the 200 that the tests of the sampling density take."""

QUESTIONS = (
    "Plan a walk through the old town.",
    "What would you change about it if it rains all day?",
    "Now say it again in one sentence.",
)
HOT = 0.7
"""The temperature of the trajectories ``hot-0``, ``hot-1``, …"""

HOT_RUNS = 3


async def roll_out(engine: EngineProcess, store: Path, **settings: Any) -> Path:
    """Record every kind of trajectory in a store; ``settings`` are the gateway's."""
    async with proxy(engine, store, **settings) as proxied:
        await converse(proxied, "chat")
        await converse(proxied, "streamed", stream=True)
        await extend(proxied, "tokens")
        await proxied.call("branches", question(engine, seed=21, n=2))
        await proxied.call("long", question(engine, seed=22, max_tokens=LONG_TOKENS))
        await heat_up(proxied)
        for twin in ("twin-a", "twin-b"):
            await proxied.call(twin, question(engine, seed=41))
        await fail_once(proxied, "gap")
    return store


async def heat(engine: EngineProcess, store: Path, **settings: Any) -> Path:
    """Record the trajectories ``hot-0``, ``hot-1``, … only."""
    async with proxy(engine, store, **settings) as proxied:
        await heat_up(proxied)
    return store


async def heat_up(proxied: Proxied) -> None:
    """Several answers at the temperature ``HOT``."""
    for run in range(HOT_RUNS):
        asked = question(proxied.engine, seed=31 + run, temperature=HOT)
        await proxied.call(f"hot-{run}", asked)


def question(engine: EngineProcess, **more: Any) -> dict[str, Any]:
    """A chat request of one turn, with an answer of exactly so many tokens."""
    return {
        "model": engine.model,
        "messages": [{"role": "user", "content": QUESTIONS[0]}],
        "temperature": 1.0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        **more,
    }


async def converse(proxied: Proxied, trajectory: str, **more: Any) -> None:
    """A chat of several turns that keeps its history verbatim; its answers end by themselves."""
    messages: list[dict[str, str]] = [{"role": "system", "content": "You are a guide."}]
    for turn, text in enumerate(QUESTIONS):
        messages.append({"role": "user", "content": text})
        asked = question(
            proxied.engine, messages=messages, seed=11 + turn, ignore_eos=False, **more
        )
        answer = await proxied.call(trajectory, asked)
        messages.append({"role": "assistant", "content": content(answer)})


def content(answer: Any) -> str:
    """What the assistant said, in one piece or in chunks."""
    if isinstance(answer, dict):
        return str(answer["choices"][0]["message"]["content"])
    deltas = [choice["delta"] for chunk in answer for choice in chunk["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


async def extend(proxied: Proxied, trajectory: str) -> None:
    """Completions of token ids, each prompt all of the tokens before it and two more."""
    ids = [5, 6, 7, 8, 9]
    for turn in range(4):
        asked = {"model": proxied.engine.model, "prompt": ids, "max_tokens": TOKENS, "seed": turn,
                 "temperature": 1.0, "ignore_eos": True, "return_token_ids": True}  # fmt: skip
        answer = await proxied.call(trajectory, asked, api=COMPLETIONS)
        ids = ids + answer["choices"][0]["token_ids"] + [10 + turn, 20 + turn]


async def fail_once(proxied: Proxied, trajectory: str) -> None:
    """One call that is answered and one that the engine refuses."""
    await proxied.call(trajectory, question(proxied.engine, seed=51))
    refused = question(proxied.engine) | {"model": "another"}
    async with proxied.http.post(f"{proxied.url}/t/{trajectory}/v1/{CHAT}", json=refused) as answer:
        assert answer.status == 404, await answer.text()

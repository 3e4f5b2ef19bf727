"""The plugin's stream wrapper, over stand-ins for vLLM's generator and outputs.

The end-to-end tests run it inside a real vLLM; here are the cases an engine does not produce on
demand.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from driftgate.adapters import vllm_plugin

pytest.importorskip("vllm")

EVENTS = ['data: {"id":"c1","created":7,"model":"m","choices":[]}\n\n', "data: [DONE]\n\n"]


def output(index: int, routes: Any) -> SimpleNamespace:
    return SimpleNamespace(outputs=[SimpleNamespace(index=index, routed_experts=routes)])


async def results(*items: Any) -> AsyncIterator[Any]:
    for item in items:
        yield item


async def vllm_stream(self: Any, request: Any, generator: Any, request_id: str) -> Any:
    """What vLLM's own generator does, in short: read the engine's outputs, yield events."""
    async for _ in generator:
        pass
    for event in EVENTS:
        yield event


async def streamed(*items: Any, asked: bool = True, n: int = 1) -> list[str]:
    stream = vllm_plugin._with_routes(vllm_stream, object_name="chat.completion.chunk")
    extra = {vllm_plugin.REQUEST_FIELD: True} if asked else None
    request = SimpleNamespace(n=n, model_extra=extra)
    return [event async for event in stream(None, request, results(*items), "id")]


def routes_of(event: str) -> dict[int, list[Any]]:
    chunk = json.loads(event.removeprefix("data: "))
    return {
        choice["index"]: np.load(
            io.BytesIO(base64.b64decode(choice["routed_experts"])), allow_pickle=False
        ).tolist()
        for choice in chunk["choices"]
    }


async def test_routes_come_in_one_chunk_before_the_end() -> None:
    routes = np.arange(6, dtype=np.uint8).reshape(3, 1, 2)
    first, extra, done = await streamed(output(0, None), output(0, routes))
    assert [first, done] == EVENTS
    assert routes_of(extra) == {0: routes.tolist()}
    chunk = json.loads(extra.removeprefix("data: "))
    assert (chunk["id"], chunk["created"], chunk["model"]) == ("c1", 7, "m")
    assert chunk["driftgate"] == "routed_experts"


async def test_every_choice_has_its_own_routes() -> None:
    arrays = [np.full((2, 1, 2), i, np.uint8) for i in range(2)]
    events = await streamed(output(1, arrays[1]), output(0, arrays[0]), n=2)
    assert routes_of(events[1]) == {0: arrays[0].tolist(), 1: arrays[1].tolist()}


async def test_completions_number_choices_across_prompts() -> None:
    array = np.zeros((1, 1, 1), np.uint8)
    events = await streamed((1, output(1, array)), n=2)
    assert list(routes_of(events[1])) == [3]


@pytest.mark.parametrize("asked", [True, False])
async def test_a_stream_without_routes_is_left_as_it_is(asked: bool) -> None:
    assert await streamed(output(0, None), asked=asked) == EVENTS


async def test_a_client_that_did_not_ask_gets_no_extra_chunk() -> None:
    assert await streamed(output(0, np.zeros((1, 1, 1), np.uint8)), asked=False) == EVENTS


def test_joined_outputs_keep_the_routes_of_the_later_one() -> None:
    from vllm.outputs import CompletionOutput, RequestOutput

    def part(ids: list[int], routes: Any) -> RequestOutput:
        choice = CompletionOutput(
            index=0, text="x", token_ids=ids, cumulative_logprob=None, logprobs=None,
            routed_experts=routes,
        )  # fmt: skip
        return RequestOutput("r", None, [1], None, [choice], finished=routes is not None)

    routes = np.ones((2, 1, 2), np.uint8)
    vllm_plugin._patch("vllm.outputs", "RequestOutput", "add", vllm_plugin._add_with_routes)
    joined = part([1], None)
    joined.add(part([2], routes), aggregate=True)
    assert joined.outputs[0].token_ids == [1, 2]
    assert joined.outputs[0].routed_experts is routes

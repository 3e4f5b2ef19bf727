"""A plugin for vLLM's own process: routed experts for streaming clients, and on CPU.

vLLM 0.29 returns ``routed_experts`` in JSON answers and leaves them out of streams, forgets them
where it joins two outputs of a stream that is read too slowly, and its CPU experts do not offer
their choices for capture. This plugin mends all three, inside the engine, without touching a
number: streams end with one more chunk that carries the routes, joined outputs keep theirs, and the
CPU experts report the ids they select. vLLM loads it by itself from the entry point group
``vllm.general_plugins`` where driftgate is installed beside vLLM, in every process, possibly
twice: ``register`` may be called again.

The extra chunk is sent only to a request whose body says ``"driftgate_routes": true``, so a client
that talks to the engine directly sees the stream that vLLM would have sent.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import msgspec

__all__ = ["REQUEST_FIELD", "register", "routes_event"]

REQUEST_FIELD = "driftgate_routes"
"""The request's field that asks for the extra chunk; vLLM keeps unknown fields and ignores them."""

DONE_EVENT = "data: [DONE]\n\n"

log = logging.getLogger("driftgate.vllm")


def register() -> None:
    """Entry point: install both patches. A vLLM that lacks the place to patch is left as it is."""
    _patch(
        "vllm.entrypoints.openai.chat_completion.serving",
        "OpenAIServingChat",
        "chat_completion_stream_generator",
        functools.partial(_with_routes, object_name="chat.completion.chunk"),
    )
    _patch(
        "vllm.entrypoints.openai.completion.serving",
        "OpenAIServingCompletion",
        "completion_stream_generator",
        functools.partial(_with_routes, object_name="text_completion"),
    )
    _patch("vllm.outputs", "RequestOutput", "add", _add_with_routes)
    _report_cpu_routes()


def _patch(module: str, owner: str, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace ``module.owner.name`` by ``wrap`` of it, once."""
    try:
        target = getattr(importlib.import_module(module), owner)
        original = getattr(target, name)
    except (ImportError, AttributeError) as error:
        log.warning("driftgate: no routes on streams, %s.%s.%s: %s", module, owner, name, error)
        return
    if not hasattr(original, "__driftgate__"):
        patched = wrap(original)
        patched.__driftgate__ = True
        setattr(target, name, patched)


def _with_routes(original: Any, *, object_name: str) -> Any:
    """Wrap one of vLLM's stream generators so that it ends with the routes chunk."""

    @functools.wraps(original)
    async def stream(
        self: Any, request: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        if not (getattr(request, "model_extra", None) or {}).get(REQUEST_FIELD):
            async for event in original(self, request, *args, **kwargs):
                yield event
            return
        routes: dict[int, Any] = {}
        head: dict[str, Any] = {}
        per_prompt = request.n or 1
        args, kwargs = _tee(args, kwargs, functools.partial(_keep, routes, per_prompt))
        async for event in original(self, request, *args, **kwargs):
            if event == DONE_EVENT and routes:
                yield routes_event(head, routes, object_name)
            elif not head and event.startswith("data: {"):
                chunk = msgspec.json.decode(event[len("data: ") :])
                head = {key: chunk.get(key) for key in ("id", "created", "model")}
            yield event

    return stream


def _tee(
    args: tuple[Any, ...], kwargs: dict[str, Any], keep: Callable[[Any], None]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass what the ``result_generator`` argument yields by ``keep``.

    It is the only asynchronous iterator among the arguments, by position in one vLLM, by name in
    another.
    """
    if "result_generator" in kwargs:
        return args, kwargs | {"result_generator": _observe(kwargs["result_generator"], keep)}
    return tuple(_observe(a, keep) if hasattr(a, "__anext__") else a for a in args), kwargs


async def _observe(results: AsyncIterator[Any], keep: Callable[[Any], None]) -> AsyncIterator[Any]:
    async for result in results:
        keep(result)
        yield result


def _keep(routes: dict[int, Any], per_prompt: int, result: Any) -> None:
    """Remember the latest routes of each choice; completions yield ``(prompt index, output)``."""
    prompt, output = result if isinstance(result, tuple) else (0, result)
    for choice in output.outputs:
        if choice.routed_experts is not None:
            routes[prompt * per_prompt + choice.index] = choice.routed_experts


def routes_event(head: dict[str, Any], routes: dict[int, Any], object_name: str) -> str:
    """The extra event: ``routes`` maps a choice's index to its array [P + R - 1, L, K]."""
    from vllm.utils.serial_utils import numpy2base64

    chunk = {
        **head,
        "object": object_name,
        "choices": [
            {"index": index, "routed_experts": numpy2base64(array)}
            for index, array in sorted(routes.items())
        ],
        "driftgate": "routed_experts",
    }
    return f"data: {msgspec.json.encode(chunk).decode()}\n\n"


def _add_with_routes(original: Any) -> Any:
    """Wrap ``RequestOutput.add``, which joins two outputs of a stream that is read too slowly.

    vLLM 0.29 copies the newer output's text, ids and logprobs and forgets its routes, which only
    the last output has: on a busy engine streams lose them.
    """

    @functools.wraps(original)
    def add(self: Any, next_output: Any, aggregate: bool) -> None:
        original(self, next_output, aggregate)
        newer = {choice.index: choice.routed_experts for choice in next_output.outputs}
        for choice in self.outputs:
            if newer.get(choice.index) is not None:
                choice.routed_experts = newer[choice.index]

    return add


def _report_cpu_routes() -> None:
    """Let vLLM's CPU experts hand the ids they select to the engine's own capture."""
    try:
        module = importlib.import_module("vllm.model_executor.layers.fused_moe.experts.cpu_moe")
        experts = module.CPUUnquantizedExperts
        select = experts._select_experts
    except (ImportError, AttributeError) as error:
        log.debug("driftgate: CPU experts are not patched: %s", error)
        return
    if hasattr(select, "__driftgate__"):
        return

    @functools.wraps(select)
    def select_and_report(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights, ids = select(self, *args, **kwargs)
        if self.routing_replay_capture_fn is not None:
            self.routing_replay_capture_fn(ids)
        return weights, ids

    select_and_report.__driftgate__ = True  # type: ignore[attr-defined]
    experts._select_experts = select_and_report
    experts.supports_routing_replay_capture = lambda self: True

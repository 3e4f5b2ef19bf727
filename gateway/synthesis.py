"""Writes the stream that the engine would have sent, from its JSON answer. Pure.

Used where an engine gives routed experts only in JSON answers. The chunks have vLLM's keys in
vLLM's order; what differs is that each choice's text comes in one piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Raw

from driftgate.errors import UNREADABLE, UpstreamError
from driftgate.gateway.openai import Plan

__all__ = ["DONE_EVENT", "KEEP_ALIVE", "error_event", "stream_of"]

DONE_EVENT = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment: clients skip it, and proxies on the way see a living connection."""

_NULL = Raw(b"null")


def stream_of(stripped: bytes, plan: Plan) -> list[bytes]:
    """The events of a JSON answer (already stripped), without the final ``[DONE]``.

    UpstreamError where it is no completion.
    """
    try:
        answer = msgspec.json.decode(stripped, type=dict[str, Raw])
        choices = msgspec.json.decode(answer["choices"], type=list[dict[str, Raw]])
        chat = plan.api == "chat"
        chunks = list((_chat if chat else _text)(answer, choices, plan))
    except (*UNREADABLE, KeyError, TypeError) as error:
        raise UpstreamError(f"the engine's answer is not a completion: {error}") from error
    events = [_event(chunk) for chunk in chunks]
    if plan.usage_asked:
        usage = msgspec.json.decode(answer.get("usage", b"{}"), type=dict[str, Raw])
        counts = {name: value for name, value in usage.items() if value != _NULL}
        last = _head(answer, plan) | {"choices": [], "usage": counts}
        events.append(_event(last | _fingerprint(answer)))
    return events


def error_event(body: bytes) -> bytes:
    """An engine's error (JSON) as an event in a stream that has begun."""
    try:
        data = msgspec.json.encode(msgspec.json.decode(body))  # one line
    except UNREADABLE:
        text = body[:500].decode(errors="replace")
        data = msgspec.json.encode({"error": {"message": text, "type": "upstream_error"}})
    return b"data: " + data + b"\n\n"


def _chat(
    answer: dict[str, Raw], choices: list[dict[str, Raw]], plan: Plan
) -> Iterator[dict[str, Any]]:
    head = _head(answer, plan)
    for choice in choices:
        first = {
            "index": choice["index"],
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        yield head | {
            "choices": [first],
            "prompt_token_ids": answer.get("prompt_token_ids")
            or choice.get("prompt_token_ids", _NULL),
            "prompt_text": answer.get("prompt_text", _NULL),
        }
    for choice in choices:
        deltas = list(_deltas(choice.get("message", Raw(b"{}"))))
        for position, delta in enumerate(deltas):
            # All ids and logprobs come with the first piece: they cannot be split along the parts.
            with_tokens = position == 0
            piece = {
                "index": choice["index"],
                "delta": delta,
                "logprobs": choice.get("logprobs", _NULL) if with_tokens else None,
                "finish_reason": None,
                "token_ids": choice.get("token_ids", _NULL) if with_tokens else None,
            }
            yield head | {"choices": [piece]}
        last: dict[str, Any] = {
            "index": choice["index"],
            "delta": {},
            "logprobs": None if deltas else choice.get("logprobs", _NULL),
            "finish_reason": choice.get("finish_reason", _NULL),
            "stop_reason": choice.get("stop_reason", _NULL),
            "token_ids": None if deltas else choice.get("token_ids", _NULL),
        }
        if "matched_stop" in choice:  # SGLang's name for it
            last["matched_stop"] = choice["matched_stop"]
        yield head | {"choices": [last]} | ({} if plan.usage_asked else _fingerprint(answer))


def _deltas(raw: Raw) -> Iterator[dict[str, Any]]:
    message = msgspec.json.decode(raw, type=dict[str, Any])
    for name in ("reasoning", "reasoning_content", "content", "refusal"):
        if message.get(name):
            yield {name: message[name]}
    for index, call in enumerate(message.get("tool_calls") or ()):
        yield {"tool_calls": [{"index": index, **call}]}


def _text(
    answer: dict[str, Raw], choices: list[dict[str, Raw]], plan: Plan
) -> Iterator[dict[str, Any]]:
    for choice in choices:
        piece = {
            name: choice.get(name, _NULL)
            for name in (
                "index",
                "text",
                "logprobs",
                "finish_reason",
                "stop_reason",
                "prompt_token_ids",
                "token_ids",
            )
        }
        chunk = _head(answer, plan) | {"choices": [piece]}
        yield chunk | ({} if plan.usage_asked else _fingerprint(answer))


def _head(answer: dict[str, Raw], plan: Plan) -> dict[str, Any]:
    kind = "chat.completion.chunk" if plan.api == "chat" else "text_completion"
    return {
        "id": answer.get("id", _NULL),
        "object": kind,
        "created": answer.get("created", _NULL),
        "model": answer.get("model", _NULL),
    }


def _fingerprint(answer: dict[str, Raw]) -> dict[str, Any]:
    found = answer.get("system_fingerprint", _NULL)
    return {} if found == _NULL else {"system_fingerprint": found}


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"

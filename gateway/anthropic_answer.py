"""Anthropic's Messages API: a chat answer as a message and its stream of content blocks. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from msgspec import Raw

from driftgate.errors import UNREADABLE, UpstreamError
from driftgate.gateway.dialect import Said, Teller, event_of, message_in
from driftgate.spoken import INVALID_JSON

__all__ = ["MessagesTeller", "counted", "error_body"]

SIGNATURE = "driftgate:unsigned"
"""Of thinking blocks: clients send none back that have no signature."""

_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}

_STOP = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}

_ENCODE = msgspec.json.encode
_OBJECT = msgspec.json.Decoder(dict[str, Any])


class _Counted(msgspec.Struct):
    count: int


def counted(status: int, body: bytes) -> bytes:
    """The engine's answer to it, as Anthropic's clients read it. UpstreamError where it is none."""
    if status != 200:
        return error_body(status, message_in(body))
    try:
        return _ENCODE({"input_tokens": msgspec.json.decode(body, type=_Counted).count})
    except UNREADABLE as error:
        raise UpstreamError(f"the engine did not count tokens: {error}") from error


def error_body(status: int, message: str) -> bytes:
    """An error as Anthropic's clients read it."""
    kind = _ERRORS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return _ENCODE({"type": "error", "error": {"type": kind, "message": message}})


class MessagesTeller(Teller):
    """Tells one answer as a message and its stream of content blocks."""

    def __init__(self, call_id: str) -> None:
        super().__init__()
        self.id = "msg_" + call_id.removeprefix("c-")

    def body(self) -> bytes:
        return _ENCODE(self._message([_block(said) for said in self.said]))

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        whole = self.ended and self.error is None
        stop_reason, sequence = self._stop() if whole else (None, None)
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": sequence,
            "usage": self._usage(),
        }

    def _stop(self) -> tuple[str, str | None]:
        if self.finish_reason == "stop" and isinstance(self.stop_reason, str):
            return "stop_sequence", self.stop_reason
        if any(said.kind == "tool" for said in self.said) and self.finish_reason == "stop":
            return "tool_use", None  # vLLM calls it so where the choice of the tool was forced
        return _STOP.get(self.finish_reason or "", "end_turn"), None

    def _usage(self) -> dict[str, int]:
        usage = self.usage
        if usage is None:
            return {"input_tokens": self.prompt_tokens, "output_tokens": 0}
        cached = usage.cached_tokens
        came = usage.prompt_tokens if usage.prompt_tokens is not None else self.prompt_tokens
        counted = {"input_tokens": came, "output_tokens": usage.completion_tokens or 0}
        if cached is not None:  # Anthropic counts what came from the cache apart
            counted |= {"input_tokens": came - cached, "cache_read_input_tokens": cached}
        return counted

    # Events.

    def _begin(self) -> Iterator[bytes]:
        message = self._message([])
        yield event_of("message_start", {"type": "message_start", "message": message})

    def _opened(self, block: Said) -> Iterator[bytes]:
        start: dict[str, Any] = {"type": "text", "text": ""}
        if block.kind == "thinking":
            start = {"type": "thinking", "thinking": "", "signature": ""}
        elif block.kind == "tool":
            start = {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}
        yield _event("content_block_start", index=block.index, content_block=start)

    def _grew(self, block: Said, text: str, rows: Sequence[Raw]) -> Iterator[bytes]:
        kind, name = {
            "thinking": ("thinking_delta", "thinking"),
            "text": ("text_delta", "text"),
            "tool": ("input_json_delta", "partial_json"),
        }[block.kind]
        yield _event("content_block_delta", index=block.index, delta={"type": kind, name: text})

    def _closed(self, block: Said) -> Iterator[bytes]:
        if block.kind == "thinking":
            signed = {"type": "signature_delta", "signature": SIGNATURE}
            yield _event("content_block_delta", index=block.index, delta=signed)
        yield _event("content_block_stop", index=block.index)

    def _end(self) -> Iterator[bytes]:
        if self.error is not None:
            return
        stop_reason, sequence = self._stop()
        delta = {"stop_reason": stop_reason, "stop_sequence": sequence}
        yield _event("message_delta", delta=delta, usage=self._usage())
        yield _event("message_stop")

    def _fail(self, message: str) -> Iterator[bytes]:
        kind = "overloaded_error" if self.not_whole else "api_error"
        yield _event("error", error={"type": kind, "message": message})


def _event(kind: str, **data: Any) -> bytes:
    return event_of(kind, {"type": kind, **data})


def _block(said: Said) -> dict[str, Any]:
    if said.kind == "thinking":
        return {"type": "thinking", "thinking": said.text, "signature": SIGNATURE}
    if said.kind == "text":
        return {"type": "text", "text": said.text}
    return {
        "type": "tool_use",
        "id": said.call_id,
        "name": said.name,
        "input": _input(said.text),
    }


def _input(arguments: str) -> Any:
    """A tool's arguments as the object that they spell, in their own spelling."""
    try:
        _OBJECT.decode(arguments or "{}")
    except UNREADABLE:
        return {INVALID_JSON: arguments}
    return Raw((arguments or "{}").encode())

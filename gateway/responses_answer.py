"""OpenAI's Responses API: a chat answer as a response and its typed events. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Raw

from driftgate.gateway.dialect import Said, Teller, event_of
from driftgate.gateway.openai import read
from driftgate.gateway.responses import LOGPROBS

__all__ = ["ResponsesTeller", "error_body", "response_id"]

_ENCODE = msgspec.json.encode


class _Top(msgspec.Struct):
    token: str = ""
    logprob: float | None = None


class _Row(msgspec.Struct):
    token: str = ""
    logprob: float | None = None
    top_logprobs: list[_Top] = []


_ROW = msgspec.json.Decoder(_Row)


def response_id(call_id: str) -> str:
    """A response's id, from which its call is found in the store."""
    return "resp_" + call_id.removeprefix("c-")


def error_body(status: int, message: str) -> bytes:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return _ENCODE({"error": {"message": message, "type": kind, "param": None, "code": None}})


class ResponsesTeller(Teller):
    """Tells one answer as a response and its typed events."""

    def __init__(
        self, fields: Mapping[str, Raw], call_id: str, stored: Mapping[str, Raw] | None = None
    ) -> None:
        """``fields``: the agent's request; ``stored``: the same where some of it is not stored."""
        include = read(dict(fields), "include", list[str]) or ()
        super().__init__(shows_logprobs=LOGPROBS in include)
        self.id = response_id(call_id)
        self._hex = self.id.removeprefix("resp_")
        self._fields = fields
        self._echoed = _echo(fields)
        self._stored = stored
        self._number = 0

    def body(self) -> bytes:
        return _ENCODE(self._response())

    def stored_body(self, body: bytes) -> bytes:
        return body if self._stored is None else _ENCODE(self._response() | _echo(self._stored))

    def _response(self) -> dict[str, Any]:
        status, why = self._status()
        error = {"code": "server_error", "message": self.error} if self.error is not None else None
        return self._echoed | {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": error,
            "incomplete_details": None if why is None else {"reason": why},
            "model": self.model,
            "output": [self._item(block) for block in self.said],
            "usage": self._usage() if self.ended else None,
        }

    def _status(self) -> tuple[str, str | None]:
        if self.error is not None:
            return "failed", None
        if not self.ended:
            return "in_progress", None
        if self.finish_reason == "length":
            return "incomplete", "max_output_tokens"
        if self.finish_reason == "content_filter":
            return "incomplete", "content_filter"
        return "completed", None

    def _usage(self) -> dict[str, Any] | None:
        usage = self.usage
        if usage is None:
            return None
        came, went = usage.prompt_tokens or 0, usage.completion_tokens or 0
        return {
            "input_tokens": came,
            "input_tokens_details": {
                "cached_tokens": usage.cached_tokens or 0,
                "cache_write_tokens": 0,
            },
            "output_tokens": went,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
            "total_tokens": came + went,
        }

    def _item(self, block: Said) -> dict[str, Any]:
        status = "in_progress"
        if block.closed:
            cut = self.ended and self.finish_reason == "length" and block is self.said[-1]
            status = "incomplete" if cut else "completed"
        elif self.ended:
            status = "incomplete"
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        if block.kind == "thinking":
            content = [{"type": "reasoning_text", "text": block.text}]
            return item | {"type": "reasoning", "summary": [], "content": content}
        if block.kind == "tool":
            return item | {
                "type": "function_call",
                "call_id": block.call_id,
                "name": block.name,
                "arguments": block.text,
            }
        return item | {"type": "message", "role": "assistant", "content": [self._part(block)]}

    def _part(self, block: Said) -> dict[str, Any]:
        if block.kind == "thinking":
            return {"type": "reasoning_text", "text": block.text}
        return {
            "type": "output_text",
            "text": block.text,
            "annotations": [],
            "logprobs": block.logprobs,
        }

    def _item_id(self, block: Said) -> str:
        prefix = {"thinking": "rs", "text": "msg", "tool": "fc"}[block.kind]
        return f"{prefix}_{self._hex}{block.index:03d}"

    # Events.

    def _event(self, kind: str, **data: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event_of(kind, {"type": kind, "sequence_number": number, **data})

    def _of(self, block: Said) -> dict[str, Any]:
        return {"item_id": self._item_id(block), "output_index": block.index}

    def _begin(self) -> Iterator[bytes]:
        yield self._event("response.created", response=self._response())
        yield self._event("response.in_progress", response=self._response())

    def _opened(self, block: Said) -> Iterator[bytes]:
        item = self._item(block)
        if block.kind != "tool":
            item["content"] = []
        yield self._event("response.output_item.added", output_index=block.index, item=item)
        if block.kind != "tool":
            part = self._part(block)
            place = self._of(block) | {"content_index": 0}
            yield self._event("response.content_part.added", **place, part=part)

    def _grew(self, block: Said, text: str, rows: Sequence[Raw]) -> Iterator[bytes]:
        place = self._of(block)
        if block.kind == "tool":
            yield self._event("response.function_call_arguments.delta", **place, delta=text)
        elif block.kind == "thinking":
            place["content_index"] = 0
            yield self._event("response.reasoning_text.delta", **place, delta=text)
        else:
            place["content_index"] = 0
            yield self._event(
                "response.output_text.delta", **place, delta=text, logprobs=_without_bytes(rows)
            )

    def _closed(self, block: Said) -> Iterator[bytes]:
        place, text = self._of(block), block.text
        if block.kind == "tool":
            yield self._event("response.function_call_arguments.done", **place, arguments=text)
        elif block.kind == "thinking":
            place["content_index"] = 0
            yield self._event("response.reasoning_text.done", **place, text=text)
        else:
            place["content_index"] = 0
            yield self._event(
                "response.output_text.done",
                **place,
                text=text,
                logprobs=_without_bytes(block.logprobs),
            )
        if block.kind != "tool":
            yield self._event("response.content_part.done", **place, part=self._part(block))
        item = self._item(block)
        yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _end(self) -> Iterator[bytes]:
        response = self._response()
        yield self._event(f"response.{response['status']}", response=response)

    def _fail(self, message: str) -> Iterator[bytes]:
        yield self._event("error", code="server_error", message=message, param=None)


def _without_bytes(rows: Sequence[Raw]) -> list[_Row]:
    """Rows of logprobs as events have them: an item's have the bytes too."""
    return [_ROW.decode(row) for row in rows]


def _echo(fields: Mapping[str, Raw]) -> dict[str, Any]:
    """What a response repeats of its request, with the API's defaults."""
    defaults: dict[str, Any] = {
        "background": False,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": True,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": None,
        "truncation": "disabled",
        "user": None,
    }
    given = {name: fields[name] for name in defaults if bytes(fields.get(name, b"null")) != b"null"}
    return defaults | given

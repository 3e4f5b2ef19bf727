"""The APIs that are translated into chat completions and back, by name. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from driftgate.gateway import anthropic, anthropic_answer, openai, responses, responses_answer
from driftgate.gateway.dialect import Dialect
from driftgate.gateway.http import error_body
from driftgate.gateway.openai import Fields, Translated

__all__ = ["chat_fields", "dialect", "error_of_path", "previous_of"]


def chat_fields(
    api: Translated, body: bytes, fields: Fields, earlier: Iterable[Any] = ()
) -> Fields:
    """The chat request for an agent's ``body``. ``earlier``: chat messages before its own.
    RequestError for what a chat request cannot hold."""
    if api == "responses":
        return responses.chat_request(body, fields, earlier)
    return anthropic.chat_request(body, fields)


def dialect(
    api: Translated,
    fields: Fields,
    call_id: str,
    remember: Callable[[bytes], None],
    stored: Fields | None,
) -> Dialect:
    """How a call is answered. ``fields``: the agent's; ``stored``: what may be stored of them,
    where that is not all."""
    if api == "responses":
        teller = responses_answer.ResponsesTeller(fields, call_id, stored)
        return Dialect(teller, responses_answer.error_body, remember)
    return Dialect(anthropic_answer.MessagesTeller(call_id), anthropic_answer.error_body)


def previous_of(fields: Fields) -> str | None:
    """The response that a Responses request goes on from."""
    return openai.read(fields, "previous_response_id", str)


def error_of_path(path: str, status: int, message: str) -> bytes:
    """An error of the gateway's own, as the clients of a path read it."""
    if "/v1/messages" in path:
        return anthropic_answer.error_body(status, message)
    return error_body(status, message)

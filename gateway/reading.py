"""What an agent asked, and what its engine is to be asked for it. Pure.

A request is read before it is known which engine gets it, because the engine is chosen by the
trajectory, and that by what the request holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw

from driftgate.errors import RequestError
from driftgate.gateway import dialects, openai
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.conversation import Seen
from driftgate.gateway.history import History, read_history
from driftgate.gateway.openai import Api, Fields, Plan, Translated
from driftgate.gateway.recent import Recent
from driftgate.gateway.upstream import Upstream
from driftgate.histories import system_first
from driftgate.trace import Api as AgentApi

__all__ = [
    "Read",
    "Stored",
    "adapted",
    "read_own",
    "storable",
    "translate",
    "with_system_first",
    "write",
]


class Read(NamedTuple):
    """A request's body, before it is known where it goes."""

    digest: str
    fields: Fields
    """As the engine's API has them."""
    history: History
    agents: Fields
    """As the agent sent them."""
    unread: str | None = None
    """Why it is no JSON object."""
    previous: str | None = None
    """The trajectory of the response that the call goes on from."""


class Stored(NamedTuple):
    """A request's body as it is stored."""

    body: bytes
    fields: Fields | None = None
    """None: nothing of it is redacted."""


def read_own(api: Api, body: bytes, known: Recent[bytes, Seen] | None) -> Read:
    """``known`` belongs to the event loop; None on a thread."""
    fields, unread = Fields(), None
    try:
        fields = openai.read_request(body)
    except RequestError as error:
        unread = str(error)
    history = read_history(fields, Plan(api=api), known)
    return Read(_digest(body), fields, history, fields, unread)


def translate(
    api: Translated,
    body: bytes,
    fields: Fields,
    earlier: Sequence[Any],
    known: Recent[bytes, Seen] | None,
) -> Read:
    """A request of another API as a chat request. RequestError where it cannot be one."""
    chat = dialects.chat_fields(api, body, fields, earlier)
    return Read(_digest(body), chat, read_history(chat, Plan(api="chat"), known), fields)


def adapted(api: AgentApi, read: Read, upstream: Upstream) -> Read:
    """``read`` for an engine; what is no other API's goes on as it came."""
    if upstream.system_first and api in ("responses", "messages"):
        return read._replace(fields=with_system_first(read.fields))
    return read


def with_system_first(fields: Fields) -> Fields:
    """A translated request for an engine whose template takes system messages only there."""
    messages = msgspec.json.decode(fields["messages"], type=list[dict[str, Any]])
    return fields | {"messages": Raw(msgspec.json.encode(system_first(messages)))}


def write(api: AgentApi, body: bytes, read: Read, upstream: Upstream) -> tuple[bytes, Plan]:
    """What to send. What is not a JSON object goes on as it is: the engine says so itself."""
    engines: Api = "completions" if api == "completions" else "chat"
    if read.unread is not None:
        openai.refuse_forbidden(_as_engines_read(body), upstream.adapter)
        return body, Plan(api=engines, uncaptured=read.unread)
    openai.refuse_forbidden(read.agents, upstream.adapter)
    rewritten, plan = openai.rewrite(
        engines, read.fields, upstream.adapter, upstream.stream_mode(), refusal=upstream.refusal
    )
    if api == "responses" or api == "messages":
        plan = msgspec.structs.replace(plan, translated=api)
        body = msgspec.json.encode(read.fields)
    return body if rewritten is None else rewritten, plan


def storable(body: bytes, config: GatewayConfig) -> Stored:
    """What may be stored of a request."""
    stored = config.redacted(body)
    if stored is body:
        return Stored(body)
    try:
        return Stored(stored, openai.read_request(stored))
    except RequestError:
        return Stored(stored, Fields())  # all of it is redacted


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


def _as_engines_read(body: bytes) -> dict[str, Any]:
    """A body as Python's lax parser takes it, with NaN, a byte order mark or UTF-16: what vLLM
    uses. Empty where that fails too: then the engine refuses it."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}

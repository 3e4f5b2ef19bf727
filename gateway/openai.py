"""Turns an agent's request into the one for the engine, and the engine's answer back. Pure.

Only top-level fields are read and set; everything else stays ``msgspec.Raw``, so numbers keep their
spelling (``1.50``) and unknown fields pass. Fields are set, not ``setdefault``: an agent's own
``logprobs: false`` does not switch capture off. A request that the engine would refuse, or whose
answer would change if we asked for more, is forwarded as it came and its ``Plan`` says why it is
not captured."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Raw

from driftgate import trace
from driftgate.adapters.base import EngineAdapter
from driftgate.errors import UNREADABLE, RequestError
from driftgate.gateway import sse
from driftgate.gateway.fields import Fields, is_absent, read, read_lax
from driftgate.gateway.pieces import Pieces, take_apart
from driftgate.gateway.sampling import sampling_of, settings_sent
from driftgate.trace import Sampling

__all__ = [
    "Api",
    "Fields",
    "Plan",
    "StreamMode",
    "Stripped",
    "Translated",
    "read",
    "read_request",
    "rewrite",
    "strip_answer",
    "strip_event",
]

Api: TypeAlias = Literal["chat", "completions"]
"""What the engine is asked."""
Translated: TypeAlias = Literal["responses", "messages"]
"""What agents speak and the engine is asked as chat."""
StreamMode: TypeAlias = Literal["plain", "plugin", "synthesise"]
"""How a stream's routes are got: not at all, by the plugin's chunk, or by asking for JSON
instead."""

_NULL = Raw(b"null")
_TRUE = Raw(b"true")
_FALSE = Raw(b"false")
_ZERO = Raw(b"0")

_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_CHOICES = msgspec.json.Decoder(list[dict[str, Raw]])
_ENCODER = msgspec.json.Encoder()

_TAKEN_TOP, _TAKEN_CHOICE = {"prompt_token_ids"}, {"logprobs", "token_ids"}
"""Fields that ``take_apart`` takes out, which must then be hidden."""

_EMPTY_DELTA = re.compile(rb"\{\s*\}")
_QUOTED = b"driftgate:no-json:"
_NO_JSON = rb"-?(?:NaN|Infinity)\b"
_TO_NO_JSON = re.compile(
    rb'((?:[^"NI-]++|"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|(?!%b).)*+)(?:(%b)|\Z)'
    % (_NO_JSON, _NO_JSON),
    re.DOTALL,
)
"""What stands before a number that JSON does not have, and the number. A string without an end goes
to the end, and nothing is looked at twice: the time is linear for any bytes."""

_QUOTED_NO_JSON = re.compile(rb'"%b(%b)"' % (_QUOTED, _NO_JSON))
_LIST_OF_PROMPTS = re.compile(rb"\[\s*[\"\[]")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of the engine for one call, and what the agent had asked itself."""

    api: Api
    translated: Translated | None = None
    """What the agent speaks, where that is not ``api``."""
    model: str = ""
    stream: bool = False
    """The agent wants server-sent events."""
    mode: StreamMode = "plain"
    n: int = 1
    prompts: int = 1
    """Prompts of a completions call; each gets ``n`` choices."""
    sampling: Sampling = Sampling()
    unread: tuple[str, ...] = ()
    """Sampling settings that were sent and cannot be read: ``sampling`` does not hold them."""
    usage_asked: bool = False
    """The agent's stream ends with a usage chunk."""
    logprobs_asked: bool = False
    ids_asked: bool = False
    hide_top: frozenset[str] = frozenset()
    """Answer fields that the agent would have got as null."""
    hide_choice: frozenset[str] = frozenset()
    """The same inside each choice."""
    omits_hidden: bool = False
    """They would have been absent instead."""
    echo: bool = False
    hides_reasoning: bool = False
    mark: str = "driftgate"
    """Key of the plugin's routes chunk."""
    uncaptured: str | None = None
    """Why the call was forwarded as it came, in words; None for a call that is captured."""

    @property
    def spoken(self) -> trace.Api:
        """What the agent speaks."""
        return self.translated or self.api

    @property
    def choices(self) -> int:
        """Traces that the call should give."""
        return self.n * self.prompts


class Stripped(NamedTuple):
    """A JSON answer without what the agent did not ask for."""

    body: bytes
    messages: list[Raw]
    """JSON, in order of choices."""
    pieces: Pieces | None = None
    """The answer taken apart, for the fold; None where it must read the whole."""


def read_request(body: bytes) -> Fields:
    """The body's top-level fields. RequestError where it is not a JSON object."""
    try:
        if not body.isascii():
            body.decode()  # msgspec looks at a text's bytes only where it is read
        return _FIELDS.decode(body)
    except UNREADABLE as error:
        raise RequestError(f"the request body is not a JSON object: {error}") from error


def rewrite(
    api: Api,
    fields: Fields,
    adapter: EngineAdapter,
    mode: StreamMode,
    *,
    refusal: str | None = None,
) -> tuple[bytes | None, Plan]:
    """The body for the engine (None: send the agent's own bytes) and the plan.

    ``refusal``: why the engine refuses what capture adds, where it does. RequestError for a field
    that must not reach the engine.
    """
    refuse_forbidden(fields, adapter)
    plan = _plan(api, fields, mode)
    reason = refusal or _uncapturable(api, fields, adapter)
    if reason is not None:
        return None, msgspec.structs.replace(plan, mode="plain", uncaptured=reason)
    out = dict(fields)
    hide_top, hide_choice = set[str](), set[str]()
    ids_asked = bool(read(fields, adapter.ask_ids, bool))
    for hides in (True, False):  # a key that one field of two asked for is not hidden
        for ask in adapter.asks:
            if bool(read(fields, ask.field, bool)) is hides:
                continue
            change = set.update if hides else set.difference_update
            change(hide_top, ask.in_top)
            change(hide_choice, ask.in_choice)
    out |= {ask.field: _TRUE for ask in adapter.asks}
    logprobs_asked = _ask_logprobs(api, fields, out)
    if not logprobs_asked:
        hide_choice.add("logprobs")
    if plan.echo and _makes_prompt_logprobs(fields):
        hide_top.add("prompt_logprobs")
    if plan.mode == "plugin":
        out[adapter.ask_stream_routes] = _TRUE
    elif plan.mode == "synthesise":
        out["stream"] = Raw(b"false")
        out.pop("stream_options", None)
    plan = msgspec.structs.replace(
        plan,
        ids_asked=ids_asked,
        logprobs_asked=logprobs_asked,
        hide_top=frozenset(hide_top),
        hide_choice=frozenset(hide_choice),
        mark=adapter.routes_chunk_mark,
        omits_hidden=adapter.omits_unasked,
    )
    return _ENCODER.encode(out), plan


def refuse_forbidden(fields: Mapping[str, Any], adapter: EngineAdapter) -> None:
    """RequestError where a field that must not reach the engine is set, however it is spelled:
    engines take "7" and 7.0 for 7. ``fields``: raw JSON or decoded values."""
    for name, why in adapter.refused_fields.items():
        if fields.get(name) not in (None, 0, _NULL, _ZERO, _FALSE):
            raise RequestError(f"{name} is not allowed: {why}; leave the field out")


def _ask_logprobs(api: Api, fields: Fields, out: Fields) -> bool:
    """Set the logprobs fields in ``out``; True where the agent gets logprobs without us."""
    if api == "completions":
        asked = not is_absent(fields, "logprobs")
        if not asked:
            out["logprobs"] = _ZERO
        return asked
    asked = bool(read(fields, "logprobs", bool))
    out["logprobs"] = _TRUE
    if "top_logprobs" not in fields:
        out["top_logprobs"] = _ZERO
    elif is_absent(fields, "top_logprobs"):
        out["top_logprobs"] = _ZERO
        # An explicit null gets null logprobs from vLLM, unless single tokens were named.
        asked = asked and not is_absent(fields, "logprob_token_ids")
    return asked


def _makes_prompt_logprobs(fields: Fields) -> bool:
    """With echo vLLM takes ``top_logprobs`` for a ``prompt_logprobs`` that is absent. Its default
    is 0, so that only our 0 in place of an explicit null makes a difference."""
    is_null = "top_logprobs" in fields and is_absent(fields, "top_logprobs")
    return is_null and is_absent(fields, "prompt_logprobs")


def _uncapturable(api: Api, fields: Fields, adapter: EngineAdapter) -> str | None:
    """Why this request must reach the engine as it is; None when it can be captured."""
    for name in (adapter.ask_ids, "stream"):
        if not is_absent(fields, name) and read(fields, name, bool) is None:
            return f"{name} is not true, false or null"
    if not is_absent(fields, "use_beam_search") and (
        read_lax(fields["use_beam_search"], bool) is not False
    ):
        return "beam search returns sequences that were not sampled"
    if api == "completions":
        if not is_absent(fields, "logprobs") and read(fields, "logprobs", int) is None:
            return "logprobs is not a number"
        if not is_absent(fields, "echo") and read_lax(fields["echo"], bool) is not False:
            return "echo: asking for token ids would change the echoed text"
        if is_absent(fields, "logprobs") and _names_tokens(fields):
            return "logprob_token_ids without logprobs: the engine refuses it"
        return None
    if "messages" not in fields:
        return "messages are missing: the engine's refusal repeats the whole request"
    if not is_absent(fields, "logprobs") and read(fields, "logprobs", bool) is None:
        return "logprobs is not true, false or null"
    top = read(fields, "top_logprobs", int)
    if not is_absent(fields, "top_logprobs") and top is None:
        return "top_logprobs is not a number"
    if not read(fields, "logprobs", bool) and (top or _names_tokens(fields)):
        return "top_logprobs or logprob_token_ids without logprobs: the engine refuses it"
    return None


def _names_tokens(fields: Fields) -> bool:
    """An empty list is as good as none."""
    named = not is_absent(fields, "logprob_token_ids")
    return named and read(fields, "logprob_token_ids", list[Raw]) != []


def _plan(api: Api, fields: Fields, mode: StreamMode) -> Plan:
    stream = bool(read(fields, "stream", bool))
    options = read(fields, "stream_options", dict[str, Any]) or {}
    sent = settings_sent(fields)
    n = max(1, sent.get("n") or 1)
    return Plan(
        api=api,
        model=read(fields, "model", str) or "",
        stream=stream,
        mode=mode if stream else "plain",
        n=n,
        prompts=_prompts(fields) if api == "completions" else 1,
        sampling=sampling_of(fields, sent, n),
        unread=tuple(name for name, value in sent.items() if value is None),
        usage_asked=bool(options.get("include_usage")),
        echo=not is_absent(fields, "echo") and bool(read_lax(fields["echo"], bool)),
        hides_reasoning=read(fields, "include_reasoning", bool) is False,
    )


def _prompts(fields: Fields) -> int:
    """A list of texts or of id lists is one prompt each; a text or a list of ids is one."""
    if _LIST_OF_PROMPTS.match(bytes(fields.get("prompt", _NULL))) is None:
        return 1
    return len(read(fields, "prompt", list[Raw]) or [_NULL])


def strip_answer(body: bytes, plan: Plan) -> Stripped:
    """A JSON answer as the agent would have got it.

    What is not an answer is left as it is and has no messages.
    """
    if plan.hide_top >= _TAKEN_TOP and plan.hide_choice >= _TAKEN_CHOICE:
        pieces = take_apart(body)
        if pieces is not None:
            return _without_pieces(pieces, plan)
    try:
        answer = _FIELDS.decode(body)
        choices = _CHOICES.decode(answer.get("choices", b"[]"))
    except UNREADABLE:
        if (quoted := _quoted(body)) == body:
            return Stripped(body, [])
        stripped = strip_answer(quoted, plan)
        return Stripped(_unquoted(stripped.body), stripped.messages)
    messages = [choice["message"] for choice in choices if "message" in choice]
    if plan.uncaptured is not None:
        return Stripped(body, messages)
    return Stripped(_hidden(answer, choices, plan) or body, messages)


def _without_pieces(pieces: Pieces, plan: Plan) -> Stripped:
    """The same from the pieces of an answer."""
    choice = pieces.choice.copy()
    if pieces.routed_experts is not None:
        choice["routed_experts"] = pieces.routed_experts
    _hide(choice, plan.hide_choice, plan)
    answer = pieces.fields | {"choices": Raw(_ENCODER.encode([choice]))}
    _hide(answer, plan.hide_top, plan)
    messages = [choice["message"]] if "message" in choice else []
    return Stripped(_ENCODER.encode(answer), messages, pieces)


def strip_event(event: bytes, plan: Plan) -> bytes | None:
    """A stream's event as the agent would have got it; None for one that it would not have got."""
    if plan.uncaptured is not None:
        return event
    data = sse.event_data(event)
    if data is None or data == sse.DONE:
        return event
    try:
        chunk = _FIELDS.decode(data)
        if plan.mark in chunk:
            return None
        choices = _CHOICES.decode(chunk.get("choices", b"[]"))
    except UNREADABLE:
        if (quoted := _quoted(event)) == event:
            return event
        stripped_event = strip_event(quoted, plan)
        return None if stripped_event is None else _unquoted(stripped_event)
    if plan.api == "chat" and not plan.ids_asked and _is_filler(choices):
        return None
    stripped = _hidden(chunk, choices, plan)
    return event if stripped is None else sse.replace_data(event, stripped)


def _quoted(data: bytes) -> bytes:
    """``data`` with NaN and infinities, which Python's encoder writes, as texts."""
    if b"NaN" not in data and b"Infinity" not in data:
        return data

    def quote(found: re.Match[bytes]) -> bytes:
        return found[0] if found[2] is None else b'%b"%b%b"' % (found[1], _QUOTED, found[2])

    return _TO_NO_JSON.sub(quote, data)


def _unquoted(data: bytes) -> bytes:
    return _QUOTED_NO_JSON.sub(rb"\1", data)


def _hidden(answer: Fields, choices: list[Fields], plan: Plan) -> bytes | None:
    """The answer or chunk with hidden fields as null; None where nothing has to change."""
    changed = _hide(answer, plan.hide_top, plan)
    hidden = [_hide(choice, plan.hide_choice, plan) for choice in choices]
    if any(hidden):
        answer["choices"] = Raw(_ENCODER.encode(choices))
        changed = True
    return _ENCODER.encode(answer) if changed else None


def _hide(fields: Fields, names: Collection[str], plan: Plan) -> bool:
    changed = False
    for name in names:
        if name not in fields or fields[name] == _NULL:
            continue
        if plan.omits_hidden and name != "logprobs":
            del fields[name]
        else:
            fields[name] = _NULL
        changed = True
    return changed


def _is_filler(choices: list[Fields]) -> bool:
    """A chunk that vLLM sends only to carry token ids: its parser held the text back.

    With ``parallel_tool_calls: false`` vLLM also sends such chunks by itself, in place of further
    calls; they are dropped too, an empty delta being nothing to a client."""
    return bool(choices) and all(
        _EMPTY_DELTA.fullmatch(bytes(choice.get("delta", b""))) is not None
        and bytes(choice.get("finish_reason", _NULL)) == b"null"
        for choice in choices
    )

"""Folds an engine's answer, whole or streamed, into the arrays and proofs of its traces. Pure.

Runs on the writer thread. Nothing is padded, guessed or retokenised: what does not fit is left out
and named in ``missing``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import Raw

from driftgate.adapters.base import EngineAdapter
from driftgate.errors import UNREADABLE, UpstreamError
from driftgate.gateway.digits import ids_of, read_all_ids
from driftgate.gateway.draft import HEAD, Draft, Odd, Usage, given, read_choice
from driftgate.gateway.messages import Message
from driftgate.gateway.openai import Plan
from driftgate.gateway.pieces import Pieces, check_text
from driftgate.gateway.tape import Tape
from driftgate.gateway.texts import text_matches
from driftgate.trace import F32, I32, Proof, Routes, RoutesVia, WeightSpan

__all__ = ["Folded", "Sample", "fold_answer", "fold_stream"]

_FIELDS = msgspec.json.Decoder(dict[str, Raw])

ARRAY_KEYS = (
    "token_ids",
    "prompt_token_ids",
    "logprobs",
    "prompt_logprobs",
    "routed_experts",
    "meta_info",
)
"""Left out of ``Sample.response``: the arrays hold them, but for the alternatives that an agent
asked for (``top_logprobs``)."""

TEXTS = {"message", "delta", "text"}
"""Fields that hold a choice's text."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Sample:
    """One choice; the fields are those of ``trace.Trace`` and ``trace.TraceMeta``."""

    choice: int
    prompt_ids: I32 | None
    response_ids: I32 | None
    logprobs: F32 | None
    routes: Routes | None
    routes_via: RoutesVia
    token_bytes: bytes
    token_offsets: I32 | None
    response: bytes
    finish_reason: str | None
    missing: list[str]
    proof: Proof
    weight_spans: list[WeightSpan] = field(default_factory=list)
    """Where the answer itself says them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """An answer's samples, in order of choices."""

    samples: list[Sample]
    fingerprint: str | None
    """``system_fingerprint``, where the answer carries it."""
    error: str | None = None
    """What went wrong for the whole answer, in words."""
    unread: str | None = None
    """Why choices may be lacking that the engine gave, in words."""


def fold_answer(
    answer: bytes | Pieces,
    plan: Plan,
    adapter: EngineAdapter,
    *,
    expect_routes: bool | None,
    via: Literal["json", "synthesised"] = "json",
) -> Folded:
    """The samples of a JSON answer. UpstreamError where it is none."""
    body = answer if isinstance(answer, bytes) else answer.rest()
    try:
        check_text(body)
        head = HEAD.decode(adapter.common(body))
    except UNREADABLE as error:
        raise UpstreamError(f"the engine's answer is not a completion: {error}") from error
    drafts = [_draft(raw, position) for position, raw in enumerate(head.choices)]
    if isinstance(answer, Pieces):
        drafts[0].add_pieces(answer)
    folder = _Folder(plan, adapter, expect_routes=expect_routes, via=via, end=None)
    found = given(head.prompt_token_ids)
    prompt_ids = None if found is None else bytes(found)
    odd = Odd()
    usage, fingerprint = head.usage(odd), head.fingerprint(odd)
    return folder.fold(drafts, prompt_ids, usage, fingerprint, odd=odd)


def _draft(raw: Raw, position: int) -> Draft:
    draft = Draft(index=position)
    try:
        choice, odd = read_choice(raw, position)
    except UNREADABLE as error:
        draft.missing.append(f"answer: choice {position} cannot be read: {error}")
        draft.response = bytes(raw)
        return draft
    draft.index = choice.index
    draft.add(choice, odd)
    fields = _FIELDS.decode(raw)
    draft.response = msgspec.json.encode(
        {name: value for name, value in fields.items() if name not in ARRAY_KEYS}
    )
    return draft


def fold_stream(
    tape: Tape, adapter: EngineAdapter, *, expect_routes: bool | None, end: str | None = None
) -> Folded:
    """The samples of a stream. ``end`` says why it did not end by itself, None if it did."""
    drafts = tape.drafts()
    if end is None:
        end = tape.error or (None if tape.done else "the stream ended without data: [DONE]")
    unread = None
    if tape.unread:
        unread = f"events: {tape.unread} cannot be read, the first: {tape.first_unread}"
        for draft in drafts:
            draft.missing.append(unread)
    via: RoutesVia = "plugin" if tape.plan.mode == "plugin" else "none"
    folder = _Folder(tape.plan, adapter, expect_routes=expect_routes, via=via, end=end)
    folded = folder.fold(drafts, tape.prompt_ids, tape.usage, tape.fingerprint, odd=tape.odd)
    return replace(folded, error=end, unread=unread)


class _Folder:
    """Turns drafts into samples, checking each number against the others."""

    def __init__(
        self,
        plan: Plan,
        adapter: EngineAdapter,
        *,
        expect_routes: bool | None,
        via: RoutesVia,
        end: str | None,
    ) -> None:
        self._plan = plan
        self._adapter = adapter
        self._expect_routes = expect_routes
        self._via = via
        self._end = end

    def fold(
        self,
        drafts: list[Draft],
        prompt_ids: bytes | None,
        usage: Usage | None,
        fingerprint: str | None,
        *,
        odd: Odd,
    ) -> Folded:
        usage = usage or Usage()
        for draft in drafts:
            draft.prompt_ids = draft.prompt_ids or prompt_ids
            draft.odd = odd | draft.odd
        counted = self._usage_gap(drafts, usage)
        samples = [self._sample(draft, usage, counted) for draft in drafts]
        return Folded(samples=samples, fingerprint=fingerprint)

    def _usage_gap(self, drafts: list[Draft], usage: Usage) -> list[str]:
        """Where the engine's own count differs from what came."""
        if self._end is not None or any(draft.ids is None for draft in drafts):
            return []
        came = sum(draft.count_ids() for draft in drafts)
        if usage.completion_tokens in (None, came):
            return []
        return [f"response_ids: usage counts {usage.completion_tokens} tokens, {came} ids came"]

    def _sample(self, draft: Draft, usage: Usage, counted: list[str]) -> Sample:
        missing = [*draft.missing, *counted]
        missing += [f"answer: {name} cannot be read: {why}" for name, why in draft.odd.items()]
        terminal = self._end is None and draft.finish_reason is not None
        if not terminal and (self._end is not None or "finish_reason" not in draft.odd):
            missing.append(f"end: {self._end or 'no finish_reason came'}")
        if self._plan.uncaptured is not None:
            missing.append(f"tokens: {self._plan.uncaptured}")
        missing += [f"sampling: {name} cannot be read" for name in self._plan.unread]
        prompt_ids, response_ids = self._all_ids(draft, missing)
        logprobs = self._logprobs(draft, response_ids, missing)
        token_bytes, token_offsets = self._texts(draft, response_ids, missing)
        routes = self._routes(draft, prompt_ids, response_ids, missing)
        proof = Proof(
            ids=None if response_ids is None else len(response_ids),
            logprob_rows=draft.row_count,
            usage_completion=usage.completion_tokens,
            usage_prompt=usage.prompt_tokens if self._plan.prompts == 1 else None,
            usage_cached=usage.cached_tokens if self._plan.prompts == 1 else None,
            prompt_ids=None if prompt_ids is None else len(prompt_ids),
            route_rows=None if routes is None else len(routes),
            text_matches=self._text_matches(draft, token_bytes, token_offsets),
            terminal=terminal,
        )
        return Sample(
            choice=draft.index,
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            logprobs=logprobs,
            routes=routes,
            routes_via="none" if routes is None else self._via,
            token_bytes=token_bytes,
            token_offsets=token_offsets,
            response=self._with_alternatives(draft),
            finish_reason=draft.finish_reason,
            missing=missing,
            proof=proof,
            weight_spans=draft.weight_spans,
        )

    def _all_ids(self, draft: Draft, missing: list[str]) -> tuple[I32 | None, I32 | None]:
        """Of the prompt and of the response; read at once, where both can be."""
        prompt, response = draft.prompt_ids, draft.ids_array()
        if prompt is not None and response is not None:
            read = read_all_ids(prompt, response)
            if read is not None:
                return read[0], read[1]
        prompt_ids = self._ids("prompt_ids", prompt, missing)
        return prompt_ids, self._ids("response_ids", response, missing)

    def _ids(self, name: str, given: bytes | None, missing: list[str]) -> I32 | None:
        if given is None:
            if self._plan.hides_reasoning and name == "response_ids":
                missing.append(f"{name}: include_reasoning=false makes the engine hide them")
            elif self._plan.uncaptured is None:
                missing.append(f"{name}: the engine sent none")
            return None
        try:
            return ids_of(given)
        except (*UNREADABLE, ValueError, OverflowError) as error:
            missing.append(f"{name}: {error}")
            return None

    def _logprobs(self, draft: Draft, ids: I32 | None, missing: list[str]) -> F32 | None:
        rows = draft.row_count
        if rows is None:
            if ids is not None and not len(ids):
                return np.empty(0, np.float32)
            if self._plan.uncaptured is None:
                why = (
                    "hidden by include_reasoning=false"
                    if self._plan.hides_reasoning
                    else "the engine sent none"
                )
                missing.append(f"logprobs: {why}")
            return None
        if ids is not None and rows != len(ids):
            missing.append(f"logprobs: {rows} rows came for {len(ids)} ids")
            return None
        if draft.nulls:
            missing.append(f"logprobs: {draft.nulls} of {rows} are null")
            return None
        # By its buffer: numpy reads an ``array`` number by number.
        return np.frombuffer(draft.logprobs, np.float32).copy() if ids is not None else None

    def _texts(self, draft: Draft, ids: I32 | None, missing: list[str]) -> tuple[bytes, I32 | None]:
        if ids is None or not draft.row_count == len(draft.lengths) == len(ids):
            return b"", np.zeros(1, np.int32) if ids is not None and not len(ids) else None
        if draft.nameless:
            missing.append(
                "token_text: the engine named tokens token_id:N (return_tokens_as_token_ids)"
            )
            return b"", None
        offsets = np.zeros(len(draft.lengths) + 1, np.int32)
        np.cumsum(draft.lengths, out=offsets[1:])
        return bytes(draft.token_bytes), offsets

    def _routes(
        self, draft: Draft, prompt_ids: I32 | None, ids: I32 | None, missing: list[str]
    ) -> Routes | None:
        if draft.routes is None:
            if self._expect_routes is None and self._end is None:
                missing.append(
                    "routed_experts: the engine was not probed, so it is not known whether it has "
                    "them"
                )
            elif self._expect_routes and self._end is None:
                plain = self._plan.stream and self._via == "none"
                why = "the engine does not stream them" if plain else "the engine sent none"
                missing.append(f"routed_experts: {why}")
            return None
        if prompt_ids is None or ids is None:
            missing.append("routed_experts: they came, but no token ids to align them with")
            return None
        try:
            return self._adapter.decode_routes(
                draft.routes, prompt_len=len(prompt_ids), response_len=len(ids)
            )
        except ValueError as error:
            missing.append(f"routed_experts: {error}")
            return None

    def _text_matches(self, draft: Draft, joined: bytes, offsets: I32 | None) -> bool | None:
        if offsets is None or self._plan.echo or self._end is not None:
            return None
        if not TEXTS.isdisjoint(draft.odd):
            return None
        text: str | None
        if draft.text is not None:
            text = draft.text.getvalue()
        else:
            message = (draft.message or Message()).body()
            if message.get("tool_calls") or message.get("reasoning") is not None:
                return None
            text = message["content"]
        if text is None:
            return None
        stopped = draft.finish_reason == "stop"
        return text_matches(joined, offsets, text.encode(), stopped=stopped)

    def _with_alternatives(self, draft: Draft) -> bytes:
        """The choice, with ``top_logprobs`` where they stood; of a row without any, an empty
        list."""
        response = draft.response or self._response(draft)
        if not (draft.alternatives and draft.row_count and self._plan.logprobs_asked):
            return response
        rows = draft.alternatives + [b"[]"] * (draft.row_count - len(draft.alternatives))
        tops = [Raw(row) for row in rows]
        chat = self._plan.api == "chat"
        kept: Any = [{"top_logprobs": top} for top in tops]
        said = {"content": kept} if chat else {"top_logprobs": tops}
        return msgspec.json.encode({**_FIELDS.decode(response), "logprobs": said})

    def _response(self, draft: Draft) -> bytes:
        """A streamed choice, with the keys of a JSON answer's."""
        body: dict[str, Any] = {"index": draft.index}
        if self._plan.api == "chat":
            body["message"] = (draft.message or Message()).body()
        else:
            body["text"] = "" if draft.text is None else draft.text.getvalue()
        body |= {"finish_reason": draft.finish_reason, "stop_reason": draft.stop_reason}
        return msgspec.json.encode(body)

"""One call of a run that goes on exactly: what it goes on from, how the engine is asked for it, and
what can go on from its answers."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import msgspec
from msgspec import Raw

from driftgate.errors import UNREADABLE
from driftgate.gateway.draft import given
from driftgate.gateway.pieces import Pieces
from driftgate.gateway.post import EngineAnswer
from driftgate.gateway.sampled import Chain, Known, Memory, Sampled
from driftgate.gateway.tape import Tape
from driftgate.gateway.upstream import Upstream
from driftgate.trace import Continuation

__all__ = ["Onward"]


class _Row(msgspec.Struct):
    token: str = ""


class _Rows(msgspec.Struct):
    content: list[_Row] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    message: dict[str, Any] = {}
    token_ids: Raw = Raw()
    logprobs: _Rows | None = None

    @property
    def spoken(self) -> str | None:
        """The text of all of its tokens, where it came."""
        rows = None if self.logprobs is None else self.logprobs.content
        return None if rows is None else "".join(row.token for row in rows)


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []
    prompt_token_ids: Raw = Raw()


_IDS = re.compile(rb"\[\d[\d, ]*+\]")
"""A JSON array of ids, proven as far as they are joined here: the answer's fold reads them."""
_ANSWER = msgspec.json.Decoder(_Answer)
_MESSAGE = msgspec.json.Decoder(dict[str, Any])


@dataclass(slots=True)
class Onward:
    """One call: what it goes on from, and what can go on from its answers."""

    chain: Chain | None
    trajectory: str
    memory: Memory
    tokenizer: str | None = None
    """Stands for what gives the ids."""
    known: Known | None = None
    continuation: Continuation | None = None
    ids: bytes | None = None
    """The prompt, as a JSON array; None: the engine renders it."""

    def go_on(self, known: Known, behind: Sequence[int]) -> Sampled:
        """Keep the ids of ``known``, which is given back, and put ``behind`` behind them."""
        sampled, self.known = known.sampled, known
        parts = sampled.prompt_ids[1:-1], sampled.response_ids[1:-1]
        self.ids = b"[%b]" % b",".join([*parts, *(b"%d" % one for one in behind)])
        return sampled

    def ordinary(self, why: str | None) -> Self:
        """The engine renders the messages."""
        self.ids = self.known = None
        self.continuation = Continuation(way="ordinary", reason=why)
        return self

    async def ask(
        self, post: Callable[[bytes], Awaitable[EngineAnswer]], body: bytes, upstream: Upstream
    ) -> EngineAnswer:
        """``post`` the request with the ids in it; as it is where there are none, where
        ``upstream`` has another tokenizer, and where the engine refuses them."""
        if self.ids is not None and self.tokenizer != upstream.tokenizer:
            self.ordinary(f"the call went to {upstream.url}, whose tokenizer may be another one")
        if self.ids is None:
            return await post(body)
        name, key = (part.encode() for part in upstream.adapter.prompt_ids_field)
        written = b'%b,"%b":{"%b":%b}}' % (body.rstrip()[:-1], name, key, self.ids)
        answer = await post(written)
        if answer.status != 400:
            return answer
        answer.close()  # it refused before it sampled
        self.ordinary("the engine answered 400 to the kept ids and was asked with the messages")
        return await post(body)

    def answered(
        self, call_id: str, raw: bytes, messages: Sequence[Raw], pieces: Pieces | None
    ) -> None:
        """Remember the choices of a JSON answer; ``pieces``: it, taken apart."""
        try:
            if pieces is not None and len(messages) == 1:
                message = _MESSAGE.decode(messages[0])
                spoken = "".join(pieces.tokens)
                ids = pieces.prompt_token_ids, pieces.token_ids
                self.keep(f"{call_id}.0", message, *ids, spoken)
                return
            answer = _ANSWER.decode(raw)
        except UNREADABLE:
            return  # the fold names it
        for choice in answer.choices:
            self.keep(
                f"{call_id}.{choice.index}",
                choice.message,
                given(answer.prompt_token_ids),
                given(choice.token_ids),
                choice.spoken,
            )

    def streamed(self, call_id: str, tape: Tape) -> None:
        """The same of a stream that has come."""
        for draft in tape.drafts():
            if draft.message is not None:
                prompt_ids = draft.prompt_ids or tape.prompt_ids
                trace_id = f"{call_id}.{draft.index}"
                ids = prompt_ids, draft.ids_array()
                spoken = None if draft.nameless else draft.token_bytes.decode(errors="replace")
                self.keep(trace_id, draft.message.body(), *ids, spoken)

    def keep(
        self,
        trace_id: str,
        message: Mapping[str, Any],
        prompt_ids: bytes | Raw | None,
        response_ids: bytes | Raw | None,
        spoken: str | None = None,
    ) -> None:
        """Remember one answer, where its ids came; ``spoken``: the text of its tokens."""
        if self.chain is None or prompt_ids is None or response_ids is None:
            return
        prompt, response = bytes(prompt_ids), bytes(response_ids)
        if not (_IDS.fullmatch(prompt) and _IDS.fullmatch(response)):
            return  # nothing was sampled, or what came is no list of ids: the fold names it
        link = self.chain.after(message, spoken)
        if self.known is not None:  # reasoning that did not come back is in the ids all the same
            known = self.known.thoughts
            link = link._replace(thoughts=(*known, *link.thoughts[len(known) :]))
        self.memory.put(
            link,
            Sampled(
                trace_id=trace_id,
                trajectory=self.trajectory,
                tool_ids=link.tool_ids,
                thoughts=link.thoughts,
                varying=self.chain.varying,
                prompt_ids=prompt,
                response_ids=response,
            ),
        )

"""Exact-token continuation: a run's prompts begin with the ids that were sampled, never with what a
template and a tokenizer make of them later (``continuation = "exact"``).

For each call the last answer of the run among its messages is looked up with all that stood before
it. What follows that answer is rendered by the engine, and the chat completion is asked with the
ids of both, so sampling, parsers, routes and streams are the engine's own. Whatever is in the way
(an edited history, images, an engine that takes no ids, a rendering that fails) leads to the
ordinary request, and the trace says so. That the ids were taken is proven by those that came back.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import aiohttp
import msgspec
import numpy as np
from msgspec import Raw
from yarl import URL

from driftgate.errors import UNREADABLE, DriftgateError, UpstreamError
from driftgate.gateway import openai, rerender
from driftgate.gateway.breakage import breakage
from driftgate.gateway.dialects import chat_fields, previous_of
from driftgate.gateway.digits import ids_of
from driftgate.gateway.misled import misled
from driftgate.gateway.onward import Onward
from driftgate.gateway.openai import Fields, Plan
from driftgate.gateway.recent import Recent
from driftgate.gateway.rerender import Asked
from driftgate.gateway.sampled import Chain, Memory, Sampled, read_chain
from driftgate.gateway.sessions import MAX_TRAJECTORIES, Place
from driftgate.gateway.upstream import Upstream, tokenizer_of
from driftgate.spoken import message_of
from driftgate.storage import Reader
from driftgate.trace import I32, Continuation, Engine, Trace

__all__ = ["Exact", "proven"]

RENDER_TIMEOUT_S = 10.0
"""An engine renders 100,000 tokens in less than a second; a busy one answers late."""

LOADED_TRACES = 4
"""Latest traces of a trajectory that are read from the store when it is met first."""

NOT_TAKEN = (
    "the engine did not take the ids and rendered the messages: its chat completions need to take "
    "kv_transfer_params.prompt_token_ids, as vLLM 0.29's do"
)

ANOTHER = "the engine changed before it answered: the ids may be of another tokenizer than its own"

T = TypeVar("T")


class Aside(Protocol):
    """Runs what a long request makes long where it does not hold the loop."""

    def __call__(self, work: Callable[[], T]) -> Awaitable[T]: ...


log = logging.getLogger("driftgate.exact")


class _Rendered(msgspec.Struct):
    token_ids: Raw


_RENDERED = msgspec.json.Decoder(_Rendered)


class Exact:
    """One per gateway, where exact continuation is asked for. Lives on the event loop."""

    def __init__(self, reader: Reader | None, session: Callable[[], aiohttp.ClientSession]) -> None:
        self._memory = Memory()
        self._reader = reader
        self._session = session
        self._met: Recent[str, bool] = Recent(MAX_TRAJECTORIES)
        """Trajectories whose answers are here, as far as there is room."""

    async def onward(
        self,
        fields: Fields,
        plan: Plan,
        place: Place,
        upstream: Upstream,
        headers: Mapping[str, str],
        aside: Aside,
    ) -> Onward | None:
        """How to ask for a call of ``place``; None where it is no chat call. ``aside`` does what a
        long request makes long."""
        if plan.api != "chat":
            return None
        chain: Chain | None = await aside(lambda: read_chain(fields, upstream.tokenizer))
        onward = Onward(chain, place.trajectory, self._memory, upstream.tokenizer)
        if chain is None:
            return onward
        if self._met.get(place.trajectory) is None:
            if place.attribution != "new":
                self._restore(await asyncio.to_thread(self._read, place.trajectory))
            # Now: the next call may come before they are read, and this one may leave.
            self._met.put(place.trajectory, True)
        if not chain.answers:
            return onward
        why_not = plan.uncaptured or _cannot(upstream)
        why_not = why_not or await aside(lambda: rerender.obstacle(fields, upstream.adapter))
        known, why = self._memory.find(chain, place.trajectory)
        if known is None or why_not is not None:
            return onward.ordinary(why_not or why)
        if any(known.thoughts):
            why_not = misled(fields, plan, upstream.adapter, upstream.version)
            if why_not is not None:
                return onward.ordinary(why_not)
        asked = await aside(lambda: rerender.asked(fields, known, chain.varying))
        behind = await self._behind(asked, known.sampled.last_id, upstream, headers)
        if not isinstance(behind, str):
            behind = _too_long(known.sampled, behind, fields, upstream, plan.model) or behind
        if isinstance(behind, str):
            return onward.ordinary(behind)
        sampled = onward.go_on(known, behind)
        onward.continuation = Continuation(
            way="exact", after=sampled.trace_id, kept=sampled.length, reason=why
        )
        return onward

    async def _behind(
        self, asked: Asked, last_id: int, upstream: Upstream, headers: Mapping[str, str]
    ) -> list[int] | str:
        """The ids behind the answer, as the engine renders them; in words why they are not
        known."""

        async def render(*bodies: bytes) -> list[I32]:
            return await asyncio.gather(*(self._render(upstream, b, headers) for b in bodies))

        try:
            rendered = await render(*filter(None, (asked.first, asked.second, asked.before)))
            if asked.before is not None and not np.array_equal(rendered.pop(), rendered[0]):
                return "tool_choice or response_format changed, and the template shows it"
            if asked.plain is not None:
                if last_id not in upstream.turn_ends:
                    if not rerender.ends_turns(await render(*asked.plain), last_id):
                        return "a tool call was cut, or did not end as the template ends turns"
                    upstream.turn_ends.add(last_id)
                return rerender.behind_calls(rendered, last_id)
            if rerender.needs_third(rendered, last_id):
                rendered += await render(asked.third)
            return rerender.behind(rendered, last_id)
        except UpstreamError as error:
            return str(error)

    async def _render(self, upstream: Upstream, body: bytes, headers: Mapping[str, str]) -> I32:
        """The prompt's ids. UpstreamError where there are none."""
        url = URL(f"{upstream.url}{upstream.adapter.render_path}", encoded=True)
        timeout = aiohttp.ClientTimeout(total=RENDER_TIMEOUT_S)
        try:
            async with self._session().post(
                url, data=body, headers=headers, allow_redirects=False, timeout=timeout
            ) as answer:
                said = await answer.read()
            if answer.status != 200:
                raise UpstreamError(f"rendering failed: the engine answered {answer.status}")
            return ids_of(bytes(_RENDERED.decode(said).token_ids))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UpstreamError(f"rendering failed: {breakage(error).what}") from error
        except (*UNREADABLE, ValueError, OverflowError) as error:
            raise UpstreamError(f"rendering failed: {error}") from error

    def _read(self, trajectory: str) -> list[Trace]:
        """The latest traces of a trajectory that was begun before the gateway was."""
        if self._reader is None:
            return []
        try:
            rows = self._reader.traces(trajectory)[-LOADED_TRACES:]
            return [self._reader.trace(row.meta.trace_id) for row in rows]
        except (DriftgateError, sqlite3.Error) as error:
            log.warning("trajectory %s goes on without its earlier ids: %s", trajectory, error)
            return []

    def _restore(self, traces: Iterable[Trace]) -> None:
        for trace in traces:
            chain = _chain_of(trace)
            message = message_of(trace.response)
            if chain is None or not message:
                continue
            if trace.prompt_ids is None or trace.response_ids is None:
                continue
            known, _ = self._memory.find(chain, trace.meta.trajectory)
            onward = Onward(chain, trace.meta.trajectory, self._memory, known=known)
            ids = _array(trace.prompt_ids), _array(trace.response_ids)
            spoken = trace.token_bytes.decode(errors="replace") or None
            onward.keep(trace.meta.trace_id, message, *ids, spoken)


def _cannot(upstream: Upstream) -> str | None:
    if upstream.adapter.render_path is None:
        return f"{upstream.adapter.name}: its chat completions take no token ids"
    if upstream.tokenizer is None:
        return "neither the engine's tokenizer nor its system_fingerprint is known"
    return None if upstream.takes_ids else NOT_TAKEN


def _too_long(
    sampled: Sampled, behind: Sequence[int], fields: Fields, upstream: Upstream, model: str
) -> str | None:
    """The ids may be more than the template's rendering; what that had room for is not refused."""
    limit = None if upstream.report is None else upstream.report.max_tokens(model)
    asked = openai.read(fields, "max_completion_tokens", int)
    wanted = asked or openai.read(fields, "max_tokens", int) or 1
    length = sampled.length + len(behind)
    if limit is None or length + wanted <= limit:
        return None
    return f"{length} exact tokens and {wanted} to sample are over the model's {limit}"


def _array(ids: I32) -> bytes:
    return msgspec.json.encode(ids.tolist())


def _chain_of(trace: Trace) -> Chain | None:
    """Of a stored request, where it holds the whole conversation."""
    api = trace.meta.api
    if api == "completions":
        return None
    try:
        fields = openai.read_request(trace.request)
        if api == "responses" or api == "messages":
            if previous_of(fields) is not None:
                return None
            fields = chat_fields(api, trace.request, fields)
    except DriftgateError:
        return None
    return read_chain(fields, tokenizer_of(trace.meta.engine))


def proven(
    onward: Onward | None, prompt_ids: I32 | None, upstream: Upstream, engine: Engine
) -> Continuation | None:
    """How the call went on, by the ids of its prompt as they came back. Any thread."""
    if onward is None or onward.ids is None or onward.continuation is None:
        return None if onward is None else onward.continuation
    if prompt_ids is not None and np.array_equal(ids_of(onward.ids), prompt_ids):
        if onward.tokenizer in (None, tokenizer_of(engine)):
            return onward.continuation
        return msgspec.structs.replace(onward.continuation, reason=ANOTHER)
    if prompt_ids is None:
        return Continuation(way="ordinary", reason="the engine did not say the prompt's ids")
    if upstream.takes_ids:
        upstream.takes_ids = False
        log.warning("%s: %s", upstream.url, NOT_TAKEN)
    return Continuation(way="ordinary", reason=NOT_TAKEN)

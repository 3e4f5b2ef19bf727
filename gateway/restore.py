"""Fills attribution's memory from the store, so that agents in the middle of a run go on where they
were when the gateway starts again.

Reading is done on a thread, newest trajectory first; the memory is touched on the event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from driftgate.errors import UNREADABLE, DriftgateError
from driftgate.gateway import openai
from driftgate.gateway.conversation import Conversation, Turn
from driftgate.gateway.dialects import chat_fields, previous_of
from driftgate.gateway.history import History, Output, ends, read_history
from driftgate.gateway.openai import Fields, Plan
from driftgate.gateway.prompts import End, Prompt
from driftgate.gateway.sessions import Begun, Call, Place, Sessions
from driftgate.spoken import message_of
from driftgate.storage import CallRow, Reader
from driftgate.trace import Trace

__all__ = ["repeatable", "restore"]

RESTORED_STEPS = 4
"""Last steps of a trajectory that can be continued: the last one, and those that an agent goes back
to when it repeats or takes back a step."""

RESTORED_AGE_S = 24 * 3600
"""A trajectory that has been silent for longer is not continued without its name."""

PAGE = 100
"""Trajectories read from the index at once. A whole page that is too old ends the search."""

GONE = ("failed", "cancelled")
"""States of a call that can be repeated; an open one is served by another gateway."""

log = logging.getLogger("driftgate.gateway")


class _Earlier(NamedTuple):
    """What is remembered of one trajectory."""

    trajectory: str
    turns: list[Turn | End]
    calls: list[Call]
    begun: Begun | None


async def restore(sessions: Sessions, reader: Reader, ask_ids: str) -> None:
    """Read until the memory is full or the store's recent trajectories are all in it.

    ``ask_ids``: the request's field by which agents ask the engine for token ids."""
    found = _read_recent(reader, ask_ids, time.time_ns())
    count = 0
    while not sessions.full and (earlier := await _unbroken(found)) is not None:
        sessions.restore(*earlier)
        count += 1
    log.info("%d recent trajectories of the store can be continued", count)


async def _unbroken(found: Iterator[_Earlier]) -> _Earlier | None:
    """The next trajectory; a thread that reads is waited for, because its reader gets closed."""
    reading = asyncio.ensure_future(asyncio.to_thread(next, found, None))
    try:
        return await asyncio.shield(reading)
    except asyncio.CancelledError:
        await asyncio.wait({reading})
        raise


def _read_recent(reader: Reader, ask_ids: str, now_ns: int) -> Iterator[_Earlier]:
    oldest_ns = now_ns - RESTORED_AGE_S * 10**9
    before: str | None = None
    while rows := reader.trajectories(limit=PAGE, before=before):
        before = rows[-1].trajectory
        recent = [row.trajectory for row in rows if row.ended_ns >= oldest_ns]
        for trajectory in recent:
            try:
                yield _read(reader, trajectory, ask_ids, now_ns)
            except DriftgateError as error:
                log.warning("trajectory %s cannot be continued unnamed: %s", trajectory, error)
        if not recent:
            return


def _read(reader: Reader, trajectory: str, ask_ids: str, now_ns: int) -> _Earlier:
    rows = reader.traces(trajectory)
    first = rows[-1].meta.step - RESTORED_STEPS if rows else 0
    turns = list[Turn | End]()
    begun: Begun | None = None
    for row in rows:
        is_beginning = bool(row.meta.ambiguous) and row.meta.step == 0
        if row.meta.step <= first and not is_beginning:
            continue
        trace = reader.trace(row.meta.trace_id)
        fields = openai.read_request(trace.request)
        spoken = trace.meta.api
        plan = Plan(
            api="completions" if spoken == "completions" else "chat",
            translated=spoken if spoken in ("responses", "messages") else None,
            ids_asked=bool(openai.read(fields, ask_ids, bool)),
            echo=bool(openai.read(fields, "echo", bool)),
        )
        history = _history(trace, fields, plan)
        if is_beginning and isinstance(history, Prompt):
            begun = Begun(history.kind, len(history), tuple(row.meta.ambiguous))
        if row.meta.proof.terminal:
            turns += _turns(trace, history, plan)
    ambiguous = tuple(rows[0].meta.ambiguous) if rows else ()
    earlier = [row for row in reader.calls(trajectory) if row.started_ns < now_ns]
    return _Earlier(trajectory, turns, list(repeatable(earlier, ambiguous)), begun)


def _history(trace: Trace, fields: Fields, plan: Plan) -> History:
    if plan.translated is None:
        return read_history(fields, plan)
    if previous_of(fields) is not None:
        return None  # it is continued by its response's id
    return read_history(chat_fields(plan.translated, trace.request, fields), plan)


def _turns(trace: Trace, history: History, plan: Plan) -> Iterator[Turn | End]:
    try:
        choice = msgspec.json.decode(trace.response, type=dict[str, Any])
    except UNREADABLE:
        return  # what is no choice was not continued before either
    message, text = message_of(trace.response), choice.get("text")
    if isinstance(history, Conversation) and message:
        yield history.answered(message)
    output = Output(text=text if isinstance(text, str) else "")
    if trace.prompt_ids is not None and trace.response_ids is not None:
        output.ids, output.prompt_ids = trace.response_ids.tolist(), trace.prompt_ids.tolist()
    yield from ends(history, plan, [output])


def repeatable(rows: list[CallRow], ambiguous: tuple[str, ...] = ()) -> Iterator[Call]:
    """Of a trajectory's calls the last try of each step that failed, and of the last step: what a
    retry can repeat."""
    last_tries = {row.step: row for row in rows}
    for step, row in last_tries.items():
        failed = row.state in GONE
        if row.intent is None or not (failed or row is rows[-1]):
            continue
        place = Place(row.trajectory, row.intent.attribution, ambiguous)
        yield Call(row.call_id, place, step, row.retry, row.intent.body_sha256, failed)

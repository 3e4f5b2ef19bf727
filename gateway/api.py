"""The asking side over HTTP: trajectories, mismatch, the matrix, live drift, rewards.

A handler parses, asks ``answers`` on a thread, and sends bytes; the loop never waits for SQLite,
for a segment or for an encoder. Errors are JSON, ``{"error": {"code", "message", "fix"}}``, with
the status of their class in ``driftgate.errors``.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote

import msgspec
from aiohttp import web

from driftgate.errors import DriftgateError, NotFoundError, RequestError
from driftgate.gateway import api_judge, api_pair, api_tree, api_weights, openapi
from driftgate.gateway.answers import Answers
from driftgate.gateway.api_live import LIVE_ROUTES, LiveAnswers, LiveHandlers
from driftgate.gateway.feed import POLL_INTERVAL_S, Event, Feed, Source
from driftgate.gateway.openapi import Route
from driftgate.gateway.upstream import Upstream
from driftgate.gateway.wire import (
    body_of,
    error_answer,
    json_answer,
    origin_of,
    query_of,
    step_of,
    stream_answer,
)
from driftgate.storage import Reader, Record
from driftgate.trace import Reward
from driftgate.views import (
    Cells,
    DriftEvent,
    Kind,
    Minted,
    MintRequest,
    MismatchView,
    RewardRequest,
    StepDetail,
    TrajectoryDetail,
    TrajectoryPage,
)

__all__ = ["ROUTES", "ApiContext", "add_api_routes"]

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_PAGE = 500
"""Trajectories on one page: about 0.5 MB of JSON."""

THREADS = 4
"""Readers at once. More would only queue at the disk and at the interpreter's lock."""

HEARTBEAT_S = 15.0
"""Silence after which a stream sends a heartbeat: proxies close what is idle for 30 s or more."""

SETTLE_S = 0.2
"""A call that has just ended may be a group commit (50 ms) away from the index."""

log = logging.getLogger("driftgate.api")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiContext:
    """What the API needs of the gateway."""

    reader: Reader
    submit: Callable[[Record], Future[None]]
    """Resolves when the record is durable; raises StorageError when the queue is full."""
    mint: Callable[[str | None], tuple[str, str]]
    """Name (or None) -> (trajectory, key). RequestError where the name cannot be one."""
    upstreams: Sequence[Upstream] = ()
    """The engines, for what a trainer tells of them."""
    heartbeat_s: float = HEARTBEAT_S
    poll_interval_s: float = POLL_INTERVAL_S


class TrajectoriesQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Filters of the list of trajectories."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE)] = 50
    before: Annotated[str, msgspec.Meta(description="`next` of the page before")] | None = None
    model: str | None = None
    complete: bool | None = None
    scored: bool | None = None
    drift: Annotated[bool, msgspec.Meta(description="with the drift of each")] = False


class StepQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to include in a step."""

    routes: Annotated[bool, msgspec.Meta(description="with the route arrays")] = False


class MismatchQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to include in a mismatch."""

    tokens: Annotated[bool, msgspec.Meta(description="with every token")] = False
    trainer: Annotated[str, msgspec.Meta(description="only this trainer's digest")] | None = None


class DriftQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where to begin and whether to stay."""

    after: Annotated[
        str, msgspec.Meta(pattern="^([0-9]{1,18}|now)$", description="a cursor, or `now`")
    ] = "0"
    follow: Annotated[bool, msgspec.Meta(description="stay for what comes")] = False
    trajectory: str | None = None
    kind: Literal["drift", "noise_floor"] | None = None


class Api(LiveHandlers):
    """The handlers, over one store."""

    def __init__(self, context: ApiContext) -> None:
        self._context, self.reader = context, context.reader
        self.upstreams = context.upstreams
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="driftgate-api")
        self._answers = Answers(context.reader)
        engines = functools.partial(api_weights.states_of, context.upstreams)
        self.live = LiveAnswers(context.reader, self._answers, engines)
        self.feed = Feed(
            Source(context.reader.last_seq, self._events),
            executor=self._threads,
            poll_interval_s=context.poll_interval_s,
        )
        self._document = msgspec.json.encode(openapi.document(ROUTES, version=version("driftgate")))

    async def run(self, app: web.Application) -> AsyncIterator[None]:
        """aiohttp cleanup context: the feed's poller and the reading threads."""
        self.feed.start()
        yield
        await self.feed.close()
        await asyncio.to_thread(self._threads.shutdown)

    async def list_trajectories(self, request: web.Request) -> web.StreamResponse:
        """A page of trajectories, newest first."""
        query = query_of(request, TrajectoriesQuery)
        options = msgspec.structs.asdict(query)
        with_drift = options.pop("drift")

        def ask() -> TrajectoryPage:
            page = self._answers.trajectories(**options)
            return self.live.with_drift(page) if with_drift else page

        return await self.answer(ask)

    async def mint_trajectory(self, request: web.Request) -> web.StreamResponse:
        """Mint a trajectory to run an agent in.

        Point the agent's base URL at ``base_url``, or give it ``key`` as API key.
        """
        body = await body_of(request, MintRequest)
        origin = origin_of(request)
        trajectory, key = self._context.mint(body.trajectory)
        base_url = f"{origin}/t/{quote(trajectory, safe='')}/v1"
        minted = Minted(trajectory=trajectory, key=key, base_url=base_url)
        return json_answer(msgspec.json.encode(minted))

    async def get_trajectory(self, request: web.Request) -> web.StreamResponse:
        """One agent run: its steps, their answers and scores, gaps and reward."""
        name = request.match_info["trajectory"]
        return await self.answer(lambda: self._answers.trajectory(name))

    async def get_step(self, request: web.Request) -> web.StreamResponse:
        """One step's answers in full, token by token."""
        name, step = request.match_info["trajectory"], step_of(request)
        query = query_of(request, StepQuery)
        return await self.answer(lambda: self._answers.step(name, step, routes=query.routes))

    async def get_mismatch(self, request: web.Request) -> web.StreamResponse:
        """Would the trainer see the policy that produced this trajectory, and if not, where?"""
        name, query = request.match_info["trajectory"], query_of(request, MismatchQuery)
        return await self.answer(
            lambda: self._answers.mismatch(name, tokens=query.tokens, trainer=query.trainer)
        )

    async def give_reward(self, request: web.Request) -> web.StreamResponse:
        """Give a trajectory its reward; it is on disk when this answers. The last one counts."""
        name, body = request.match_info["trajectory"], await body_of(request, RewardRequest)
        if not math.isfinite(body.value):
            raise RequestError(f"reward {body.value} is not a finite number")
        await self._known(name)
        last = await self._thread(lambda: self._context.reader.reward(name))
        # The last one given counts, also where the clock was set back since.
        given_ns = max(time.time_ns(), last.given_ns + 1 if last is not None else 0)
        reward = Reward(trajectory=name, value=body.value, source=body.source, given_ns=given_ns)
        # Shielded: a client that leaves must not cancel what the writer has in hand.
        await asyncio.shield(asyncio.wrap_future(self._context.submit(reward)))
        return json_answer(msgspec.json.encode(reward))

    async def get_cells(self, request: web.Request) -> web.StreamResponse:
        """The matrix: every (engine, trainer) with metrics, intervals and noise floor."""
        return await self.answer(self._answers.cells)

    async def get_openapi(self, request: web.Request) -> web.StreamResponse:
        """This document."""
        return json_answer(self._document)

    async def follow_drift(self, request: web.Request) -> web.StreamResponse:
        """Scores in order of their cursor, as JSON lines or (Accept: text/event-stream) as SSE.

        Each score once: go on after a lost connection with the last event's ``cursor`` as
        ``after``, or as ``Last-Event-ID``. ``after=now`` begins with what comes; the answer's
        header ``x-driftgate-cursor`` says where that is. While idle, JSON lines send an empty
        line, SSE a comment.
        """
        query = query_of(request, DriftQuery)
        sse = "text/event-stream" in request.headers.get("accept", "")
        cursor = await self._start_of(request.headers.get("last-event-id") or query.after)
        response = stream_answer(cursor, sse=sse)
        await response.prepare(request)
        try:
            if sse:
                await response.write(b"id: %d\n\n" % cursor)
            await self._send(response, query, cursor, sse)
        except ConnectionResetError:
            log.debug("a follower of /api/drift left")
        return response

    async def no_such_route(self, request: web.Request) -> web.StreamResponse:
        """Everything else below /api/; 405 where it is only the method that is not there."""
        resolved = [await one.resolve(request) for one in request.app.router.resources()]
        if allowed := {method for _, methods in resolved for method in methods if method != "*"}:
            raise web.HTTPMethodNotAllowed(request.method, allowed)
        raise NotFoundError(
            f"there is no {request.method} {request.path}; /api/openapi.json lists what there is"
        )

    async def _send(
        self, response: web.StreamResponse, query: DriftQuery, cursor: int, sse: bool
    ) -> None:
        frame, wait_s = _sse if sse else _line, self._context.heartbeat_s
        if not query.follow:
            while True:
                events, cursor = await self.feed.page(cursor, query.trajectory, query.kind)
                if not events:
                    return
                await response.write(b"".join(map(frame, events)))
        with self.feed:
            while not self.feed.closing:
                events, cursor = await self.feed.next(
                    cursor, query.trajectory, query.kind, timeout_s=wait_s
                )
                idle = b": idle\nid: %d\n\n" % cursor if sse else b"\n"
                await response.write(b"".join(map(frame, events)) or idle)

    async def _start_of(self, after: str) -> int:
        newest = await self.feed.last_seq()
        if after == "now":
            return newest
        if not after.isascii() or not after.isdigit() or len(after) > 18:
            raise RequestError(f"Last-Event-ID {after!r} is not a cursor of this stream")
        if int(after) > newest:
            raise RequestError(
                f"cursor {after} is ahead of the newest one, {newest}: it is of another store; "
                "start with after=0 or after=now"
            )
        return int(after)

    async def _known(self, trajectory: str) -> None:
        """NotFoundError unless the trajectory is there, or is just being synced."""
        try:
            await self._thread(lambda: self._context.reader.trajectory(trajectory))
        except NotFoundError:
            await asyncio.sleep(SETTLE_S)
            await self._thread(lambda: self._context.reader.trajectory(trajectory))

    def _events(
        self, after: int, limit: int, trajectory: str | None, kind: Kind | None
    ) -> list[Event]:
        return [
            Event(
                event.cursor, event.score.trajectory, event.score.kind, msgspec.json.encode(event)
            )
            for event in self._answers.drift(after, limit, trajectory, kind)
        ]

    async def answer(self, ask: Callable[[], msgspec.Struct]) -> web.Response:
        """``ask()`` on a thread, as JSON."""
        return json_answer(await self._thread(lambda: msgspec.json.encode(ask())))

    async def _thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


ROUTES: tuple[Route, ...] = (
    Route(
        method="GET",
        path="/api/trajectories",
        handler=Api.list_trajectories,
        query=TrajectoriesQuery,
        answer=TrajectoryPage,
    ),
    Route(
        method="POST",
        path="/api/trajectories",
        handler=Api.mint_trajectory,
        body=MintRequest,
        answer=Minted,
    ),
    Route(
        method="GET",
        path="/api/trajectories/{trajectory}",
        handler=Api.get_trajectory,
        answer=TrajectoryDetail,
    ),
    Route(
        method="GET",
        path="/api/trajectories/{trajectory}/steps/{step}",
        handler=Api.get_step,
        query=StepQuery,
        answer=StepDetail,
    ),
    Route(
        method="GET",
        path="/api/trajectories/{trajectory}/mismatch",
        handler=Api.get_mismatch,
        query=MismatchQuery,
        answer=MismatchView,
    ),
    Route(
        method="POST",
        path="/api/trajectories/{trajectory}/reward",
        handler=Api.give_reward,
        body=RewardRequest,
        answer=Reward,
    ),
    *api_judge.ROUTES,
    *api_tree.ROUTES,
    *api_pair.ROUTES,
    *api_weights.ROUTES,
    Route(method="GET", path="/api/cells", handler=Api.get_cells, answer=Cells),
    Route(
        method="GET",
        path="/api/drift",
        handler=Api.follow_drift,
        query=DriftQuery,
        answer=DriftEvent,
        stream=True,
    ),
    *LIVE_ROUTES,
    Route(method="GET", path="/api/openapi.json", handler=Api.get_openapi, answer=dict),
)


def add_api_routes(app: web.Application, context: ApiContext) -> Feed:
    """Mount the API on ``app``; its threads and poller live as long as the app runs.

    Gives the live feed, whose counters are for ``/metrics``.
    """
    api = Api(context)
    for route in ROUTES:
        handler = functools.partial(route.handler, api)
        app.router.add_route(route.method, route.path, _edge(handler))
    app.router.add_route("*", "/api/{rest:.*}", _edge(api.no_such_route))
    app.cleanup_ctx.append(api.run)
    # Before the connections are waited for: followers end by themselves, at once.
    app.on_shutdown.append(lambda _: api.feed.close())
    return api.feed


def _edge(handler: Callable[[web.Request], Awaitable[Any]]) -> Handler:
    """The outermost edge of a request: every error becomes its JSON answer."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            response: web.StreamResponse = await handler(request)
        except DriftgateError as error:
            return error_answer(error.status, str(error))
        except web.HTTPException:
            raise
        except Exception as error:
            log.exception("%s %s failed", request.method, request.path)
            return error_answer(500, f"{type(error).__name__} inside the gateway")
        return response

    return handle


def _line(event: Event) -> bytes:
    return event.body + b"\n"


def _sse(event: Event) -> bytes:
    return b"id: %d\nevent: score\ndata: %b\n\n" % (event.cursor, event.body)

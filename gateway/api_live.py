"""The dashboard's own questions: what is live, drift over time, routes token by token, glossary.

``LiveHandlers`` is the part of ``driftgate.gateway.api.Api`` that answers them. The overview is
shared for ``FRESH_S``: any number of open pages costs the store as much as one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec
from aiohttp import web

from driftgate.bands import BANDS, MOE_FP8_SLACK
from driftgate.comparable import CODES
from driftgate.engine_views import EngineState
from driftgate.errors import NotFoundError
from driftgate.gateway.alarms import alarms
from driftgate.gateway.answers import Answers
from driftgate.gateway.live import Live, Refuted, TrajectoryWorst
from driftgate.gateway.openapi import Route
from driftgate.gateway.token_routes import step_routes
from driftgate.gateway.wire import query_of, step_of
from driftgate.glossary import METRICS, ROUTER_METRICS
from driftgate.listings import TrajectoryPage
from driftgate.live_views import Glossary, Overview, Series, StepRoutes, WorstTrajectory
from driftgate.pool import refutes
from driftgate.storage import CellRow, Reader
from driftgate.trace import Score

__all__ = ["LIVE_ROUTES", "LiveAnswers", "LiveHandlers"]

WINDOW_S = 60.0
"""Rates are over the last minute: long enough for agents whose steps take seconds."""

STALE_S = 3600.0
"""An open call this old is most likely a killed gateway's: engines answer within minutes."""

FRESH_S = 1.0
"""How old a shared overview may be; the page asks every few seconds."""

COST_SHARE = 10.0
"""In a large store counting takes longer: it is then done so seldom that it takes at most a tenth
of one thread."""

SHOWN_WORST = 10

POINTS = 120
"""Points of a line when the caller does not say: about one for each 5 pixels of a chart."""

MIN_SLOT_S = 0.25
"""The finest slot: about what a small forward takes."""

MAX_TOKEN = 1 << 24
"""Past any response (``storage.delta.MAX_IDS``)."""


class SeriesQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How fine the lines are."""

    points: Annotated[int, msgspec.Meta(ge=2, le=1000, description="at most, per cell")] = POINTS


class RoutesQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which answer, which trainer, which token."""

    choice: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    trainer: Annotated[str, msgspec.Meta(description="digest; the latest score's if left out")] | (
        None
    ) = None
    token: (
        Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKEN, description="with its experts by layer")]
        | None
    ) = None


class LiveAnswers:
    """Reads a store into ``driftgate.live_views``. Blocking, thread-safe."""

    def __init__(
        self,
        reader: Reader,
        answers: Answers,
        engines: Callable[[], Sequence[EngineState]] = tuple,
    ) -> None:
        """``engines``: how they are now, where a gateway runs."""
        self._reader, self._answers, self._engines = reader, answers, engines
        self._live = Live(lambda after, limit: reader.scores(after=after, limit=limit))
        self._lock = threading.Lock()
        self._shared: Overview | None = None
        self._fresh_until = 0.0

    def overview(self) -> Overview:
        """What is live now, shared between all who ask; see ``FRESH_S``."""
        # While one thread looks, the others give what was there: a slow store holds up one thread.
        if not self._lock.acquire(blocking=self._shared is None):
            assert self._shared is not None
            return self._shared
        try:
            started = time.monotonic()
            if self._shared is None or started > self._fresh_until:
                self._shared = self._overview(time.time_ns())
                took = time.monotonic() - started
                self._fresh_until = started + took + max(FRESH_S, COST_SHARE * took)
            return self._shared
        finally:
            self._lock.release()

    def series(self, points: int) -> Series:
        """Drift over time in at most ``points`` slots a cell."""
        self._live.refresh()
        slot_s = max(MIN_SLOT_S, self._live.span_s() / (points - 1))
        return Series(
            slot_s=slot_s, items=self._live.series(slot_s, _refuted(self._reader.cells()))
        )

    def with_drift(self, page: TrajectoryPage) -> TrajectoryPage:
        """The page, each trajectory with its drift."""
        self._live.refresh()
        items = self._live.with_drift(page.items, _refuted(self._reader.cells()))
        return TrajectoryPage(items=items, next=page.next)

    def routes(
        self, trajectory: str, step: int, choice: int, trainer: str | None, token: int | None
    ) -> StepRoutes:
        """Route disagreement of one answer. NotFoundError."""
        rows = self._reader.traces(trajectory, step)
        found = [row for row in rows if row.meta.choice == choice]
        if not found:
            raise NotFoundError(
                f"trajectory {trajectory!r} has no stored answer at step {step} choice {choice}; "
                f"GET /api/trajectories/{trajectory} lists its steps"
            )
        trace = self._reader.trace(found[-1].meta.trace_id)
        return step_routes(trace, self._score(trace.meta.trace_id, trainer), token)

    def _overview(self, now_ns: int) -> Overview:
        reader, live = self._reader, self._live
        live.refresh()
        counts = reader.counts()
        activity = reader.activity(now_ns=now_ns, window_s=WINDOW_S, stale_s=STALE_S)
        cells = reader.cells()
        refuted = _refuted(cells)
        found = alarms(
            live.cells(refuted),
            cells,
            activity,
            counts.trajectories,
            now_ns=now_ns,
            engines=self._engines(),
        )
        return Overview(
            now_ns=now_ns,
            window_s=activity.window_s,
            running=activity.running,
            open_calls=activity.open_calls,
            stale_calls=activity.stale_calls,
            steps_per_s=activity.calls / activity.window_s,
            response_tokens_per_s=activity.response_tokens / activity.window_s,
            trajectories=counts.trajectories,
            incomplete=activity.with_gaps,
            steps=counts.steps,
            captured=counts.traces,
            scorable=counts.scorable,
            scored=counts.scored,
            waiting=activity.waiting,
            oldest_waiting_ns=activity.oldest_waiting_ns,
            last_call_ns=activity.last_call_ns,
            last_score_ns=live.last_score_ns,
            alarms=found,
            worst=[view for view in map(self._worst, live.worst(SHOWN_WORST, refuted)) if view],
        )

    def _worst(self, found: TrajectoryWorst) -> WorstTrajectory | None:
        worst = self._answers.worst_token(found.worst)
        if worst is None:  # its trace is damaged or lost
            return None
        return WorstTrajectory(trajectory=found.trajectory, model=found.model, worst=worst)

    def _score(self, trace_id: str, trainer: str | None) -> Score | None:
        try:
            return self._reader.score(trace_id, trainer)
        except NotFoundError:
            return None


def _refuted(cells: Sequence[CellRow]) -> Refuted:
    """Pools of scores that their cell refutes."""
    return {
        (row.engine.digest, row.trainer.digest, row.model, row.kind): {
            pool for pool, found in row.findings.items() if refutes(found)
        }
        for row in cells
    }


class LiveHandlers:
    """The handlers; ``Api`` brings the thread that answers."""

    live: LiveAnswers

    async def answer(self, ask: Callable[[], msgspec.Struct]) -> web.Response:
        raise NotImplementedError

    async def get_overview(self, request: web.Request) -> web.StreamResponse:
        """What is live now: rates, coverage, lag, alarms in words, the worst trajectories."""
        return await self.answer(self.live.overview)

    async def get_series(self, request: web.Request) -> web.StreamResponse:
        """Drift over time: every cell's scores merged by slots of the time of scoring."""
        query = query_of(request, SeriesQuery)
        return await self.answer(lambda: self.live.series(query.points))

    async def get_routes(self, request: web.Request) -> web.StreamResponse:
        """Where engine and trainer chose other experts, token by token and layer by layer."""
        name, step = request.match_info["trajectory"], step_of(request)
        query = query_of(request, RoutesQuery)
        return await self.answer(
            lambda: self.live.routes(name, step, query.choice, query.trainer, query.token)
        )

    async def get_glossary(self, request: web.Request) -> web.StreamResponse:
        """Every metric, colour band and reason code: what it is and how it misleads."""
        return await self.answer(lambda: GLOSSARY)


GLOSSARY = Glossary(
    metrics=METRICS,
    router_metrics=ROUTER_METRICS,
    bands=BANDS,
    moe_slack=MOE_FP8_SLACK,
    codes=dict(CODES),
)

LIVE_ROUTES: tuple[Route, ...] = (
    Route(method="GET", path="/api/overview", handler=LiveHandlers.get_overview, answer=Overview),
    Route(
        method="GET",
        path="/api/series",
        handler=LiveHandlers.get_series,
        query=SeriesQuery,
        answer=Series,
    ),
    Route(
        method="GET",
        path="/api/trajectories/{trajectory}/steps/{step}/routes",
        handler=LiveHandlers.get_routes,
        query=RoutesQuery,
        answer=StepRoutes,
    ),
    Route(method="GET", path="/api/glossary", handler=LiveHandlers.get_glossary, answer=Glossary),
)

"""The trainer's side of the API: which weights the engines sample under, and a pause meanwhile.

    POST /api/weights {"pause": true}                     new calls are answered 429
    GET  /api/weights                                     until in_flight is 0
    (update the engines)
    POST /api/weights {"version": "42", "resume": true}   tokens from here on are of version 42

Without the pause a change in the middle of an answer is recorded where it was seen (streams), or
as a change whose place is not known (answers in one piece)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import msgspec
from aiohttp import web

from driftgate.engine_views import Engines, EngineState, WeightsRequest
from driftgate.errors import NotFoundError, RequestError
from driftgate.gateway.openapi import Route
from driftgate.gateway.upstream import Upstream
from driftgate.gateway.wire import body_of, json_answer

__all__ = ["ROUTES", "state_of", "states_of", "tell"]


class Told(Protocol):
    """What these handlers need of the API."""

    @property
    def upstreams(self) -> Sequence[Upstream]:
        """The engines."""
        ...


async def get_weights(api: Told, request: web.Request) -> web.StreamResponse:
    """The engines behind the gateway: up or away, their weight version, paused or not."""
    return _answer(api)


async def tell_weights(api: Told, request: web.Request) -> web.StreamResponse:
    """Tell under which weights the engines sample from now on; pause or resume them.

    Answers with every engine as it is then.
    """
    tell(api.upstreams, await body_of(request, WeightsRequest), time.time_ns())
    return _answer(api)


def tell(upstreams: Sequence[Upstream], said: WeightsRequest, now_ns: int) -> None:
    """Carry out what a trainer said, all of it or, with an error, nothing. RequestError for what
    contradicts itself or what was told before, NotFoundError for an engine that is not here."""
    meant = [u for u in upstreams if said.upstream in (None, u.url)]
    if not meant:
        known = ", ".join(u.url for u in upstreams)
        raise NotFoundError(f"there is no upstream {said.upstream!r}; there are {known}")
    if said.pause and said.resume:
        raise RequestError("pause and resume contradict each other: send one of them")
    if said.version is None and not said.pause and not said.resume:
        raise RequestError("nothing is told: send version, pause or resume")
    if said.version is None and said.from_ns is not None:
        raise RequestError("from_ns belongs to a version: send it too")
    if said.version is not None:
        from_ns = now_ns if said.from_ns is None else said.from_ns
        for upstream in meant:
            upstream.weights.check(said.version, from_ns, now_ns)
        for upstream in meant:
            upstream.weights.tell(said.version, from_ns, now_ns)
            if upstream.health.error is not None:
                upstream.health.look_soon()  # what is told of an engine that is not there is lost
    if said.pause or said.resume:
        for upstream in meant:
            since_ns = upstream.paused_ns if upstream.paused is not None else now_ns
            upstream.paused = said.reason if said.pause else None
            upstream.paused_ns = since_ns if said.pause else None


def state_of(upstream: Upstream) -> EngineState:
    """One engine as the API shows it."""
    report = upstream.report
    return EngineState(
        upstream=upstream.url,
        error=upstream.why_away,
        engine=None if report is None else report.engine,
        version=None if report is None else report.version,
        models=[] if report is None else [info.id for info in report.models],
        weight_version=upstream.weights.version,
        weights_from_ns=upstream.weights.from_ns,
        weights_lost=upstream.weights.lost,
        paused=upstream.paused,
        paused_ns=upstream.paused_ns,
        in_flight=upstream.in_flight,
    )


def states_of(upstreams: Sequence[Upstream]) -> list[EngineState]:
    """All of them."""
    return [state_of(upstream) for upstream in upstreams]


def _answer(api: Told) -> web.Response:
    return json_answer(msgspec.json.encode(Engines(engines=states_of(api.upstreams))))


ROUTES: tuple[Route, ...] = (
    Route(method="GET", path="/api/weights", handler=get_weights, answer=Engines),
    Route(
        method="POST",
        path="/api/weights",
        handler=tell_weights,
        body=WeightsRequest,
        answer=Engines,
    ),
)

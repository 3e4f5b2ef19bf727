"""The API's handlers that judge: causes, verdicts and the feedback to the rollout side.

Mounted by ``gateway.api``, whose ``Api`` answers them as it answers its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Protocol

import msgspec
from aiohttp import web

from driftgate.explain import TrajectoryExplanation
from driftgate.gateway.explanations import Explanations
from driftgate.gateway.openapi import Route
from driftgate.gateway.verdicts import Verdicts
from driftgate.gateway.wire import query_of
from driftgate.judgements import MAX_FEEDBACK, Feedback, TrajectoryVerdicts
from driftgate.profiles import ProfileName
from driftgate.storage import Reader

__all__ = ["ROUTES"]


class Asker(Protocol):
    """What these handlers need of the API: a store, and a thread to read it on."""

    @property
    def reader(self) -> Reader:
        """The store."""
        ...

    async def answer(self, ask: Callable[[], msgspec.Struct]) -> web.Response:
        """``ask()`` on a thread, as JSON."""
        ...


class VerdictQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Under which budget."""

    profile: ProfileName = "default"


class FeedbackQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Under which budget, and over how much."""

    profile: ProfileName = "default"
    limit: Annotated[
        int, msgspec.Meta(ge=1, le=MAX_FEEDBACK, description="newest trajectories")
    ] = 200


class ExplainQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which scores."""

    trainer: Annotated[str, msgspec.Meta(description="only this trainer's digest")] | None = None


async def get_explanation(api: Asker, request: web.Request) -> web.StreamResponse:
    """Why do trainer and engine differ on this trajectory, and where does the drift sit?

    Causes with their shares of mean|D|, which add to 1, each with its evidence and what to do.
    """
    name, query = request.match_info["trajectory"], query_of(request, ExplainQuery)
    return await api.answer(
        lambda: Explanations(api.reader).trajectory(name, trainer=query.trainer)
    )


async def get_verdict(api: Asker, request: web.Request) -> web.StreamResponse:
    """May this trajectory, and its prompt group, be trained on, and if not, why not?

    One verdict for each engine that sampled it and trainer that scored it; null with the reason
    while it is not scored in full.
    """
    name, query = request.match_info["trajectory"], query_of(request, VerdictQuery)
    return await api.answer(lambda: Verdicts(api.reader).trajectory(name, query.profile))


async def get_feedback(api: Asker, request: web.Request) -> web.StreamResponse:
    """Verdicts on the newest trajectories, rolled up by engine and weight version."""
    query = query_of(request, FeedbackQuery)
    return await api.answer(lambda: Verdicts(api.reader).feedback(query.profile, query.limit))


ROUTES: tuple[Route, ...] = (
    Route(
        method="GET",
        path="/api/trajectories/{trajectory}/explain",
        handler=get_explanation,
        query=ExplainQuery,
        answer=TrajectoryExplanation,
    ),
    Route(
        method="GET",
        path="/api/trajectories/{trajectory}/verdict",
        handler=get_verdict,
        query=VerdictQuery,
        answer=TrajectoryVerdicts,
    ),
    Route(
        method="GET",
        path="/api/feedback",
        handler=get_feedback,
        query=FeedbackQuery,
        answer=Feedback,
    ),
)

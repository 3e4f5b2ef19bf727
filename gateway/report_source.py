"""Where a report's answers come from: a store on this machine, or a gateway through its client."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Literal, Protocol

from driftgate.explain import TrajectoryExplanation
from driftgate.gateway.answers import Answers
from driftgate.gateway.api_live import POINTS, LiveAnswers
from driftgate.gateway.api_tree import read_tree
from driftgate.gateway.explanations import Explanations
from driftgate.gateway.loading import expert_load
from driftgate.gateway.pairing import CellName
from driftgate.gateway.verdicts import Verdicts
from driftgate.judgements import TrajectoryVerdicts
from driftgate.live_views import ExpertLoad, Overview, Series, StepRoutes
from driftgate.profiles import ProfileName
from driftgate.storage import Reader
from driftgate.tree import Tree
from driftgate.views import (
    Cells,
    DriftEvent,
    Kind,
    MismatchView,
    StepDetail,
    TrajectoryDetail,
    TrajectoryPage,
)

__all__ = ["Source", "StoreSource"]

EVENTS_PAGE = 500
"""Scores read at once."""


class Source(Protocol):
    """What a report asks. `driftgate.Client` is one as well, with the same names."""

    async def overview(self) -> Overview: ...
    async def cells(self) -> Cells: ...
    async def expert_load(self, cell: str) -> ExpertLoad: ...
    async def series(self, *, points: int | None = None) -> Series: ...
    async def trajectories(
        self, *, limit: int = 50, before: str | None = None, drift: bool = False
    ) -> TrajectoryPage: ...
    async def trajectory(self, trajectory: str) -> TrajectoryDetail: ...
    async def mismatch(self, trajectory: str) -> MismatchView: ...
    async def verdict(
        self, trajectory: str, *, profile: ProfileName = "default"
    ) -> TrajectoryVerdicts: ...
    async def explain(self, trajectory: str) -> TrajectoryExplanation: ...
    async def tree(self, trajectory: str) -> Tree: ...
    async def step(self, trajectory: str, step: int) -> StepDetail: ...
    async def step_routes(
        self, trajectory: str, step: int, *, choice: int = 0, token: int | None = None
    ) -> StepRoutes: ...
    def drift(
        self,
        *,
        after: int | Literal["now"] = "now",
        follow: bool = True,
        kind: Kind | None = None,
    ) -> AsyncGenerator[DriftEvent, None]: ...


class StoreSource:
    """A store read directly. It blocks: nothing else runs beside a report."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._answers = Answers(reader)
        self._live = LiveAnswers(reader, self._answers)

    async def overview(self) -> Overview:
        """As ``GET /api/overview``."""
        return self._live.overview()

    async def cells(self) -> Cells:
        """As ``GET /api/cells``."""
        return self._answers.cells()

    async def expert_load(self, cell: str) -> ExpertLoad:
        """As ``GET /api/cells/load``."""
        return expert_load(self._reader, CellName(*cell.split("/", 2)))

    async def series(self, *, points: int | None = None) -> Series:
        """As ``GET /api/series``."""
        return self._live.series(points or POINTS)

    async def trajectories(
        self, *, limit: int = 50, before: str | None = None, drift: bool = False
    ) -> TrajectoryPage:
        """As ``GET /api/trajectories``."""
        page = self._answers.trajectories(limit=limit, before=before)
        return self._live.with_drift(page) if drift else page

    async def trajectory(self, trajectory: str) -> TrajectoryDetail:
        """As ``GET /api/trajectories/{trajectory}``."""
        return self._answers.trajectory(trajectory)

    async def mismatch(self, trajectory: str) -> MismatchView:
        """As its ``/mismatch``."""
        return self._answers.mismatch(trajectory)

    async def verdict(
        self, trajectory: str, *, profile: ProfileName = "default"
    ) -> TrajectoryVerdicts:
        """As its ``/verdict``."""
        return Verdicts(self._reader).trajectory(trajectory, profile)

    async def explain(self, trajectory: str) -> TrajectoryExplanation:
        """As its ``/explain``."""
        return Explanations(self._reader).trajectory(trajectory)

    async def tree(self, trajectory: str) -> Tree:
        """As its ``/tree``."""
        return read_tree(self._reader, trajectory)

    async def step(self, trajectory: str, step: int) -> StepDetail:
        """As its ``/steps/{step}``."""
        return self._answers.step(trajectory, step)

    async def step_routes(
        self, trajectory: str, step: int, *, choice: int = 0, token: int | None = None
    ) -> StepRoutes:
        """As its ``/steps/{step}/routes``."""
        return self._live.routes(trajectory, step, choice, None, token)

    async def drift(
        self,
        *,
        after: int | Literal["now"] = "now",
        follow: bool = True,
        kind: Kind | None = None,
    ) -> AsyncGenerator[DriftEvent, None]:
        """As ``GET /api/drift`` without ``follow``: the scores there are."""
        assert after != "now"
        assert not follow, "a store alone tells nobody what comes"
        while True:
            events = self._answers.drift(after, EVENTS_PAGE, None, kind)
            if not events:
                return
            for event in events:
                yield event
            after = events[-1].cursor

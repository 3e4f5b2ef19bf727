"""A typed async client of driftgate's API.

It decodes into the structs that the gateway encodes (``driftgate.views``), and its ``drift``
follows the scores across lost connections: it goes on behind the last event it gave, so nothing is
lost or repeated. Answers of 400 and more become the errors of ``driftgate.errors``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from driftgate.engine_views import Engines, WeightsRequest
from driftgate.errors import (
    UNREADABLE,
    AccessError,
    DriftgateError,
    NotFoundError,
    RequestError,
    StorageError,
    UpstreamError,
)
from driftgate.explain import TrajectoryExplanation
from driftgate.judgements import Feedback, TrajectoryVerdicts
from driftgate.live_views import ExpertLoad, Overview, PairedCells, Series, StepRoutes
from driftgate.profiles import ProfileName
from driftgate.trace import Reward
from driftgate.tree import Tree
from driftgate.views import (
    ApiError,
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

__all__ = ["CURSOR_HEADER", "DEFAULT_URL", "Client"]

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8787"
"""Where ``driftgate serve`` listens unless told otherwise."""

CURSOR_HEADER = "x-driftgate-cursor"
"""Answer header of ``/api/drift``: the cursor that the stream started behind."""

REQUEST_TIMEOUT_S = 60.0
"""A step with long contexts and routes is tens of MB; a gateway that takes longer is not well."""

MAX_PORT = 65535

SILENCE_S = 45.0
"""Three of the stream's heartbeats: after that the connection is taken for dead."""

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 5.0
"""Waits between reconnects, doubling: quick for a hiccup, gentle with a gateway that restarts."""

ERRORS: dict[int, type[DriftgateError]] = {
    400: RequestError,
    401: AccessError,
    403: AccessError,
    404: NotFoundError,
    502: UpstreamError,
    503: StorageError,
}


class Client:
    """One gateway's API. Use it as ``async with Client(url) as client:``.

    RequestError where ``url`` or ``key`` can be none. ``key`` is sent as bearer token where the
    gateway asks for one; ``transport`` is httpx's, for tests.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        key: str | None = None,
        timeout_s: float = REQUEST_TIMEOUT_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if key and not key.isascii():
            raise RequestError("the key is none of driftgate's: it has a character beyond ASCII")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.url = url.rstrip("/")
        try:
            self._http = httpx.AsyncClient(
                base_url=self.url, headers=headers, timeout=timeout_s, transport=transport
            )
        except httpx.InvalidURL as error:
            raise RequestError(f"{url!r} is not an address like {DEFAULT_URL}: {error}") from error
        if (self._http.base_url.port or 0) > MAX_PORT:
            raise RequestError(
                f"{url!r} is not an address like {DEFAULT_URL}: ports end at {MAX_PORT}"
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; the client cannot be used after it."""
        await self._http.aclose()

    async def trajectories(
        self,
        *,
        limit: int = 50,
        before: str | None = None,
        model: str | None = None,
        complete: bool | None = None,
        scored: bool | None = None,
        drift: bool = False,
    ) -> TrajectoryPage:
        """A page of trajectories, newest first; ``before`` is the ``next`` of the page before;
        ``drift``: each with its own."""
        wanted: dict[str, str | bool | None] = {
            "model": model,
            "complete": complete,
            "scored": scored,
            "drift": drift or None,
        }
        query = _query(limit=limit, before=before, **wanted)
        return await self._get("/api/trajectories", TrajectoryPage, query)

    async def trajectory(self, trajectory: str) -> TrajectoryDetail:
        """One agent run with its steps. NotFoundError where there is none of that name."""
        return await self._get(f"/api/trajectories/{_segment(trajectory)}", TrajectoryDetail)

    async def step(self, trajectory: str, step: int, *, routes: bool = False) -> StepDetail:
        """One step's answers in full, token by token; the route arrays only with ``routes``."""
        path = f"/api/trajectories/{_segment(trajectory)}/steps/{step}"
        return await self._get(path, StepDetail, _query(routes=routes or None))

    async def mismatch(
        self, trajectory: str, *, tokens: bool = False, trainer: str | None = None
    ) -> MismatchView:
        """Where trainer and engine differ on one trajectory; ``trainer``: only of this digest."""
        path = f"/api/trajectories/{_segment(trajectory)}/mismatch"
        return await self._get(path, MismatchView, _query(tokens=tokens or None, trainer=trainer))

    async def tree(self, trajectory: str) -> Tree:
        """Which call of it continues which, by exact tokens, and why prefixes broke."""
        return await self._get(f"/api/trajectories/{_segment(trajectory)}/tree", Tree)

    async def cells(self) -> Cells:
        """The matrix: every (engine, trainer) with its metrics, intervals and noise floor."""
        return await self._get("/api/cells", Cells)

    async def pair(self, a: str, b: str) -> PairedCells:
        """Two cells on the prompts that both were given; each as ``ENGINE/TRAINER/MODEL``."""
        return await self._get("/api/cells/pair", PairedCells, _query(a=a, b=b))

    async def expert_load(self, cell: str) -> ExpertLoad:
        """How a cell's tokens are spread over experts; ``cell``: ``ENGINE/TRAINER/MODEL``."""
        return await self._get("/api/cells/load", ExpertLoad, _query(cell=cell))

    async def overview(self) -> Overview:
        """What is live now: rates, coverage, lag, alarms in words, the worst trajectories."""
        return await self._get("/api/overview", Overview)

    async def series(self, *, points: int | None = None) -> Series:
        """Drift over time, per cell, in at most ``points`` slots."""
        return await self._get("/api/series", Series, _query(points=points))

    async def step_routes(
        self, trajectory: str, step: int, *, choice: int = 0, token: int | None = None
    ) -> StepRoutes:
        """Experts that the trainer missed, token by token; ``token``: with its experts."""
        path = f"/api/trajectories/{_segment(trajectory)}/steps/{step}/routes"
        return await self._get(path, StepRoutes, _query(choice=choice, token=token))

    async def explain(
        self, trajectory: str, *, trainer: str | None = None
    ) -> TrajectoryExplanation:
        """Why trainer and engine differ on it, by cause; ``trainer``: only of this digest."""
        path = f"/api/trajectories/{_segment(trajectory)}/explain"
        return await self._get(path, TrajectoryExplanation, _query(trainer=trainer))

    async def verdict(
        self, trajectory: str, *, profile: ProfileName = "default"
    ) -> TrajectoryVerdicts:
        """May it be trained on under this budget, and if not, why not; with its prompt group."""
        path = f"/api/trajectories/{_segment(trajectory)}/verdict"
        return await self._get(path, TrajectoryVerdicts, _query(profile=profile))

    async def feedback(self, *, profile: ProfileName = "default", limit: int = 200) -> Feedback:
        """Verdicts on the newest ``limit`` trajectories by engine and weight version."""
        return await self._get("/api/feedback", Feedback, _query(profile=profile, limit=limit))

    async def mint(self, trajectory: str | None = None) -> Minted:
        """A trajectory to run an agent in, named by you or by the gateway."""
        return await self._post("/api/trajectories", MintRequest(trajectory=trajectory), Minted)

    async def reward(self, trajectory: str, value: float, *, source: str = "") -> Reward:
        """Give a trajectory its reward; on disk when this returns."""
        path = f"/api/trajectories/{_segment(trajectory)}/reward"
        return await self._post(path, RewardRequest(value=value, source=source), Reward)

    async def engines(self) -> Engines:
        """The engines behind the gateway: up, paused, under which weights, with how many calls."""
        return await self._get("/api/weights", Engines)

    async def tell_weights(
        self,
        version: str | None = None,
        *,
        upstream: str | None = None,
        from_ns: int | None = None,
        pause: bool = False,
        resume: bool = False,
        reason: str = "new weights",
    ) -> Engines:
        """Tell under which weights the engines sample, or pause and resume them; the engines then.

        See `driftgate.engine_views.WeightsRequest`.
        """
        said = WeightsRequest(
            version=version,
            upstream=upstream,
            from_ns=from_ns,
            pause=pause,
            resume=resume,
            reason=reason,
        )
        return await self._post("/api/weights", said, Engines)

    async def drift(
        self,
        *,
        after: int | Literal["now"] = "now",
        follow: bool = True,
        trajectory: str | None = None,
        kind: Kind | None = None,
        give_up_s: float = 60.0,
        reached: Callable[[bool], None] = lambda _: None,
    ) -> AsyncGenerator[DriftEvent, None]:
        """Scores in order of their cursor, each exactly once, also across reconnects.

        Without ``follow`` it ends with the last score there is. With it, a first connection that
        fails raises at once; a later one is tried again for ``give_up_s``. ``reached`` is told each
        time whether the gateway answers. DriftgateError where
        something else answers at the address. Leave it early with
        ``contextlib.aclosing`` around it, so that the connection is closed there and then.
        """
        cursor: int | str = after
        connected = False
        lost_since: float | None = None
        wait_s = FIRST_RETRY_S
        while True:
            query = _query(after=cursor, follow=follow or None, trajectory=trajectory, kind=kind)
            try:
                async with self._http.stream(
                    "GET", "/api/drift", params=query, timeout=_stream_timeout()
                ) as response:
                    await _raise_for_status(response)
                    cursor = max(_as_int(cursor), self._cursor_of(response))
                    connected, lost_since, wait_s = True, None, FIRST_RETRY_S
                    reached(True)
                    async for line in _lines(response):
                        if line:  # an empty line is the heartbeat
                            event = self._decode(line, DriftEvent)
                            cursor = event.cursor
                            yield event
                if not follow:
                    return
            except (httpx.TransportError, UpstreamError, StorageError) as error:
                # 502 and 503 are what a gateway that restarts looks like through a proxy.
                lost_since = lost_since or time.monotonic()
                if not connected or time.monotonic() - lost_since > give_up_s:
                    if isinstance(error, DriftgateError):
                        raise
                    raise self._unreachable(error) from error
                reached(False)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LAST_RETRY_S)

    async def _get(self, path: str, kind: type[T], query: dict[str, str] | None = None) -> T:
        return await self._call("GET", path, kind, params=query or {})

    async def _post(self, path: str, body: msgspec.Struct, kind: type[T]) -> T:
        headers = {"content-type": "application/json"}
        return await self._call(
            "POST", path, kind, content=msgspec.json.encode(body), headers=headers
        )

    async def _call(self, method: str, path: str, kind: type[T], **options: Any) -> T:
        try:
            response = await self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        await _raise_for_status(response)
        return self._decode(response.content, kind)

    def _decode(self, raw: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(raw, type=kind)
        except UNREADABLE as error:
            raise DriftgateError(
                f"what answers at {self.url} is not this version of driftgate: {error}"
            ) from error

    def _cursor_of(self, response: httpx.Response) -> int:
        value = response.headers.get(CURSOR_HEADER, "")
        if not value.isascii() or not value.isdigit():
            raise DriftgateError(
                f"what answers at {self.url} is not driftgate: it sent no {CURSOR_HEADER}"
            )
        return int(value)

    def _unreachable(self, error: httpx.TransportError) -> DriftgateError:
        reason = str(error) or type(error).__name__
        return DriftgateError(
            f"no driftgate at {self.url}: {reason}; start `driftgate serve` or give its address"
        )


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Lines as JSON lines has them. httpx's own also end at U+2028 and its like, which JSON holds
    unescaped."""
    parts: list[bytes] = []
    async for chunk in response.aiter_bytes():
        *ended, rest = chunk.split(b"\n")
        for end in ended:
            yield b"".join([*parts, end])
            parts.clear()
        parts.append(rest)
    if last := b"".join(parts):
        yield last


def _segment(value: str) -> str:
    """One path segment: a trajectory's name may contain slashes."""
    return quote(value, safe="")


def _query(**values: str | int | bool | None) -> dict[str, str]:
    return {
        name: str(int(value)) if isinstance(value, bool) else str(value)
        for name, value in values.items()
        if value is not None
    }


def _as_int(cursor: int | str) -> int:
    return cursor if isinstance(cursor, int) else 0


def _stream_timeout() -> httpx.Timeout:
    return httpx.Timeout(REQUEST_TIMEOUT_S, read=SILENCE_S)


async def _raise_for_status(response: httpx.Response) -> None:
    if response.status_code < 400:
        return
    body = await response.aread()
    try:
        error = msgspec.json.decode(body, type=ApiError).error
        message = f"{error.message}; {error.fix}" if error.fix else error.message
    except UNREADABLE:
        message = f"HTTP {response.status_code}: {body[:200].decode(errors='replace')}"
    kind = ERRORS.get(response.status_code, DriftgateError)
    if kind is AccessError:
        raise AccessError(message, status=response.status_code)
    raise kind(message)

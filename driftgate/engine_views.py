"""What the API says of the engines behind the gateway, and what a trainer tells it of their
weights."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["EngineState", "Engines", "WeightsRequest"]

MAX_VERSION_CHARS = 200
"""A version stands in every trace."""


class EngineState(msgspec.Struct, frozen=True, kw_only=True):
    """One engine now."""

    upstream: str
    """Its base URL; ``POST /api/weights`` names it by this."""
    error: str | None
    """Why calls do not go there; null while they do."""
    engine: str | None
    """``vllm``, ``sglang`` or ``unknown``; null before the first probe."""
    version: str | None
    models: list[str]
    weight_version: str
    weights_from_ns: int
    """Wall clock, ns since the epoch; 0 where the version was configured."""
    weights_lost: str | None = None
    """Why the version that a trainer told counts no more, so that it is ``unknown``: the engine was
    away or is another one. Null while it counts."""
    paused: str | None
    """Why new calls are answered 429; null while they are not."""
    paused_ns: int | None = None
    """Since when, wall clock, ns since the epoch."""
    in_flight: int
    """Calls that are at the engine now, or were let in to it: while it is paused, wait for 0."""


class Engines(msgspec.Struct, frozen=True, kw_only=True):
    """Every engine behind the gateway, in the order of the configuration."""

    engines: list[EngineState]


class WeightsRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a trainer says of the engines' weights. Any of it; resuming comes after the version."""

    version: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_VERSION_CHARS)] | None = None
    """Tokens sampled from now on, or from ``from_ns``, are of this version."""
    upstream: str | None = None
    """Only of this engine; all of them where it is left out."""
    from_ns: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Wall clock, ns since the epoch, of the moment when the weights were in place."""
    pause: bool = False
    """New calls are answered 429 with Retry-After from now on; those under way go on."""
    resume: bool = False
    """New calls are served again."""
    reason: Annotated[str, msgspec.Meta(max_length=MAX_VERSION_CHARS)] = "new weights"
    """Why it is paused, for those who are answered 429."""

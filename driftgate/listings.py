"""What the API is asked with, how it refuses, and its list of trajectories.

Part of `driftgate.views`, which is where to import from.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = [
    "ApiError",
    "ErrorBody",
    "MintRequest",
    "Minted",
    "RewardRequest",
    "RunDrift",
    "TrajectoryPage",
    "TrajectoryRow",
]


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong (``code`` is stable, e.g. ``not_found``) and what to do about it."""

    code: str
    message: str
    fix: str


class ApiError(msgspec.Struct, frozen=True, kw_only=True):
    """Body of every answer with a status of 400 or more."""

    error: ErrorBody


class RunDrift(msgspec.Struct, frozen=True, kw_only=True):
    """How far a run's comparable answers drift, under the (engine, trainer) that is furthest
    apart: no number mixes two."""

    n_tokens: int
    abs_log_ratio_mean: float
    """nats"""
    abs_log_ratio_max: float
    """nats"""
    pairs: int
    """Pairs (engine, trainer) with comparable scores of this run."""


class TrajectoryRow(msgspec.Struct, frozen=True, kw_only=True):
    """One agent run, with its coverage."""

    trajectory: str
    steps: int
    choices: int
    """Traces that can exist: the captured ones and the missing ones."""
    complete: bool
    """Every call has all its traces and none of them misses anything; failed calls whose step a
    later call repeated do not count against it."""
    captured: int
    """Traces in the store."""
    scorable: int
    """Of those, the ones with prompt ids, response ids and logprobs."""
    scored: int
    """Of those, the ones with a drift score by at least one trainer."""
    missing: int
    """Traces that a call should have and has not."""
    open_calls: int
    """Calls with neither a trace nor an outcome."""
    failed_calls: int
    """Calls that ended without all their traces, repeated ones included."""
    models: list[str]
    started_ns: int
    """Wall clock, ns since the epoch."""
    ended_ns: int
    """Latest thing known of it: the end of a call, or the start of an open one."""
    reward: float | None
    gaps: list[str]
    """In words, each reason why it is not complete."""
    drift: RunDrift | None = None
    """Only in a list, where it is asked for: null where nothing comparable is scored, and in runs
    that are not among the 20,000 scored last."""


class TrajectoryPage(msgspec.Struct, frozen=True, kw_only=True):
    """A page of trajectories, newest first."""

    items: list[TrajectoryRow]
    next: str | None = None
    """Pass it as ``before`` to get the next page; null on the last one."""


class MintRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ask for a trajectory; an empty body is one too."""

    trajectory: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] | None = None
    """Name it yourself (no control characters, no space at either end), or leave it out and get a
    new id."""


class Minted(msgspec.Struct, frozen=True, kw_only=True):
    """A trajectory to run an agent in, by its base URL or by its API key: either is enough."""

    trajectory: str
    key: str
    """Sent as the agent's API key, it names the trajectory at the gateway's plain ``/v1``."""
    base_url: str
    """``…/t/{trajectory}/v1``: as base URL it names the trajectory whatever the key is."""


class RewardRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The reward of a trajectory; the last one given counts."""

    value: float
    source: str = ""  # who says so: a verifier's name, a person

"""What is recorded of a call besides its traces: that it began, and how it ended without an answer.
Pure but for the clock."""

from __future__ import annotations

import time
from typing import Literal

from driftgate.errors import StorageError
from driftgate.gateway.sessions import Call
from driftgate.trace import Api, CallIntent, CallOutcome

__all__ = ["intent_of", "outcome_of", "words_of"]

REASON_CHARS = 500
"""Of an error's text; an engine's error can hold a whole prompt."""


def intent_of(call: Call, api: Api, model: str, started_ns: int) -> CallIntent:
    """The call begins; ``api`` is the agent's."""
    return CallIntent(
        call_id=call.call_id,
        trajectory=call.place.trajectory,
        step=call.step,
        attribution=call.place.attribution,
        api=api,
        model=model,
        body_sha256=call.body_sha256,
        retry=call.retry,
        started_ns=started_ns,
    )


def outcome_of(
    call_id: str,
    status: Literal["failed", "cancelled", "capture_failed"],
    reason: str,
    http_status: int | None = None,
) -> CallOutcome:
    """The call ends now."""
    return CallOutcome(
        call_id=call_id,
        status=status,
        http_status=http_status,
        reason=reason[:REASON_CHARS],
        ended_ns=time.time_ns(),
    )


def words_of(error: BaseException) -> str:
    """An error of storage speaks for itself; any other needs its name."""
    return str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"

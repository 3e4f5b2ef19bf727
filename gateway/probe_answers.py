"""What the answers to a probe say. Pure.

A probe meets engines of all kinds: a field of another type than it should have reads as absent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from driftgate.errors import UNREADABLE
from driftgate.gateway import sse
from driftgate.trace import LogprobsMode

__all__ = [
    "COLD",
    "WARM",
    "choice_of",
    "chunks_of",
    "logprobs_mode",
    "prompt_ids_of",
    "top_of",
    "typed",
]

COLD, WARM = 0.25, 1.0
"""Two temperatures: logprobs after the temperature differ between them by this ratio, raw ones
not."""

MIN_GAP = 0.05
"""Nats between the two best tokens below which the ratio of their gaps says nothing."""

RATIO_TOLERANCE = 0.25

T = TypeVar("T")


class _Alternative(msgspec.Struct):
    token: str
    logprob: float


class _Row(msgspec.Struct):
    top_logprobs: list[_Alternative] | None = None


class _Rows(msgspec.Struct):
    content: list[_Row] | None = None


def typed(fields: Mapping[str, Any], name: str, type_: type[T]) -> T | None:
    """A field; None where it is not of its type."""
    value = fields.get(name)
    return value if isinstance(value, type_) else None


def choice_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The first choice; empty where there is none."""
    choices = typed(answer, "choices", list)
    first = choices[0] if choices else None
    return first if isinstance(first, dict) else {}


def prompt_ids_of(answer: Mapping[str, Any]) -> list[Any] | None:
    """Where either API puts them."""
    in_choice = typed(choice_of(answer), "prompt_token_ids", list)
    return typed(answer, "prompt_token_ids", list) or in_choice


def chunks_of(stream: bytes) -> tuple[list[dict[str, Any]], list[str]]:
    """A stream's events, and of each that cannot be read why."""
    chunks, unread = list[dict[str, Any]](), list[str]()
    for event in sse.Splitter().feed(stream):
        data = sse.event_data(event)
        if data is None or data == sse.DONE:
            continue
        try:
            chunks.append(msgspec.json.decode(data, type=dict[str, Any]))
        except UNREADABLE as error:
            unread.append(str(error))
    return chunks, unread


def top_of(answer: Mapping[str, Any]) -> dict[str, float]:
    """The best tokens' logprobs [nats] at the first position, by token; empty where they are not
    as they should be."""
    try:
        rows = msgspec.convert(choice_of(answer).get("logprobs"), _Rows)
    except msgspec.ValidationError:
        return {}
    tops = rows.content[0].top_logprobs if rows.content else None
    return {top.token: top.logprob for top in tops or ()}


def logprobs_mode(warm: Mapping[str, float], cold: Mapping[str, float]) -> LogprobsMode:
    """The mode, from the two best tokens' values at ``WARM`` and ``COLD``; ``unknown`` if unclear.

    The gap between two tokens is the same at both temperatures where values are taken before the
    temperature, and ``WARM / COLD`` times as large where they are taken after it.
    """
    both = sorted(warm.keys() & cold.keys(), key=lambda token: -warm[token])
    if len(both) < 2:
        return "unknown"
    first, second = both[:2]
    gap = warm[first] - warm[second]
    if gap < MIN_GAP:
        return "unknown"
    ratio = (cold[first] - cold[second]) / gap
    # Log-probabilities are below 0 and their probabilities do not add up to more than 1.
    logits = sum(math.exp(min(value, 50.0)) for value in warm.values()) > 1.001
    if abs(ratio - 1) < RATIO_TOLERANCE:
        return "raw_logits" if logits else "raw_logprobs"
    if abs(ratio - WARM / COLD) < RATIO_TOLERANCE * WARM / COLD:
        return "processed_logits" if logits else "processed_logprobs"
    return "unknown"

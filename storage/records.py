"""What a store holds, as payloads and back: traces, scores, call intents and outcomes, rewards.
Pure.

Refuses values that would not come back as they are: arrays of other dtypes than the schema's, and
non-finite numbers in JSON (JSON has none, and they would silently become null). Arrays may hold
NaN.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import Annotated, TypeAlias, TypeVar, cast

import msgspec
import numpy as np

from driftgate.errors import UNREADABLE, FormatError
from driftgate.storage.codec import Array, Payload, dtype_name, pack_payload
from driftgate.storage.delta import StoredTrace, TraceHead
from driftgate.trace import (
    F32,
    I32,
    CallIntent,
    CallOutcome,
    Reward,
    Routes,
    Score,
    ScoreMeta,
    Trace,
)

__all__ = [
    "Kind",
    "Record",
    "ScoreHead",
    "Small",
    "decode_score",
    "decode_small",
    "decode_trace",
    "encode_score",
    "encode_small",
    "encode_trace",
    "head_of",
    "prompt_key",
    "twin_key",
]

Small: TypeAlias = CallIntent | CallOutcome | Reward
Record: TypeAlias = Trace | Score | CallIntent | CallOutcome | Reward
"""What ``Writer.submit`` takes."""

T = TypeVar("T")


class Kind(IntEnum):
    """Record kinds of FORMAT.md."""

    TRACE = 1
    SCORE = 2
    INTENT = 3
    OUTCOME = 4
    REWARD = 5


_SMALL: dict[type[Small], Kind] = {
    CallIntent: Kind.INTENT,
    CallOutcome: Kind.OUTCOME,
    Reward: Kind.REWARD,
}
_SMALL_TYPES: dict[int, type[Small]] = {kind: type_ for type_, kind in _SMALL.items()}


class ScoreHead(msgspec.Struct, frozen=True, kw_only=True):
    """JSON part of a score record."""

    meta: ScoreMeta
    seq: Annotated[int, msgspec.Meta(ge=1, lt=1 << 62)]


def twin_key(trace: Trace) -> str | None:
    """Equal for two samples that a deterministic engine must answer alike; None without a seed.

    16 hex digits over prompt ids, sampling parameters (with the seed), choice and model.
    """
    if trace.meta.sampling.seed is None or trace.prompt_ids is None:
        return None
    meta = trace.meta
    asked = msgspec.json.encode([meta.sampling, meta.choice, meta.model, meta.api], order="sorted")
    ids = np.ascontiguousarray(trace.prompt_ids, "<i4").tobytes()
    return hashlib.sha256(asked + b"\0" + ids).hexdigest()[:16]


def prompt_key(trace: Trace) -> str | None:
    """Equal for two runs of one model that begin with the same prompt; None past the first step.

    16 hex digits over prompt ids and model.
    """
    if trace.meta.step or trace.prompt_ids is None:
        return None
    ids = np.ascontiguousarray(trace.prompt_ids, "<i4").tobytes()
    return hashlib.sha256(trace.meta.model.encode() + b"\0" + ids).hexdigest()[:16]


def encode_trace(stored: StoredTrace) -> bytes:
    """Payload of a trace record. ValueError for an array or number not as the schema says."""
    _expect("ids", stored.ids, "int32", 1)
    _expect("logprobs", stored.logprobs, "float32", 1)
    _expect("token_offsets", stored.token_offsets, "int32", 1)
    _expect_routes(stored.routes)
    return pack_payload(
        _json(stored.head),
        {
            "ids": stored.ids,
            "logprobs": stored.logprobs,
            "routes": stored.routes,
            "patch_gaps": stored.patch_gaps,
            "patch_cells": stored.patch_cells,
            "token_bytes": stored.token_bytes,
            "token_offsets": stored.token_offsets,
            "request": stored.request,
            "response": stored.response,
        },
    )


def decode_trace(payload: Payload) -> StoredTrace:
    """Inverse of ``encode_trace``."""
    columns = payload.columns
    return StoredTrace(
        head=head_of(payload, TraceHead),
        ids=cast(I32, _typed(payload.required("ids"), "int32", 1)),
        logprobs=cast("F32 | None", _typed(columns.get("logprobs"), "float32", 1)),
        routes=_routes(columns.get("routes"), 3),
        patch_gaps=cast("I32 | None", _typed(columns.get("patch_gaps"), "int32", 1)),
        patch_cells=_routes(columns.get("patch_cells"), 2),
        token_bytes=payload.bytes_of("token_bytes"),
        token_offsets=cast("I32 | None", _typed(columns.get("token_offsets"), "int32", 1)),
        request=payload.bytes_of("request"),
        response=payload.bytes_of("response"),
    )


def encode_score(score: Score, *, seq: int) -> bytes:
    """Payload of a score record. ValueError for an array or number not as the schema says."""
    _expect("logprobs", score.logprobs, "float32", 1)
    _expect("entropy", score.entropy, "float32", 1)
    _expect("logprobs_at_temperature", score.logprobs_at_temperature, "float32", 1)
    _expect("logprobs_replay", score.logprobs_replay, "float32", 1)
    _expect_routes(score.routes)
    return pack_payload(
        _json(ScoreHead(meta=score.meta, seq=seq)),
        {
            "logprobs": score.logprobs,
            "entropy": score.entropy,
            "logprobs_at_temperature": score.logprobs_at_temperature,
            "logprobs_replay": score.logprobs_replay,
            "routes": score.routes,
        },
    )


def decode_score(payload: Payload) -> tuple[int, Score]:
    """``(seq, score)``."""
    head = head_of(payload, ScoreHead)
    at_temperature = payload.columns.get("logprobs_at_temperature")
    replay = payload.columns.get("logprobs_replay")
    return head.seq, Score(
        meta=head.meta,
        logprobs=cast(F32, _typed(payload.required("logprobs"), "float32", 1)),
        entropy=cast(F32, _typed(payload.required("entropy"), "float32", 1)),
        logprobs_at_temperature=cast("F32 | None", _typed(at_temperature, "float32", 1)),
        logprobs_replay=cast("F32 | None", _typed(replay, "float32", 1)),
        routes=_routes(payload.columns.get("routes"), 3),
    )


def encode_small(record: Small) -> tuple[Kind, bytes]:
    """Kind and payload of a record that is only JSON."""
    return _SMALL[type(record)], pack_payload(_json(record), {})


def decode_small(kind: int, payload: Payload) -> Small:
    """Inverse of ``encode_small``."""
    type_ = _SMALL_TYPES.get(kind)
    if type_ is None:
        raise FormatError(f"unknown record kind {kind}")
    return head_of(payload, type_)


def head_of(payload: Payload, type_: type[T]) -> T:
    """The JSON part, typed; FormatError where it does not fit the schema."""
    try:
        return msgspec.json.decode(payload.head, type=type_)
    except UNREADABLE as error:
        raise FormatError(f"{type_.__name__}: {error}") from error


def _json(value: msgspec.Struct) -> bytes:
    """JSON of ``value``; ValueError where it would not decode again (a NaN becomes null, which only
    optional fields take)."""
    encoded = msgspec.json.encode(value)
    try:
        msgspec.json.decode(encoded, type=type(value))
    except UNREADABLE as error:
        raise ValueError(
            f"{type(value).__name__} holds a value that JSON cannot carry: {error}"
        ) from error
    return encoded


def _expect(name: str, array: Array | None, dtype: str, ndim: int) -> None:
    if array is not None and (dtype_name(array.dtype) != dtype or array.ndim != ndim):
        raise ValueError(
            f"{name} is {array.dtype.name}{list(array.shape)}; it must be {dtype} with {ndim} axis"
        )


def _expect_routes(routes: Array | None) -> None:
    if routes is not None and (routes.dtype.name not in ("uint8", "uint16") or routes.ndim != 3):
        raise ValueError(
            f"routes are {routes.dtype.name}{list(routes.shape)}; "
            "they must be uint8 or uint16 [rows, L, K]"
        )


def _typed(column: Array | None, dtype: str, ndim: int) -> Array | None:
    if column is not None and (column.dtype.name != dtype or column.ndim != ndim):
        raise FormatError(
            f"column is {column.dtype.name}{list(column.shape)}, not {dtype} x {ndim}"
        )
    return column


def _routes(column: Array | None, ndim: int) -> Routes | None:
    if column is not None and (column.dtype.name not in ("uint8", "uint16") or column.ndim != ndim):
        raise FormatError(f"routes are {column.dtype.name}{list(column.shape)}")
    return cast("Routes | None", column)

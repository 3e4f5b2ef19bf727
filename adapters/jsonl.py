"""State, action, reward as JSON lines: a trace and its drift scores, in one row.

Nothing is truncated, and a row leads back to its trace (``trace_of``): ids, log-probabilities and
routes bit for bit, bodies as JSON (``driftgate.bodies``). JSON has no NaN: such a number is
``null``, and ``non_finite`` says where and what it was. Rows come in a fixed order: trajectories as
they began, then step, choice, retry.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from driftgate.adapters.export_select import trajectories
from driftgate.bodies import body_of, json_of
from driftgate.errors import NotFoundError, StorageError
from driftgate.storage import Reader
from driftgate.trace import (
    F32,
    SCHEMA_VERSION,
    Comparable,
    Engine,
    Routes,
    ScoreMeta,
    Trace,
    TraceMeta,
    Trainer,
)

__all__ = ["Row", "rows", "trace_of"]

I32 = npt.NDArray[np.int32]


class NonFinite(msgspec.Struct, frozen=True):
    """A number that JSON cannot hold: ``null`` stands in its place."""

    column: str
    index: int
    value: Literal["nan", "inf", "-inf"]


class Array(msgspec.Struct, frozen=True):
    """Expert ids as a ``.npy`` file (no pickle) in base64."""

    dtype: str
    shape: list[int]
    npy_base64: str


class State(msgspec.Struct, frozen=True):
    """What the model saw."""

    request: msgspec.Raw
    """The agent's request body: messages, tools, sampling parameters; a string where it was none
    of strict JSON."""
    prompt_ids: list[int] | None
    """[P]"""


class Action(msgspec.Struct, frozen=True):
    """What the model did."""

    response: msgspec.Raw
    """The choice as the agent got it."""
    response_ids: list[int] | None
    """[R]"""
    logprobs: list[float | None] | None
    """[R] nats, as the engine reported them."""
    token_texts: list[str] | None
    """[R]; U+FFFD where a token is part of a character."""
    token_bytes: str
    """All tokens' bytes, joined, in base64."""
    token_offsets: list[int] | None
    """[R + 1] into ``token_bytes``."""


class Scored(msgspec.Struct, frozen=True):
    """One trainer's numbers."""

    engine_digest: str
    trainer_digest: str
    trainer: Engine | Trainer
    comparable: Comparable
    temperature: float
    logprobs: list[float | None]
    """[R] nats at T = 1."""
    entropy: list[float | None]
    logprobs_at_temperature: list[float | None] | None
    logprobs_replay: list[float | None] | None
    """[R] nats at ``temperature``, under the rollout's routes."""
    replay_coverage: float | None
    weight_version: str
    trainer_weight_version: str | None
    routes: Array | None
    """[R, L, K]"""
    non_finite: list[NonFinite]


class Row(msgspec.Struct, frozen=True):
    """One trace."""

    schema_version: int
    trajectory: str
    step: int
    choice: int
    trace_id: str
    model: str
    state: State
    action: Action
    routes: Array | None
    """[P + R - 1, L, K]"""
    reward: float | None
    """Of the whole trajectory; null where none was given."""
    scores: list[Scored]
    status: str
    missing: list[str]
    delivery: str
    non_finite: list[NonFinite]
    meta: TraceMeta


def rows(
    reader: Reader, trajectory: str | None = None, *, damaged: list[str] | None = None
) -> Iterator[Row]:
    """Every trace of the store, or of one trajectory. NotFoundError where that does not exist.

    A trace or a score that cannot be read is named in ``damaged`` and left out; StorageError
    without that list.
    """
    if trajectory is not None:
        reader.trajectory(trajectory)
    for name in [trajectory] if trajectory is not None else trajectories(reader):
        reward = reader.reward(name)
        scored = _scored_by(reader, name)
        traces = sorted(
            reader.traces(name),
            key=lambda row: (row.meta.step, row.meta.choice, row.meta.retry, row.meta.trace_id),
        )
        for row in traces:
            trace_id = row.meta.trace_id
            trace, scores = None, list[Scored]()
            with _naming(f"trace {trace_id}", damaged):
                trace = reader.trace(trace_id)
            for meta in scored.get(trace_id, []) if trace is not None else ():
                with _naming(f"score of {trace_id} by {meta.trainer.digest}", damaged):
                    scores.append(_scored(reader, meta))
            if trace is not None:
                yield _row(trace, reward=None if reward is None else reward.value, scores=scores)


@contextmanager
def _naming(what: str, damaged: list[str] | None) -> Iterator[None]:
    """Puts what cannot be read into ``damaged``; raises it where there is no such list."""
    try:
        yield
    except (StorageError, NotFoundError) as error:
        if damaged is None:
            raise
        damaged.append(f"{what}: {error}")


def trace_of(row: Row) -> Trace:
    """The trace that ``row`` was written from; bodies come back as compact JSON."""
    action = row.action
    return Trace(
        meta=row.meta,
        prompt_ids=_int32(row.state.prompt_ids),
        response_ids=_int32(action.response_ids),
        logprobs=_float32(action.logprobs, "logprobs", row.non_finite),
        routes=_array(row.routes),
        token_bytes=base64.b64decode(action.token_bytes),
        token_offsets=_int32(action.token_offsets),
        request=body_of(row.state.request),
        response=body_of(action.response),
    )


def _scored_by(reader: Reader, trajectory: str) -> dict[str, list[ScoreMeta]]:
    """Drift scores by trace, in order of the trainers' digests."""
    found: dict[str, list[ScoreMeta]] = {}
    after = 0
    while page := reader.scores(trajectory, after=after, kind="drift"):
        for row in page:
            found.setdefault(row.meta.trace_id, []).append(row.meta)
        after = page[-1].seq
    for metas in found.values():
        metas.sort(key=lambda meta: (meta.trainer.digest, meta.engine.digest))
    return found


def _row(trace: Trace, *, reward: float | None, scores: list[Scored]) -> Row:
    meta = trace.meta
    non_finite: list[NonFinite] = []
    return Row(
        schema_version=SCHEMA_VERSION,
        trajectory=meta.trajectory,
        step=meta.step,
        choice=meta.choice,
        trace_id=meta.trace_id,
        model=meta.model,
        state=State(json_of(trace.request), _ids(trace.prompt_ids)),
        action=Action(
            response=json_of(trace.response),
            response_ids=_ids(trace.response_ids),
            logprobs=_floats(trace.logprobs, "logprobs", non_finite),
            token_texts=_texts(trace),
            token_bytes=base64.b64encode(trace.token_bytes).decode(),
            token_offsets=_ids(trace.token_offsets),
        ),
        routes=_npy(trace.routes),
        reward=reward if reward is None or math.isfinite(reward) else None,
        scores=scores,
        status=meta.status,
        missing=meta.missing,
        delivery=meta.delivery,
        non_finite=non_finite,
        meta=meta,
    )


def _scored(reader: Reader, meta: ScoreMeta) -> Scored:
    score = reader.score(meta.trace_id, meta.trainer.digest)
    bad: list[NonFinite] = []
    logprobs = _floats(score.logprobs, "logprobs", bad)
    entropy = _floats(score.entropy, "entropy", bad)
    assert logprobs is not None
    assert entropy is not None
    return Scored(
        engine_digest=meta.engine.digest,
        trainer_digest=meta.trainer.digest,
        trainer=meta.trainer,
        comparable=meta.comparable,
        temperature=meta.temperature,
        logprobs=logprobs,
        entropy=entropy,
        logprobs_at_temperature=_floats(
            score.logprobs_at_temperature, "logprobs_at_temperature", bad
        ),
        logprobs_replay=_floats(score.logprobs_replay, "logprobs_replay", bad),
        replay_coverage=meta.replay_coverage,
        weight_version=meta.weight_version,
        trainer_weight_version=meta.trainer_weight_version,
        routes=_npy(score.routes),
        non_finite=bad,
    )


def _ids(array: I32 | None) -> list[int] | None:
    return None if array is None else array.tolist()


def _int32(values: list[int] | None) -> I32 | None:
    return None if values is None else np.asarray(values, np.int32)


def _floats(array: F32 | None, column: str, bad: list[NonFinite]) -> list[float | None] | None:
    if array is None:
        return None
    values: list[Any] = array.tolist()
    for index in np.flatnonzero(~np.isfinite(array)).tolist():
        bad.append(NonFinite(column, index, str(values[index])))  # type: ignore[arg-type]
        values[index] = None
    return values


def _float32(values: list[float | None] | None, column: str, bad: list[NonFinite]) -> F32 | None:
    if values is None:
        return None
    array = np.asarray([0.0 if value is None else value for value in values], np.float32)
    for entry in bad:
        if entry.column == column:
            array[entry.index] = float(entry.value)
    return array


def _texts(trace: Trace) -> list[str] | None:
    if trace.token_offsets is None:
        return None
    offsets = trace.token_offsets.tolist()
    return [
        trace.token_bytes[start:end].decode(errors="replace") for start, end in pairwise(offsets)
    ]


def _npy(array: Routes | None) -> Array | None:
    if array is None:
        return None
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return Array(array.dtype.name, list(array.shape), encoded)


def _array(stored: Array | None) -> Routes | None:
    if stored is None:
        return None
    routes: Routes = np.load(io.BytesIO(base64.b64decode(stored.npy_base64)), allow_pickle=False)
    return routes

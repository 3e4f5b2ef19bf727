"""Writes ``format-v1.dgs``: one segment with every kind of record and every column of format
version 1.

Run once per format version, never again for a released one: ``python
tests/golden/make_format_v1.py``. ``tests/storage/test_format.py`` spells out what must be read from
it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from driftgate.mismatch import Bucket, worst
from driftgate.storage.codec import pack_record
from driftgate.storage.delta import diff
from driftgate.storage.records import Kind, encode_score, encode_small, encode_trace, twin_key
from driftgate.storage.segments import header_bytes
from driftgate.trace import (
    CallIntent,
    CallOutcome,
    Comparable,
    Engine,
    Reward,
    Sampling,
    Score,
    ScoreMeta,
    Trace,
    TraceMeta,
    Trainer,
)

ENGINE = Engine(name="vllm", version="0.29.0", model="m", logprobs_mode="raw_logprobs")
TRAINER = Trainer(backend="reference", model="m", dtype="float32")


def meta(step: int, **other: object) -> TraceMeta:
    """Metadata of step ``step`` of trajectory ``t``."""
    fields: dict[str, object] = {
        "trace_id": f"c{step}.0",
        "call_id": f"c{step}",
        "trajectory": "t",
        "step": step,
        "choice": 0,
        "api": "chat",
        "model": "m",
        "attribution": "url",
        "engine": ENGINE,
        "sampling": Sampling(temperature=1.0, seed=7),
        "streamed": False,
        "started_ns": 1000 + step,
        "ended_ns": 2000 + step,
    }
    return TraceMeta(**(fields | other))  # type: ignore[arg-type]


def traces() -> tuple[Trace, Trace, Trace]:
    """A full record, one built on it with a changed cell, and a dense one without ids."""
    first = Trace(
        meta=meta(0, routes_via="json"),
        prompt_ids=np.array([5, 6, 7, 8], np.int32),
        response_ids=np.array([9, 10, 11], np.int32),
        logprobs=np.array([-0.5, np.nan, -np.inf], np.float32),
        routes=np.arange(6 * 2 * 2, dtype=np.uint16).reshape(6, 2, 2) + 250,
        token_bytes="aé!".encode(),
        token_offsets=np.array([0, 1, 3, 4], np.int32),
        request=b'{"messages":["one"],"temperature":1.50}',
        response=b'{"index":0}',
    )
    assert first.routes is not None
    routes = np.concatenate([first.routes, np.full((3, 2, 2), 9, np.uint16)])
    routes[4, 1] = [1, 2]
    second = replace(
        first,
        meta=meta(1, routes_via="json", parent="c0.0", prefix_len=7, prefix_exact=True),
        prompt_ids=np.array([5, 6, 7, 8, 9, 10, 11, 12], np.int32),
        response_ids=np.array([13, 14], np.int32),
        logprobs=np.array([-1.0, -2.0], np.float32),
        routes=routes.astype(np.uint16),
        token_bytes=b"xy",
        token_offsets=np.array([0, 1, 2], np.int32),
        request=b'{"messages":["one","two"],"temperature":1.50}',
    )
    third = replace(
        first,
        meta=meta(2, status="partial", missing=["token_ids: off"], sampling=Sampling()),
        prompt_ids=None,
        response_ids=None,
        logprobs=None,
        routes=None,
        token_bytes=b"",
        token_offsets=None,
    )
    return first, second, third


def score(trace: Trace) -> Score:
    """The trainer's numbers for the second trace."""
    assert trace.logprobs is not None
    assert trace.response_ids is not None
    train = np.array([-1.25, -2.0], np.float32)
    return Score(
        meta=ScoreMeta(
            trace_id=trace.meta.trace_id,
            trajectory="t",
            step=1,
            choice=0,
            model="m",
            engine=ENGINE,
            trainer=TRAINER,
            bucket=Bucket.of(train, trace.logprobs),
            comparable=Comparable(verdict="yes"),
            worst=worst(train, trace.logprobs, trace.response_ids, trace_id=trace.meta.trace_id),
            scored_ns=3000,
        ),
        logprobs=train,
        entropy=np.array([0.5, 0.25], np.float32),
        logprobs_at_temperature=np.array([-1.5, -2.5], np.float32),
        routes=np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]], np.uint8),
    )


def main() -> None:
    """Write the file beside this one."""
    first, second, third = traces()
    intent = CallIntent(
        call_id="c0",
        trajectory="t",
        step=0,
        attribution="url",
        api="chat",
        model="m",
        body_sha256="0123456789abcdef",
        started_ns=1000,
    )
    outcome = CallOutcome(call_id="c9", status="failed", http_status=500, reason="r", ended_ns=1)
    reward = Reward(trajectory="t", value=0.5, source="user", given_ns=4000)
    stored = [
        diff(first, None, twin_key=twin_key(first)),
        diff(second, first, twin_key=twin_key(second)),
        diff(third, None, twin_key=twin_key(third)),
    ]
    assert msgspec.structs.asdict(stored[1].head)["delta"] is not None
    payloads = [
        encode_small(intent),
        *((Kind.TRACE, encode_trace(trace)) for trace in stored),
        (Kind.SCORE, encode_score(score(second), seq=1)),
        encode_small(outcome),
        encode_small(reward),
    ]
    records = [pack_record(k, payload, time_ns=n) for n, (k, payload) in enumerate(payloads)]
    path = Path(__file__).with_name("format-v1.dgs")
    path.write_bytes(header_bytes("golden", 1_750_000_000_000_000_000) + b"".join(records))


if __name__ == "__main__":
    main()

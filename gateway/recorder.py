"""Brings calls into storage: an intent before the engine is asked, traces or an outcome after.

Capture failing never fails a call unless the user said so (``on_capture_failure``), and it is never
silent: each record that storage refuses or cannot write is counted, logged with its call's id, and
its call's outcome is tried again when storage takes records again."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

from driftgate.errors import DriftgateError, StorageError
from driftgate.gateway.capture import Folded, Sample
from driftgate.gateway.lineage import ROOT, Lineage
from driftgate.gateway.metrics import Metrics
from driftgate.gateway.openai import Plan
from driftgate.gateway.sessions import Call
from driftgate.storage import Reader, Record, WriterStats
from driftgate.trace import I32, CallIntent, CallOutcome, Engine, Trace, TraceMeta

__all__ = ["Answer", "Recorder", "Sink"]

MAX_OWED = 10_000
"""Records of failed captures that wait for storage to work again: about 10 MB."""

LOADED_TRACES = 4
"""Latest traces read back for a trajectory whose ids were forgotten."""

REASON_CHARS = 500
"""Of an error's text; an engine's error can hold a whole prompt."""

log = logging.getLogger("driftgate.capture")


class Sink(Protocol):
    """What is used of ``driftgate.storage.Writer``."""

    @property
    def stats(self) -> WriterStats:
        """Counters."""

    def submit(self, record: Record) -> Future[None]:
        """StorageError where the queue is full."""

    def submit_lazy(self, make: Callable[[], Sequence[Record]], *, size_hint: int) -> Future[None]:
        """The same; ``make`` runs on the writer thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer that is over, ready to be folded."""

    fold: Callable[[], Folded]
    """Runs on the writer thread."""
    size_bytes: int
    """Memory that ``fold`` holds."""
    request: bytes
    started_ns: int
    first_byte_ns: int | None
    ended_ns: int
    delivered: bool
    streamed: bool
    cancelled: bool = False
    """The client left before the answer's end."""


class Recorder:
    """One per gateway. ``open``, ``close`` and ``failed`` are called on the event loop."""

    def __init__(
        self,
        sink: Sink,
        reader: Reader | None,
        metrics: Metrics,
        engine: Callable[[str, str | None], Engine],
        *,
        durability: Literal["group", "strict"],
        on_capture_failure: Literal["serve", "refuse"],
        weight_version: str,
    ) -> None:
        """``engine(model, system_fingerprint)`` gives the fingerprint to write; thread-safe."""
        self._sink = sink
        self._reader = reader
        self._metrics = metrics
        self._engine = engine
        self.strict = durability == "strict"
        self.refuses = on_capture_failure == "refuse"
        self._weight_version = weight_version
        self._lineage = Lineage(self._load)
        self._owed: deque[Record] = deque()
        self._owed_lock = threading.Lock()
        self._failing = False
        """The last record that was written or refused failed."""

    async def open(self, intent: CallIntent) -> None:
        """Record that a call begins. StorageError where it must be refused."""
        self._pay_owed()
        try:
            future = self._sink.submit(intent)
        except StorageError as error:
            self._lost(intent.call_id, "intent", error, owed=intent)
            if self.refuses:
                raise
            return
        future.add_done_callback(lambda done: self._settled(intent.call_id, "intent", done))
        if self.strict or (self.refuses and self._failing):
            await self._durable(future)

    async def _durable(self, future: Future[None]) -> None:
        """Wait for storage; StorageError only where failures refuse the call."""
        try:
            await asyncio.wrap_future(future)
        except DriftgateError as error:
            if self.refuses:
                raise StorageError(str(error)) from error

    def close(self, call: Call, plan: Plan, answer: Answer) -> Future[None] | None:
        """Record an answer. The future resolves when it is durable; None: it was refused."""
        try:
            future = self._sink.submit_lazy(
                lambda: self._make(call, plan, answer), size_hint=answer.size_bytes
            )
        except StorageError as error:
            self._lost(call.call_id, "trace", error, owed=_outcome(call, "capture_failed", error))
            return None
        future.add_done_callback(lambda done: self._settled(call.call_id, "trace", done))
        return future

    async def closed(self, future: Future[None] | None) -> None:
        """In ``strict``, wait until the answer's traces are durable.

        StorageError where they are not and failures refuse the call.
        """
        if not self.strict:
            return
        if future is not None:
            await self._durable(future)
        elif self.refuses:
            raise StorageError("the answer could not be recorded: storage refused its traces")

    def failed(
        self,
        call: Call,
        status: Literal["failed", "cancelled", "capture_failed"],
        reason: str,
        *,
        http_status: int | None = None,
    ) -> None:
        """Record that a call ended without an answer."""
        self._submit(_outcome(call, status, reason, http_status))

    def _submit(self, outcome: CallOutcome) -> None:
        try:
            future = self._sink.submit(outcome)
        except StorageError as error:
            self._lost(outcome.call_id, "outcome", error, owed=outcome)
            return
        future.add_done_callback(lambda done: self._settled(outcome.call_id, "outcome", done))

    def _settled(self, call_id: str, kind: str, done: Future[None]) -> None:
        """Runs on the writer thread when a submission is durable or has failed."""
        error = done.exception()
        self._failing = error is not None
        if error is None:
            return
        owed = None
        if kind == "trace":
            reason = f"{type(error).__name__}: {error}"[:REASON_CHARS]
            owed = CallOutcome(
                call_id=call_id, status="capture_failed", reason=reason, ended_ns=time.time_ns()
            )
        self._lost(call_id, kind, error, owed=owed)

    def _lost(
        self, call_id: str, kind: str, error: BaseException, *, owed: Record | None = None
    ) -> None:
        """Count and log a record that did not reach storage; keep ``owed`` for later."""
        self._failing = True
        self._metrics.lost.labels(kind).inc()
        log.error("call %s: its %s was not recorded: %s", call_id, kind, error)
        if owed is None:
            return
        with self._owed_lock:
            if len(self._owed) >= MAX_OWED:
                dropped = self._owed.popleft()
                self._metrics.lost.labels("owed").inc()
                log.error("%s records wait for storage; given up: %s", MAX_OWED, dropped)
            self._owed.append(owed)

    def _pay_owed(self) -> None:
        """Try the records again that storage refused; stop at the first refusal."""
        with self._owed_lock:
            while self._owed:
                try:
                    self._sink.submit(self._owed[0])
                except StorageError:
                    return
                self._owed.popleft()

    def finish(self) -> int:
        """Last try for what storage refused; how many records remain unrecorded. Logs them."""
        self._pay_owed()
        for record in self._owed:
            log.error("not recorded: %s", record)
        return len(self._owed)

    # From here on: the writer thread.

    def _make(self, call: Call, plan: Plan, answer: Answer) -> list[Record]:
        folded = answer.fold()
        engine = self._engine(plan.model, folded.fingerprint)
        records: list[Record] = [
            self._trace(call, plan, answer, sample, engine) for sample in folded.samples
        ]
        for record in records:
            assert isinstance(record, Trace)
            self._metrics.traces.labels(record.meta.status).inc()
        if len(records) < plan.choices or folded.error is not None:
            status: Literal["cancelled", "failed"] = "cancelled" if answer.cancelled else "failed"
            detail = folded.error or "the engine answered with fewer choices"
            reason = f"{len(records)} of {plan.choices} choices came: {detail}"
            records.append(_outcome(call, status, reason))
        return records

    def _trace(
        self, call: Call, plan: Plan, answer: Answer, sample: Sample, engine: Engine
    ) -> Trace:
        trace_id = f"{call.call_id}.{sample.choice}"
        trajectory = call.place.trajectory
        parent = ROOT
        if sample.prompt_ids is not None:
            parent = self._lineage.parent(trajectory, sample.prompt_ids, step=call.step)
        if sample.prompt_ids is not None and sample.response_ids is not None:
            self._lineage.add(trajectory, trace_id, sample.prompt_ids, sample.response_ids)
        meta = TraceMeta(
            trace_id=trace_id,
            call_id=call.call_id,
            trajectory=trajectory,
            step=call.step,
            choice=sample.choice,
            api=plan.api,
            model=plan.model,
            attribution=call.place.attribution,
            ambiguous=list(call.place.ambiguous),
            parent=parent.trace_id,
            prefix_len=parent.prefix_len,
            prefix_exact=parent.exact,
            retry=call.retry,
            engine=engine,
            weight_version=self._weight_version,
            sampling=plan.sampling,
            streamed=answer.streamed,
            routes_via=sample.routes_via,
            finish_reason=sample.finish_reason,
            status="partial" if sample.missing else "complete",
            missing=sample.missing,
            proof=sample.proof,
            delivery="delivered" if answer.delivered else "uncertain",
            started_ns=answer.started_ns,
            first_byte_ns=answer.first_byte_ns,
            ended_ns=answer.ended_ns,
        )
        return Trace(
            meta=meta,
            prompt_ids=sample.prompt_ids,
            response_ids=sample.response_ids,
            logprobs=sample.logprobs,
            routes=sample.routes,
            token_bytes=sample.token_bytes,
            token_offsets=sample.token_offsets,
            request=answer.request,
            response=sample.response,
        )

    def _load(self, trajectory: str) -> Iterable[tuple[str, I32, I32]]:
        """The latest traces that the store has of a trajectory, oldest first."""
        if self._reader is None:
            return
        try:
            for row in self._reader.traces(trajectory)[-LOADED_TRACES:]:
                trace = self._reader.trace(row.meta.trace_id)
                if trace.prompt_ids is not None and trace.response_ids is not None:
                    yield trace.meta.trace_id, trace.prompt_ids, trace.response_ids
        except StorageError as error:
            log.warning("trajectory %s: no parents found in the store: %s", trajectory, error)


def _outcome(
    call: Call,
    status: Literal["failed", "cancelled", "capture_failed"],
    reason: object,
    http_status: int | None = None,
) -> CallOutcome:
    return CallOutcome(
        call_id=call.call_id,
        status=status,
        http_status=http_status,
        reason=str(reason)[:REASON_CHARS],
        ended_ns=time.time_ns(),
    )

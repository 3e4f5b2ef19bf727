"""Brings calls into storage: an intent before the engine is asked, traces or an outcome after.

Capture failing never fails a call unless the user said so (``on_capture_failure``), and it is never
silent: each record that storage refuses or cannot write is counted and logged with its call's id.
Intents and outcomes are tried again when storage takes records again; a lost trace leaves an
outcome that says so. While storage is behind, calls are held back for a moment (``pressure``)."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from driftgate.errors import StorageError
from driftgate.gateway.capture import Folded, Sample
from driftgate.gateway.exact import proven
from driftgate.gateway.handover import HandOver, Ticket
from driftgate.gateway.lineage import ROOT, Lineage
from driftgate.gateway.metrics import Metrics
from driftgate.gateway.onward import Onward
from driftgate.gateway.openai import Plan
from driftgate.gateway.outcomes import outcome_of, words_of
from driftgate.gateway.pressure import PRESSURE_WAIT_S, Pressure
from driftgate.gateway.served import Served
from driftgate.gateway.sessions import Call
from driftgate.gateway.sink import Sink
from driftgate.storage import Reader, Record
from driftgate.trace import I32, CallIntent, CallOutcome, Engine, Trace, TraceMeta
from driftgate.weights import joined

__all__ = ["CLIENT_LEFT", "STOPPED", "Answer", "Recorded", "Recorder"]

CLIENT_LEFT = "the client left before the end of the answer"
STOPPED = "the gateway was stopped"

MAX_OWED = 10_000
"""Records of failed captures that wait for storage to work again: about 10 MB."""

LOADED_TRACES = 4
"""Latest traces read back for a trajectory whose ids were forgotten."""

MAX_TRIES = 3
"""Of one record: what fails more often while others are written is itself the problem."""

Recorded: TypeAlias = tuple[Future[None], Ticket]
"""Resolves when it is durable; when it is with the operating system."""

log = logging.getLogger("driftgate.capture")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer that is over, ready to be folded."""

    fold: Callable[[], Folded]
    """Runs on the writer thread."""
    size_bytes: int
    """Memory that ``fold`` holds."""
    request: bytes
    response: bytes | None = None
    """What the agent got, where that is no chat choice."""
    started_ns: int
    first_byte_ns: int | None
    ended_ns: int
    delivered: bool
    streamed: bool
    cancelled: bool = False
    """The client left before the answer's end."""
    served: Served
    """By which engine, under which weights."""
    onward: Onward | None = None


@dataclass(frozen=True, slots=True)
class _Owed:
    """A record that waits for storage to work again."""

    record: CallIntent | CallOutcome
    kind: str
    tries: int = 0
    """How often it was submitted in vain."""


class Recorder:
    """One per gateway. ``open``, ``close`` and ``failed`` are called on the event loop."""

    def __init__(
        self,
        sink: Sink,
        reader: Reader | None,
        metrics: Metrics,
        *,
        durability: Literal["group", "strict"],
        on_capture_failure: Literal["serve", "refuse"],
        queue_bytes: int,
    ) -> None:
        """``queue_bytes`` is the sink's limit."""
        self.strict = durability == "strict"
        self.refuses = on_capture_failure == "refuse"
        self.cancel_reason = CLIENT_LEFT
        """Why a call is cancelled now; the gateway changes it before it ends calls itself."""
        self._sink = sink
        self._reader = reader
        self._metrics = metrics
        self._lineage = Lineage(self._load)
        self._pressure = Pressure(lambda: sink.stats.queued_bytes, queue_bytes, metrics)
        self._hand_over = HandOver(metrics)
        self._owed: deque[_Owed] = deque()
        self._owed_lock = threading.Lock()
        self._given_up = 0
        self._failing = False
        """The last record that was written or refused failed."""
        self._writes_fail = False
        """The last submission that was not refused could not be written."""

    async def open(self, intent: CallIntent) -> None:
        """Record that a call begins, once storage keeps up. StorageError where it must be refused.

        A call that is cancelled in here leaves an outcome.
        """
        try:
            has_room = await self._pressure.wait()
        except asyncio.CancelledError:
            self.left(intent)
            raise
        if not has_room and self.refuses:
            raise StorageError(
                f"storage is behind: its queue did not fall below half within {PRESSURE_WAIT_S} s"
            )
        if not self._writes_fail:
            self._pay_owed()
        waits = self.strict or (self.refuses and self._failing)
        # A call that is refused never was: nothing is owed for it.
        again = None if self.refuses and waits else _Owed(intent, "intent", 1)
        try:
            future = self._sink.submit(intent)
        except StorageError as error:
            self._lost(intent.call_id, "intent", error, owed=None if self.refuses else again)
            if self.refuses:
                raise
            return
        self._watch(future, intent.call_id, "intent", again)
        if not waits:
            return
        try:
            await self._durable(future)
        except asyncio.CancelledError:
            self._submit(outcome_of(intent.call_id, "cancelled", self.cancel_reason))
            raise

    def left(self, intent: CallIntent) -> None:
        """Record a call that was cancelled before the engine was asked."""
        self._submit(intent, "intent")
        self._submit(outcome_of(intent.call_id, "cancelled", self.cancel_reason))

    async def _durable(self, future: Future[None]) -> None:
        """Wait for storage; StorageError only where failures refuse the call."""
        # Any error: the fold runs in there as well, and what it raises is an answer not recorded.
        (error,) = await asyncio.gather(asyncio.wrap_future(future), return_exceptions=True)
        if error is not None and self.refuses:
            raise StorageError(f"not recorded: {words_of(error)}") from error

    async def claim(self, size_bytes: int) -> int:
        """Wait for room for an answer of which all has come, so that storage need not refuse it;
        what must be given to ``release`` when it is submitted or dropped."""
        return await self._pressure.claim(size_bytes)

    def release(self, claimed_bytes: int) -> None:
        """Give back what ``claim`` gave."""
        self._pressure.release(claimed_bytes)

    def close(self, call: Call, plan: Plan, answer: Answer) -> Recorded | None:
        """Record an answer. None: it was refused."""
        ticket = self._hand_over.ticket()
        try:
            future = self._sink.submit_lazy(
                lambda: self._make(call, plan, answer),
                size_hint=answer.size_bytes,
                handed_over=lambda: self._hand_over.written(ticket),
            )
        except StorageError as error:
            self._trace_lost(call.call_id, error)
            return None
        if call.span is not None:
            call.span.wait_for(future)
        self._watch(future, call.call_id, "trace", None)
        return future, ticket

    async def closed(self, recorded: Recorded | None) -> None:
        """Wait until the end of the answer may be sent: its traces are with the operating system,
        or, in ``strict``, durable.

        StorageError where they are not durable and failures refuse the call.
        """
        if recorded is not None:
            future, ticket = recorded
            await (self._durable(future) if self.strict else self._hand_over.wait(ticket))
        elif self.strict and self.refuses:
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
        self._submit(outcome_of(call.call_id, status, reason, http_status))

    def _submit(self, record: CallIntent | CallOutcome, kind: str = "outcome") -> None:
        again = _Owed(record, kind, 1)
        try:
            future = self._sink.submit(record)
        except StorageError as error:
            self._lost(record.call_id, kind, error, owed=again)
            return
        self._watch(future, record.call_id, kind, again)

    def _watch(self, future: Future[None], call_id: str, kind: str, owed: _Owed | None) -> None:
        future.add_done_callback(lambda done: self._settled(done, call_id, kind, owed))

    def _settled(self, done: Future[None], call_id: str, kind: str, owed: _Owed | None) -> None:
        """Runs on the writer thread when a submission is durable or has failed."""
        error = done.exception()
        self._failing = error is not None
        self._writes_fail = isinstance(error, StorageError)  # others are the fold's
        self._pressure.settled()
        if error is None:
            self._pay_owed()  # storage works again; nobody may call for a while
            return
        if kind == "trace":
            self._trace_lost(call_id, error)
        else:
            self._lost(call_id, kind, error, owed=owed)

    def _trace_lost(self, call_id: str, error: BaseException) -> None:
        outcome = outcome_of(call_id, "capture_failed", words_of(error))
        self._lost(call_id, "trace", error, owed=_Owed(outcome, "outcome"))
        if not isinstance(error, StorageError):
            self._pay_owed()  # the fold failed, storage works

    def _lost(self, call_id: str, kind: str, error: BaseException, *, owed: _Owed | None) -> None:
        """Count and log a record that did not reach storage; keep ``owed`` for later."""
        self._failing = True
        self._metrics.lost.labels(kind).inc()
        log.error("call %s: its %s was not recorded: %s", call_id, kind, error)
        if owed is None:
            return
        with self._owed_lock:
            if owed.tries >= MAX_TRIES:
                self._give_up(owed, f"it was tried {MAX_TRIES} times")
                return
            if len(self._owed) >= MAX_OWED:
                self._give_up(self._owed.popleft(), f"{MAX_OWED} newer records wait for storage")
            self._owed.append(owed)

    def _give_up(self, owed: _Owed, why: str) -> None:
        self._given_up += 1
        self._metrics.lost.labels("owed").inc()
        log.error("given up, because %s: %s", why, owed.record)

    def _pay_owed(self) -> None:
        """Try the records again that storage did not take, up to the first refusal. Any thread."""
        for _ in range(len(self._owed)):  # one that fails again goes to the end
            try:
                owed = self._owed.popleft()
            except IndexError:
                return
            try:
                future = self._sink.submit(owed.record)
            except StorageError:
                self._owed.appendleft(owed)
                return
            again = replace(owed, tries=owed.tries + 1)
            self._watch(future, owed.record.call_id, owed.kind, again)

    def finish(self, flush: Callable[[], None]) -> int:
        """Last tries for what storage did not take; how many records remain unrecorded. Logs them.

        ``flush`` returns when all that was submitted is settled; it may block.
        """
        flush()
        for _ in range(MAX_TRIES):
            self._pay_owed()
            flush()
        for owed in self._owed:
            log.error("not recorded: %s", owed.record)
        return len(self._owed) + self._given_up

    # From here on: the writer thread.

    def _make(self, call: Call, plan: Plan, answer: Answer) -> list[Record]:
        folded = answer.fold()
        if call.span is not None:
            call.span.folded(folded, plan.n)
        engine = answer.served.engine(plan.model, folded.fingerprint)
        records: list[Record] = [
            self._trace(call, plan, answer, sample, engine) for sample in folded.samples
        ]
        for record in records:
            assert isinstance(record, Trace)
            self._metrics.child(self._metrics.traces, record.meta.status).inc()
        if len(records) < plan.choices or folded.error is not None:
            records.append(self._gap(call, plan, answer, folded))
        return records

    def _gap(self, call: Call, plan: Plan, answer: Answer, folded: Folded) -> CallOutcome:
        """What an answer lacks whose traces are not all there, or not whole."""
        came = len(folded.samples)
        status: Literal["cancelled", "failed", "capture_failed"] = "failed"
        if answer.cancelled:
            status = "cancelled"
        elif folded.error is None and folded.unread is not None:
            status = "capture_failed"  # the agent has all of them
            self._metrics.lost.labels("trace").inc()
        unread = folded.unread if came < plan.choices else None  # else it is in the traces
        why = [said for said in (folded.error, unread) if said is not None]
        detail = "; ".join(why) or "the engine answered with fewer choices"
        reason = f"{came} of {plan.choices} choices came: {detail}"
        if status == "capture_failed":
            log.error("call %s: its answer was not recorded: %s", call.call_id, reason)
        return outcome_of(call.call_id, status, reason)

    def _trace(
        self, call: Call, plan: Plan, answer: Answer, sample: Sample, engine: Engine
    ) -> Trace:
        trace_id = f"{call.call_id}.{sample.choice}"
        trajectory = call.place.trajectory
        parent, prompt_ids, response_ids = ROOT, sample.prompt_ids, sample.response_ids
        if prompt_ids is not None:
            parent = self._lineage.parent(trajectory, prompt_ids, step=call.step)
        if prompt_ids is not None and response_ids is not None:
            ids = self._lineage.add(trajectory, trace_id, prompt_ids, response_ids)
            prompt_ids, response_ids = ids[: len(prompt_ids)], ids[len(prompt_ids) :]
        tokens = 0 if response_ids is None else len(response_ids)
        spans = sample.weight_spans or answer.served.spans(sample.choice, tokens)
        continuation = proven(answer.onward, sample.prompt_ids, answer.served.upstream, engine)
        if continuation is not None:
            self._metrics.continued.labels(continuation.way).inc()
        meta = TraceMeta(
            trace_id=trace_id,
            call_id=call.call_id,
            trajectory=trajectory,
            step=call.step,
            choice=sample.choice,
            api=plan.spoken,
            model=plan.model,
            attribution=call.place.attribution,
            ambiguous=list(call.place.ambiguous),
            agent=call.place.agent,
            parent=parent.trace_id,
            prefix_len=parent.prefix_len,
            prefix_exact=parent.exact,
            continuation=continuation,
            retry=call.retry,
            engine=engine,
            weight_version=joined(spans),
            weight_spans=spans,
            failed_over=answer.served.failed_over,
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
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            logprobs=sample.logprobs,
            routes=sample.routes,
            token_bytes=sample.token_bytes,
            token_offsets=sample.token_offsets,
            request=answer.request,
            response=sample.response if answer.response is None else answer.response,
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

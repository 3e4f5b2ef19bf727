"""The loop beside the trainer: lease a trajectory, score it, store the scores, give the lease back.

Invariants: a trace gets a score or a stored reason why not, so nothing is tried forever; a lease is
renewed while its trajectory is worked on and given back only after the scores are durable, so a
killed worker's trajectory is taken up again and a score is never counted twice (the store's key is
trace, engine, trainer, kind).
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import msgspec

from driftgate.errors import DriftgateError, StorageError, TeacherError
from driftgate.storage import Lease, Leases, Reader, Writer
from driftgate.teacher.base import Backend
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.floors import Floors
from driftgate.teacher.scores import drift, engine_floor, refusal, trainer_floor
from driftgate.teacher.sequences import assemble, is_scorable
from driftgate.teacher.tokens import TokenCheck, load_tokenizer
from driftgate.trace import Reason, Score, Trace, TraceMeta

__all__ = ["Report", "Worker"]

log = logging.getLogger(__name__)

POLL_S = 0.2
"""Between two looks at whether the store has changed, when following: a stat of two files."""

LOOK_ANYWAY_S = 5.0
"""Look for work this often even in an unchanged store: a dead worker's lease runs out in
silence."""

RENEWALS_PER_LEASE = 4
"""A lease survives three renewals that fail or come late."""


class Report(msgspec.Struct, kw_only=True):
    """What a worker has done since it started."""

    trajectories: int = 0
    scored: int = 0
    """Traces with numbers."""
    refused: int = 0
    """Traces with a stored reason instead."""
    noise_floor: int = 0
    """Noise floor scores of either side."""
    lost_leases: int = 0
    """Trajectories that another worker took over while this one was working on them."""
    forward_s: float = 0.0


class Worker:
    """Scores the traces of one store with one backend, in one thread (and one that renews
    leases)."""

    def __init__(self, config: TeacherConfig, backend: Backend) -> None:
        root = Path(config.store)
        self._config = config
        self._backend = backend
        self._name = f"{socket.gethostname()}-{os.getpid()}"
        self._writer = Writer(root, name="teacher")
        self._reader = Reader(root)
        self._leases = Leases(root)
        self._limit = min(config.max_tokens or backend.max_tokens, backend.max_tokens)
        self._check = TokenCheck(load_tokenizer(config.model), vocab_size=backend.vocab_size)
        self._watch = _Watch(root)
        self._floors = Floors(
            self._reader, backend.trainer.digest, trajectories=config.noise_floor_trajectories
        )
        self.report = Report()

    def run(self, stop: threading.Event) -> Report:
        """Score until nothing is left, or until ``stop`` when following. Finishes what it has
        begun."""
        while not stop.is_set():
            leases = self._acquire()
            if leases:
                self._work(leases)
            elif not self._engine_floors():
                if not self._config.follow:
                    break
                self._watch.wait(stop)
        return self.report

    def close(self) -> None:
        """Make everything durable."""
        self._writer.close()

    def _acquire(self) -> list[Lease]:
        """As many trajectories as the backend works on at once, or fewer."""
        leases: list[Lease] = []
        while len(leases) < self._backend.parallel:
            lease = self._leases.acquire(
                self._backend.trainer.digest,
                worker=self._name,
                ttl_s=self._config.lease_s,
                model=self._config.served_model,
            )
            if lease is None:
                break
            leases.append(lease)
        return leases

    def _work(self, leases: list[Lease]) -> None:
        with self._renewing(leases) as lost:
            refused: list[Score] = []
            traces = [trace for lease in leases for trace in self._read(lease, refused)]
            scores = [*refused, *self._score(traces)]
            kept = [score for score in scores if score.meta.trajectory not in lost]
            self._store(kept)
        self.report.lost_leases += len(lost)
        for lease in leases:
            if lease.trajectory not in lost:
                self._leases.release(lease)
                self.report.trajectories += 1

    def _read(self, lease: Lease, refused: list[Score]) -> list[Trace]:
        """The traces of a lease that can be scored; a score with the reason for each that
        cannot."""
        fit: list[Trace] = []
        metas = {row.meta.trace_id: row.meta for row in self._reader.traces(lease.trajectory)}
        for trace_id in lease.trace_ids:
            try:
                trace = self._reader.trace(trace_id)
                reason = self._unfit(trace)
            except DriftgateError as error:
                reason = Reason(
                    code="trace_unreadable",
                    detail=f"{type(error).__name__}: {error}",
                    fix="run `driftgate index rebuild`, which reports damaged segments",
                )
            if reason is None:
                fit.append(trace)
            else:
                log.warning("trace %s is not scored: %s", trace_id, reason.detail)
                refused.append(self._refusal(metas[trace_id], reason))
        return fit

    def _unfit(self, trace: Trace) -> Reason | None:
        """Why this trainer cannot score ``trace``, or None."""
        if not is_scorable(trace):
            missing = "; ".join(trace.meta.missing) or "no ids or logprobs"
            return Reason(code="incomplete_capture", detail=missing, fix="see `driftgate probe`")
        assert trace.prompt_ids is not None
        assert trace.response_ids is not None
        fed = len(trace.prompt_ids) + len(trace.response_ids) - 1
        if fed > self._limit:
            return Reason(
                code="sequence_too_long",
                detail=f"{fed} tokens are more than the trainer's limit of {self._limit}",
                fix="raise max_tokens if the model and the memory allow it",
            )
        return self._check.mismatch(trace)

    def _score(self, traces: list[Trace]) -> list[Score]:
        """Scores of all traces; where a batch fails, of each trajectory alone, or why it failed."""
        if not traces:
            return []
        try:
            return self._forward(traces)
        except TeacherError as error:
            groups = _by_trajectory(traces)
            if len(groups) > 1:
                return [score for group in groups.values() for score in self._score(group)]
            log.exception("scoring trajectory %s failed", traces[0].meta.trajectory)
            reason = Reason(
                code="scoring_failed",
                detail=str(error)[:500],
                fix="see the teacher's log; lower max_tokens if it ran out of memory",
            )
            return [self._refusal(trace.meta, reason) for trace in traces]

    def _forward(self, traces: list[Trace]) -> list[Score]:
        """One pass over all traces, and a second one over those that the noise floor is taken
        from."""
        backend, now_ns = self._backend, time.time_ns
        sequences = assemble(traces)
        results = {result.trace_id: result for result in backend.score(sequences)}
        forward_s = sum(result.forward_s for result in results.values())
        self.report.forward_s += forward_s
        log.info("%d traces in %d forwards, %.2f s", len(traces), len(sequences), forward_s)
        scores = [
            drift(
                trace,
                results[trace.meta.trace_id],
                trainer=backend.trainer,
                findings=backend.findings,
                weight_version=self._config.weight_version,
                now_ns=now_ns(),
            )
            for trace in traces
        ]
        floor = {
            trace.meta.trace_id: trace
            for trace in traces
            if self._floors.takes(trace.meta.trajectory)
        }
        again = [
            sequence
            for sequence in sequences
            if any(part.trace_id in floor for part in sequence.slices)
        ]
        for second in backend.score(again) if again else []:
            if (trace := floor.get(second.trace_id)) is not None:
                first = results[second.trace_id]
                scores.append(
                    trainer_floor(trace, first, second, trainer=backend.trainer, now_ns=now_ns())
                )
        return scores

    def _engine_floors(self) -> bool:
        """Compare the engine with itself where it answered one request twice; True if there was
        one."""
        scores = []
        for first_id, second_id in self._floors.new_twins():
            try:
                first, second = self._reader.trace(first_id), self._reader.trace(second_id)
            except DriftgateError as error:
                log.warning("no noise floor from %s and %s: %s", first_id, second_id, error)
                continue
            same_weights = first.meta.weight_version == second.meta.weight_version
            if same_weights and self._config.served_model in (None, first.meta.model):
                scores.append(engine_floor(first, second, now_ns=time.time_ns()))
        self._store(scores)
        return bool(scores)

    def _store(self, scores: list[Score]) -> None:
        """Wait until ``scores`` are on disk. Raises ``StorageError`` if they cannot be."""
        waiting: list[Future[None]] = []
        for score in scores:
            try:
                waiting.append(self._writer.submit(score))
            except StorageError:  # the queue is full: wait for what is in it, once
                self._writer.flush()
                waiting.append(self._writer.submit(score))
        for future in waiting:
            future.result()
        for score in scores:
            if score.meta.kind == "noise_floor":
                self.report.noise_floor += 1
            elif score.meta.bucket is None:
                self.report.refused += 1
            else:
                self.report.scored += 1

    def _refusal(self, meta: TraceMeta, reason: Reason) -> Score:
        return refusal(meta, reason, trainer=self._backend.trainer, now_ns=time.time_ns())

    @contextmanager
    def _renewing(self, leases: list[Lease]) -> Iterator[set[str]]:
        """Renew ``leases`` from a thread; yields the trajectories whose lease was lost so far."""
        lost: set[str] = set()
        done = threading.Event()

        def renew() -> None:
            while not done.wait(self._config.lease_s / RENEWALS_PER_LEASE):
                for lease in leases:
                    try:
                        held = self._leases.renew(lease)
                    except StorageError as error:
                        log.warning("lease of %s is not renewed: %s", lease.trajectory, error)
                    else:
                        if not held:
                            lost.add(lease.trajectory)

        thread = threading.Thread(target=renew, name="lease-renewal", daemon=True)
        thread.start()
        try:
            yield lost
        finally:
            done.set()
            thread.join()


def _by_trajectory(traces: Seq[Trace]) -> dict[str, list[Trace]]:
    groups: dict[str, list[Trace]] = {}
    for trace in traces:
        groups.setdefault(trace.meta.trajectory, []).append(trace)
    return groups


class _Watch:
    """Waits until another process has written to the store's index."""

    def __init__(self, root: Path) -> None:
        self._paths = [root / "index.sqlite", root / "index.sqlite-wal"]
        self._seen: list[tuple[int, int]] = []

    def wait(self, stop: threading.Event) -> None:
        """Return when the index has changed since the last call, or after ``LOOK_ANYWAY_S``."""
        deadline = time.monotonic() + LOOK_ANYWAY_S
        while time.monotonic() < deadline and not stop.is_set():
            now = [_stamp(path) for path in self._paths]
            if now != self._seen:
                self._seen = now
                return
            stop.wait(POLL_S)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)

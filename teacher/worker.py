"""The loop beside the trainer: lease a trajectory, score it, store the scores, give the lease back.

Invariants: a trace gets a score or a stored reason why not, so nothing is tried forever (a reason
that may pass, `driftgate.codes.PASSING`, is tried again by the next worker that starts); a lease is
renewed while its trajectory is worked on and given back only after the scores are durable, so a
killed worker's trajectory is taken up again and a score is never counted twice (the store's key is
trace, engine, trainer, kind). A trajectory that ended its worker is tried once more, with no other,
and then refused.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import msgspec

from driftgate.errors import DriftgateError, FormatError, StorageError, TeacherError
from driftgate.facts import Parent
from driftgate.storage import Lease, Leases, Reader, TraceRow, Writer
from driftgate.teacher.base import Backend
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.floors import Floors, choose, trainer_floors
from driftgate.teacher.held import Held, fed_tokens, hold, smaller
from driftgate.teacher.replay import Replayer
from driftgate.teacher.scores import drift, engine_floor, refusal
from driftgate.teacher.sequences import assemble, is_scorable
from driftgate.teacher.tokens import TokenCheck, load_tokenizer
from driftgate.teacher.watch import Watch
from driftgate.trace import Reason, Score, ScoreMeta, Trace, TraceMeta
from driftgate.weights import is_mixed

__all__ = ["MAX_CRASHES", "Report", "Worker"]

log = logging.getLogger(__name__)

MAX_CRASHES = 4
"""Workers that one trajectory may end before it is refused. Preempted ones end as well: with two,
100 kills at random moments refused 38 of 6,000 traces."""

TWINS_AT_ONCE = 32
"""Engine noise floors that are stored together: their routes wait in memory for one fsync."""

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
    replay_s: float = 0.0
    """Of forwards under the rollout's routes."""


class Worker:
    """Scores the traces of one store with one backend, in one thread (and one that renews
    leases)."""

    def __init__(self, config: TeacherConfig, backend: Backend, *, refused: bool = True) -> None:
        """``refused``: take up once more what was refused for a reason that may have passed."""
        root = Path(config.store)
        self._config = config
        self._backend = backend
        self._name = f"{socket.gethostname()}-{os.getpid()}"
        self._writer = Writer(root, name="teacher")
        self._reader = Reader(root)
        self._leases = Leases(root, refused=refused)
        self._limit = min(config.max_tokens or backend.max_tokens, backend.max_tokens)
        self._check = TokenCheck(load_tokenizer(config.model), vocab_size=backend.vocab_size)
        self._watch = Watch(root)
        self._floors = Floors(
            self._reader, backend.trainer.digest, trajectories=config.noise_floor_trajectories
        )
        self._replayer = Replayer(backend, self._reader.trace, enabled=config.replay)
        self.report = Report()

    def run(self, stop: threading.Event) -> Report:
        """Score until nothing is left, or until ``stop`` when following. Finishes what it has
        begun.

        Something is left while another worker holds it: whoever waits for this to return finds
        every trace scored or refused, also where that worker has died. (What cannot be read now is
        left for the next start.)
        """
        if self._config.floor_traces:
            self._measure_floor()
            return self.report
        while not stop.is_set():
            leases = self._acquire()
            if leases:
                self._work(leases)
            elif not self._engine_floors():
                if not self._config.follow and not self._held_by_others():
                    break
                self._watch.wait(stop)
        return self.report

    def close(self) -> None:
        """Make everything durable."""
        self._writer.close()

    def _acquire(self) -> list[Lease]:
        """As many trajectories as the backend works on at once, or fewer; one that ended its worker
        alone, so that it cannot bring others into the same suspicion."""
        leases: list[Lease] = []
        while len(leases) < self._backend.parallel:
            lease = self._leases.acquire(
                self._backend.trainer.digest,
                worker=self._name,
                ttl_s=self._config.lease_s,
                model=self._config.served_model,
                untried=bool(leases),
            )
            if lease is None:
                break
            leases.append(lease)
            if lease.crashes:
                break
        return leases

    def _held_by_others(self) -> bool:
        """Work is left that cannot be leased yet; says who has it, once for each change."""
        left = self._leases.open_work(self._backend.trainer.digest, model=self._config.served_model)
        self._watch.tell(left)
        return bool(left)

    def _work(self, leases: list[Lease]) -> None:
        with self._renewing(leases) as lost:
            try:
                refused: list[Score] = []
                held = [one for lease in leases for one in self._read(lease, refused)]
                scores = [*refused, *self._score(held)]
                kept = [score for score in scores if score.meta.trajectory not in lost]
                self._store(kept)
            except StorageError:  # the disk, not the scoring: nobody's crash
                self._release(leases, lost)
                raise
        self.report.lost_leases += len(lost)
        self.report.trajectories += self._release(leases, lost)

    def _release(self, leases: list[Lease], lost: set[str]) -> int:
        """Give back what was not lost; how many leases that are."""
        mine = [lease for lease in leases if lease.trajectory not in lost]
        for lease in mine:
            self._leases.release(lease)
        return len(mine)

    def _read(self, lease: Lease, refused: list[Score]) -> list[Held]:
        """The traces of a lease that can be scored; a score with the reason for each that
        cannot, and nothing for one that cannot be read now."""
        fit: list[Held] = []
        rows = {row.meta.trace_id: row for row in self._reader.traces(lease.trajectory)}
        for trace_id in lease.trace_ids:
            before = rows.get(rows[trace_id].meta.parent or "")
            found = _crashed(lease) or self._fit(trace_id, before)
            if isinstance(found, Held):
                fit.append(found)
            elif isinstance(found, StorageError):
                log.warning("trace %s is left unscored, for the next start: %s", trace_id, found)
                self._leases.set_aside([trace_id])
            else:
                log.warning("trace %s is not scored: %s", trace_id, found.detail)
                refused.append(self._refusal(rows[trace_id].meta, found))
        return fit

    def _fit(self, trace_id: str, before: TraceRow | None) -> Held | Reason | StorageError:
        """What is to be scored of a trace, or why it cannot be: an error where it cannot be read
        now. ``before``: its parent."""
        try:
            trace = self._reader.trace(trace_id)
            return self._unfit(trace) or hold(trace, _parent(before))
        except DriftgateError as error:
            if isinstance(error, StorageError) and not _is_damage(error):
                return error
            return Reason(
                code="trace_unreadable",
                detail=f"{type(error).__name__}: {error}",
                fix="run `driftgate index rebuild`, which reports damaged segments",
            )

    def _unfit(self, trace: Trace) -> Reason | None:
        """Why this trainer cannot score ``trace``, or None."""
        if not is_scorable(trace):
            missing = "; ".join(trace.meta.missing) or "no ids or logprobs"
            return Reason(code="incomplete_capture", detail=missing, fix="see `driftgate probe`")
        fed = fed_tokens(trace)
        if fed > self._limit:
            its_own = self._limit == self._backend.max_tokens
            allows = "the trainer's model was made for" if its_own else "max_tokens allows"
            return Reason(
                code="sequence_too_long",
                detail=f"{fed} tokens are more than the {self._limit} that {allows}",
                fix="keep prompt and answer below it" if its_own else "raise max_tokens",
            )
        return self._check.mismatch(trace)

    def _score(self, held: list[Held]) -> list[Score]:
        """Scores of all traces; where they fail together, of smaller parts, and why a trace failed
        alone."""
        scores: list[Score] = []
        left = [held] if held else []
        while left:
            part = left.pop()
            try:
                scores += self._forward(part)
            except TeacherError as error:
                parts = smaller(part)
                left += reversed(parts)
                if not parts:
                    scores.append(self._failed(part[0].trace.meta, error))
        return scores

    def _failed(self, meta: TraceMeta, error: TeacherError) -> Score:
        log.error("scoring trace %s failed", meta.trace_id, exc_info=error)
        fix = "see the teacher's log; lower max_tokens if it ran out of memory"
        return self._refusal(meta, Reason(code="scoring_failed", detail=str(error)[:500], fix=fix))

    def _forward(self, held: list[Held]) -> list[Score]:
        """One pass over all traces, and a second one over those that the noise floor is taken
        from."""
        backend = self._backend
        sequences = assemble([one.trace for one in held])
        results = {result.trace_id: result for result in backend.score(sequences)}
        forward_s = sum(result.forward_s for result in results.values())
        self.report.forward_s += forward_s
        log.info("%d traces in %d forwards, %.2f s", len(held), len(sequences), forward_s)
        replayed = self._replayer.run(held, sequences, results)
        self.report.replay_s = self._replayer.forward_s
        scores = [
            drift(
                one,
                results[one.trace.meta.trace_id],
                trainer=backend.trainer,
                findings=backend.findings,
                weight_version=self._config.weight_version,
                replayed=replayed[one.trace.meta.trace_id],
                now_ns=time.time_ns(),
            )
            for one in held
        ]
        again = [one.trace for one in held if self._floors.takes(one.trace.meta.trajectory)]
        try:
            return [*scores, *trainer_floors(backend, again, sequences, results)]
        except TeacherError as error:
            log.warning("no noise floor from %d traces: %s", len(again), error)
            return scores

    def _measure_floor(self) -> None:
        """Run the trainer twice over the newest traces that it has no floor of."""
        rows = choose(
            self._reader, model=self._config.served_model, limit=self._config.floor_traces
        )
        known = self._floors.traces
        held = [hold(t) for t in rows if t.meta.trace_id not in known and not self._unfit(t)]
        sequences = assemble([one.trace for one in held])
        results = {result.trace_id: result for result in self._backend.score(sequences)}
        traces = [one.trace for one in held]
        self._store(trainer_floors(self._backend, traces, sequences, results))

    def _engine_floors(self) -> bool:
        """Compare the engine with itself where it answered one request twice; True if there was
        one."""
        scores: list[Score] = []
        found = False
        for first_id, second_id in self._floors.new_twins():
            score = self._engine_floor(first_id, second_id)
            if score is not None:
                scores.append(score)
                found = True
            if len(scores) == TWINS_AT_ONCE:
                self._store(scores)
                scores.clear()
        self._store(scores)
        return found

    def _engine_floor(self, first_id: str, second_id: str) -> Score | None:
        """The noise floor of one pair, or None where it is none or cannot be read."""
        try:
            first, second = self._reader.trace(first_id), self._reader.trace(second_id)
        except DriftgateError as error:
            log.warning("no noise floor from %s and %s: %s", first_id, second_id, error)
            return None
        comparable = (
            is_scorable(first)
            and is_scorable(second)
            and first.meta.weight_version == second.meta.weight_version
            and not is_mixed(first.meta)
            and self._config.served_model in (None, first.meta.model)
        )
        if not comparable:
            return None
        return engine_floor(hold(first), hold(second), now_ns=time.time_ns())

    def _store(self, scores: list[Score]) -> None:
        """Wait until ``scores`` are on disk. Raises ``StorageError`` if they cannot be.

        A refusal that is there for the same reason stands: nothing is written for it.
        """
        waiting: list[Future[None]] = []
        stands = [score.meta.trace_id for score in scores if self._stands(score.meta)]
        self._leases.set_aside(stands)
        for score in scores:
            if score.meta.bucket is None and score.meta.trace_id in stands:
                continue
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

    def _stands(self, meta: ScoreMeta) -> bool:
        """Whether ``meta`` is a refusal that is stored already."""
        if meta.bucket is not None or meta.kind != "drift":
            return False
        try:
            known = self._reader.score(meta.trace_id, meta.trainer.digest).meta
        except DriftgateError:  # the usual one is that there is none
            return False
        return known.bucket is None and known.comparable == meta.comparable

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


def _is_damage(error: StorageError) -> bool:
    """What is read is wrong; otherwise its file is away or cannot be read at the moment."""
    return isinstance(error, FormatError) and not isinstance(error.__cause__, FileNotFoundError)


def _crashed(lease: Lease) -> Reason | None:
    """Why no trace of ``lease`` is to be scored, if too many workers ended over it."""
    if lease.crashes < MAX_CRASHES:
        return None
    return Reason(
        code="scoring_crashed",
        detail=f"{lease.crashes} workers ended while they scored trajectory {lease.trajectory}",
        fix="see the logs of those workers; lower max_tokens if they ran out of memory",
    )


def _parent(row: TraceRow | None) -> Parent | None:
    if row is None or row.prompt_len is None:
        return None
    return Parent(row.meta.trace_id, row.prompt_len, row.meta.weight_version)

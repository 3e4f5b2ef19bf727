"""What goes wrong beside or inside the worker costs its own traces and nothing else."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from driftgate.errors import StorageError, TeacherError
from driftgate.profiles import PROFILES
from driftgate.storage import Leases, Reader, Writer
from driftgate.storage.subjects import pairs
from driftgate.teacher.base import SliceResult
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.held import hold
from driftgate.teacher.reference import ReferenceBackend
from driftgate.teacher.scores import refusal
from driftgate.teacher.sequences import Sequence as Forward
from driftgate.teacher.tokens import load_tokenizer
from driftgate.teacher.worker import MAX_CRASHES, Worker
from driftgate.testing.checkpoints import CheckpointKind
from driftgate.trace import Reason
from driftgate.verdict import judge
from tests.teacher.support import MakeTrace, Say, Stub, store, teach, tokens


def test_a_killed_workers_trajectory_is_taken_up_and_counted_once(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    store(config, say("a", tokens(1, 20), tokens(2, 10)))
    leases = Leases(Path(config.store))
    began = time.time() - 59.0
    killed = leases.acquire(backend.trainer.digest, worker="killed", ttl_s=60.0, now=began)
    assert killed is not None
    with caplog.at_level("INFO"):
        assert teach(config, backend).scored == 1, "it waits until the lease has run out"
    assert "waiting for trajectories that are leased: 1 by killed" in caplog.messages
    assert time.time() > killed.expires
    assert not leases.renew(killed)
    leases.close()
    # The killed worker had only been slow, and stores its score after all.
    score = reader.score("a.0")
    writer = Writer(Path(config.store), name="slow")
    writer.submit(score).result(timeout=30)
    assert writer.stats.duplicate_records == 1
    writer.close()
    (cell,) = [cell for cell in reader.cells() if cell.kind == "drift"]
    assert cell.n_seqs == 1
    assert cell.bucket is not None
    assert cell.bucket.n_tokens == 10


def test_a_lost_lease_is_noticed_and_nothing_is_stored(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    store(config, say("a", tokens(1, 20), tokens(2, 10)))
    leases = Leases(Path(config.store))
    asked, stop = threading.Event(), threading.Event()
    renew = Leases.renew

    def lose(self: Leases, lease: Any, **now: Any) -> bool:
        held = renew(self, lease, **now)
        asked.set()
        return held

    def steal() -> None:
        taken = leases.acquire(backend.trainer.digest, worker="b", ttl_s=9.0, now=2e9)
        assert taken is not None
        assert asked.wait(timeout=30)

    quick = TeacherConfig(
        store=config.store,
        model=config.model,
        lease_s=1.0,
        noise_floor_trajectories=0,
        replay=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Leases, "renew", lose)

        def score(sequences: list[Forward]) -> list[SliceResult]:
            steal()
            stop.set()  # or it would wait for the thief
            return backend.score(sequences)

        report = teach(quick, Stub(backend, score), stop)
    assert (report.trajectories, report.scored, report.lost_leases) == (0, 0, 1)
    assert reader.scores("t") == []
    leases.close()


def test_foreign_ids_and_spellings_are_refused_with_the_reason(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    beyond = say("a", tokens(1, 5), [400, 401], logprobs=[-1.0, -1.0])
    assert beyond.response_ids is not None
    beyond.response_ids[1] = 151_000
    other = say("b", tokens(2, 5), [400, 401, 402], texts=[b" foo", b" bar", b""], trajectory="u")
    store(config, beyond, other)
    report = teach(config, backend)
    assert (report.scored, report.refused) == (0, 2)
    details = {row.meta.trace_id: row.meta.comparable for row in reader.scores()}
    for judged in details.values():
        assert judged.verdict == "no"
        assert [reason.code for reason in judged.reasons] == ["tokenizer_mismatch"]
    assert "151000 is outside" in details["a.0"].reasons[0].detail
    assert "2 of 3 response tokens are spelt differently" in details["b.0"].reasons[0].detail
    assert teach(config, backend).refused == 0, "they are not tried again"


def test_an_answer_without_tokens_doubts_nothing(
    config: TeacherConfig,
    backend: ReferenceBackend,
    say: Say,
    make_trace: MakeTrace,
    reader: Reader,
) -> None:
    """Stopped at once, or aborted. An earlier version stored that it could not be scored."""
    empty = make_trace("b", tokens(3, 20), [], step=1)
    store(config, say("a", tokens(1, 20), tokens(2, 40)), empty)
    assert teach(config, backend).refused == 0
    assert reader.trajectory("t").scored == reader.trajectory("t").scorable == 1
    why = Reason(code="incomplete_capture", detail="no ids or logprobs", fix="")
    writer = Writer(Path(config.store), name="earlier")
    writer.submit(refusal(empty.meta, why, trainer=backend.trainer, now_ns=9)).result(timeout=30)
    writer.close()
    (pair,) = pairs(reader, "t", reader.cells())
    assert judge(pair.subject, PROFILES["default"]).verdict == "train"
    assert (reader.counts().scorable, reader.counts().scored) == (1, 1)


def test_a_text_too_long_for_the_trainer_does_not_stop_the_others(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    store(config, say("a", tokens(1, 30), [400]), say("b", tokens(2, 5), [400], trajectory="u"))
    small = TeacherConfig(store=config.store, model=config.model, max_tokens=29)
    report = teach(small, backend)
    assert (report.scored, report.refused) == (1, 1)
    (reason,) = reader.score("a.0").meta.comparable.reasons
    assert (reason.code, reason.detail) == (
        "sequence_too_long",
        "30 tokens are more than the 29 that max_tokens allows",
    )


def test_a_text_too_long_for_the_model_is_not_blamed_on_max_tokens(
    config: TeacherConfig, backend: ReferenceBackend, make_trace: MakeTrace, reader: Reader
) -> None:
    store(config, make_trace("a", tokens(1, 8193), [400]))
    generous = TeacherConfig(store=config.store, model=config.model, max_tokens=100_000)
    assert teach(generous, backend).refused == 1
    (reason,) = reader.score("a.0").meta.comparable.reasons
    assert (
        reason.detail == "8193 tokens are more than the 8192 that the trainer's model was made for"
    )
    assert "max_tokens" not in reason.fix


def test_a_tokenizer_that_cannot_be_read_is_done_without(
    checkpoints: dict[CheckpointKind, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a newer version of the tokenizers library, which then raises a plain ``Exception``."""
    copy = Path(shutil.copytree(checkpoints["dense"], tmp_path / "copy"))
    spelt = json.loads((copy / "tokenizer.json").read_text())
    spelt["model"]["type"] = "FutureModel"
    (copy / "tokenizer.json").write_text(json.dumps(spelt))
    assert load_tokenizer(str(copy)) is None
    assert "only id ranges are checked" in caplog.text


def test_a_failing_trajectory_takes_no_other_with_it(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    store(config, say("a", tokens(1, 30), [400]), say("b", tokens(2, 5), [400], trajectory="u"))

    def score(sequences: list[Forward]) -> list[SliceResult]:
        if any(len(sequence.ids) > 10 for sequence in sequences):
            raise TeacherError("out of memory")
        return backend.score(sequences)

    report = teach(config, Stub(backend, score, parallel=2))
    assert (report.trajectories, report.scored, report.refused) == (2, 1, 1)
    (reason,) = reader.score("a.0").meta.comparable.reasons
    assert (reason.code, reason.detail) == ("scoring_failed", "out of memory")


def test_only_the_forwards_that_fail_alone_are_refused(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    """One too long for memory, of its own or the last turns of one that grew: not the others."""
    history = tokens(5, 90)
    for step, (name, prompt) in enumerate(
        {
            "a": tokens(1, 10),
            "b": tokens(3, 80),
            "c": history[:30],
            "d": history[:60],
            "e": history,
        }.items()
    ):
        store(config, say(name, prompt, [400, 401], step=step))
    fed: list[int] = []

    def score(sequences: list[Forward]) -> list[SliceResult]:
        fed.extend(len(sequence.ids) for sequence in sequences)
        if any(len(sequence.ids) > 70 for sequence in sequences):
            raise TeacherError("out of memory")
        return backend.score(sequences)

    report = teach(config, Stub(backend, score))
    assert (report.scored, report.refused) == (3, 2)
    scores = {row.meta.trace_id: row.meta for row in reader.scores(kind="drift")}
    assert {name for name, meta in scores.items() if meta.bucket is None} == {"b.0", "e.0"}
    (pair,) = pairs(reader, "t", reader.cells())
    (reason,) = judge(pair.subject, PROFILES["default"]).reasons
    assert (reason.code, reason.verdict) == ("NOT_COMPARABLE", "train_with_correction")
    assert "scoring_failed in step 1, 4" in reason.detail


def test_a_floor_that_cannot_be_measured_costs_no_score(
    config: TeacherConfig, backend: ReferenceBackend, say: Say
) -> None:
    store(config, say("a", tokens(1, 20), [400, 401]))
    calls: list[int] = []

    def score(sequences: list[Forward]) -> list[SliceResult]:
        calls.append(len(sequences))
        if len(calls) > 1:
            raise TeacherError("out of memory")
        return backend.score(sequences)

    report = teach(msgspec.structs.replace(config, replay=False), Stub(backend, score))
    assert (report.scored, report.refused, report.noise_floor) == (1, 0, 0)


def test_what_failed_is_tried_again_by_the_next_teacher_that_starts(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    store(config, say("a", tokens(1, 20), [400, 401]))

    def score(sequences: list[Forward]) -> list[SliceResult]:
        raise TeacherError("out of memory")

    assert teach(config, Stub(backend, score)).refused == 1
    assert teach(config, backend).scored == 1
    assert reader.score("a.0").meta.bucket is not None
    assert teach(config, backend).trajectories == 0


def test_what_fails_again_for_the_same_reason_is_not_written_again(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    store(config, say("a", tokens(1, 20), [400, 401]))
    short = msgspec.structs.replace(config, max_tokens=10)
    assert [teach(short, backend).refused for _ in range(3)] == [1, 1, 1]
    assert reader.last_seq() == 1
    assert teach(config, backend).scored == 1
    assert reader.score("a.0").meta.bucket is not None


def test_a_segment_that_is_away_refuses_nothing(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    store(config, say("a", tokens(1, 20), [400, 401]))
    (segment,) = (Path(config.store) / "segments").glob("*.dgs")
    store(config, say("b", tokens(2, 20), [400, 401], step=1))
    away = segment.rename(segment.with_suffix(".away"))
    assert (report := teach(config, backend)).scored == 1
    assert report.refused == 0
    assert any("a.0 is left unscored" in text for text in caplog.messages)
    away.rename(segment)
    assert teach(config, backend).scored == 1
    assert reader.score("a.0").meta.bucket is not None


def test_a_trajectory_that_ends_every_worker_is_refused(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    names = "abc"
    for n, name in enumerate(names):
        long = 30 if name == "b" else 5
        store(config, say(name, tokens(n, long), [400], trajectory=name))

    def score(sequences: list[Forward]) -> list[SliceResult]:
        if any(len(sequence.ids) > 10 for sequence in sequences):
            raise RuntimeError("an illegal memory access was encountered")
        return backend.score(sequences)

    lost = 0
    for _ in range(MAX_CRASHES + 4):
        try:
            teach(config, Stub(backend, score, parallel=3))
        except RuntimeError:
            lost += 1
        time_passes(config)
    assert lost == MAX_CRASHES
    scores = {row.meta.trajectory: row.meta for row in reader.scores(kind="drift")}
    assert set(scores) == set(names)
    assert [name for name in names if scores[name].bucket is None] == ["b"]
    (reason,) = scores["b"].comparable.reasons
    assert reason.code == "scoring_crashed"
    assert reason.detail == f"{MAX_CRASHES} workers ended while they scored trajectory b"


def time_passes(config: TeacherConfig) -> None:
    """All leases run out."""
    connection = sqlite3.connect(Path(config.store) / "index.sqlite")
    with connection:
        connection.execute("UPDATE leases SET expires = 0")
    connection.close()


def test_a_store_that_cannot_be_written_is_nobodys_crash(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(config, say("a", tokens(1, 5), [400]))

    def full(*_: object) -> None:
        raise StorageError("no space left on device")

    monkeypatch.setattr(Worker, "_store", full)
    with pytest.raises(StorageError):
        teach(config, backend)
    leases = Leases(Path(config.store))
    lease = leases.acquire(backend.trainer.digest, worker="next", ttl_s=9.0)
    leases.close()
    assert lease is not None
    assert lease.crashes == 0


def test_a_damaged_twin_costs_its_own_scores_only(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    store(config, *(say(name, tokens(1, 9), [400], trajectory=name, seed=7) for name in "ab"))
    damage(config, "b.0")
    report = teach(config, backend)
    assert (report.scored, report.refused, report.noise_floor) == (1, 1, 1)
    assert {reason.code for reason in reader.score("b.0").meta.comparable.reasons} == {
        "trace_unreadable"
    }


def damage(config: TeacherConfig, trace_id: str) -> None:
    """Flip a bit in the middle of a trace's record."""
    root = Path(config.store)
    connection = sqlite3.connect(root / "index.sqlite")
    name, offset, size = connection.execute(
        "SELECT segment, offset, size_bytes FROM traces WHERE trace_id = ?", (trace_id,)
    ).fetchone()
    connection.close()
    path = root / "segments" / name
    content = bytearray(path.read_bytes())
    content[offset + size // 2] ^= 1
    path.write_bytes(content)


def test_only_what_scoring_needs_stays_in_memory(say: Say) -> None:
    trace = say("a", tokens(1, 400), tokens(2, 6))
    assert trace.routes is not None
    held = hold(trace)
    assert held.routes is not None
    assert held.routes.base is None
    assert (held.routes == trace.routes[399:]).all()
    assert held.routes.nbytes == 6 * 4 * 4
    assert (held.trace.routes, held.trace.request, held.trace.response) == (None, b"", b"")


def test_routes_of_another_length_are_not_cut(say: Say) -> None:
    right = say("a", tokens(1, 40), tokens(2, 6))
    assert right.routes is not None
    held = hold(say("b", tokens(1, 40), tokens(2, 6), routes=right.routes[1:]))
    assert (held.routes, held.no_routes) == (
        None,
        "the engine gave 44 rows of routes, not P + R - 1",
    )

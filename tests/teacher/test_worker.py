"""The loop over a real store: nothing scored twice, nothing lost, nothing tried forever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from driftgate.errors import TeacherError
from driftgate.storage import Leases, Reader, Writer
from driftgate.teacher.base import SliceResult
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.reference import ReferenceBackend
from driftgate.teacher.sequences import Sequence as Forward
from driftgate.teacher.sequences import Slice
from driftgate.teacher.worker import Report, Worker
from driftgate.testing.checkpoints import CheckpointKind, make_checkpoint
from driftgate.trace import Engine, Trace

MakeTrace = Callable[..., Trace]
Say = Callable[..., Trace]


@pytest.fixture(scope="module")
def backend(checkpoints: dict[CheckpointKind, Path]) -> ReferenceBackend:
    return ReferenceBackend.load(TeacherConfig(store="unused", model=str(checkpoints["moe"])))


@pytest.fixture
def config(checkpoints: dict[CheckpointKind, Path], tmp_path: Path) -> TeacherConfig:
    return TeacherConfig(store=str(tmp_path / "store"), model=str(checkpoints["moe"]))


@pytest.fixture
def reader(config: TeacherConfig) -> Iterator[Reader]:
    reader = Reader(Path(config.store))
    yield reader
    reader.close()


@pytest.fixture(scope="module")
def say(
    checkpoints: dict[CheckpointKind, Path], backend: ReferenceBackend, make_trace: MakeTrace
) -> Say:
    """Traces of an engine that is the trainer itself: its drift is exactly 0.

    ``hot``: a temperature that it scales its logprobs by.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["moe"])

    def trace(
        name: str,
        prompt: Sequence[int],
        response: Sequence[int],
        *,
        hot: float | None = None,
        **more: Any,
    ) -> Trace:
        ids = np.asarray([*prompt, *response], np.int32)
        whole = Slice(trace_id="", prompt_len=1, response_ids=ids[1:], temperature=hot)
        (result,) = backend.score([Forward(ids=ids[:-1], slices=(whole,))])
        logprobs = result.logprobs if hot is None else result.at_temperature
        assert logprobs is not None
        given = {
            "logprobs": logprobs[len(prompt) - 1 :],
            "routes": result.routes,
            "texts": [tokenizer.decode([token]).encode() for token in response],
        }
        return make_trace(name, prompt, response, **{**given, **more})

    return trace


def store(config: TeacherConfig, *traces: Trace) -> None:
    writer = Writer(Path(config.store))
    for future in [writer.submit(trace) for trace in traces]:
        future.result(timeout=30)
    writer.close()


def teach(config: TeacherConfig, backend: Any) -> Report:
    worker = Worker(config, backend)
    try:
        return worker.run(threading.Event())
    finally:
        worker.close()


def tokens(seed: int, count: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(300, 1990, count).tolist()
    return found


def test_a_trajectory_is_scored_in_one_pass_and_once(
    config: TeacherConfig, backend: ReferenceBackend, say: Say
) -> None:
    ids = tokens(0, 60)
    store(config, say("a", ids[:20], ids[20:30]), say("b", ids[:40], ids[40:60], step=1))
    report = teach(config, backend)
    assert (report.trajectories, report.scored, report.refused) == (1, 2, 0)
    reader = Reader(Path(config.store))
    rows = reader.scores("t", kind="drift")
    assert [(row.meta.trace_id, row.meta.one_pass) for row in rows] == [
        ("a.0", True),
        ("b.0", False),
    ]
    last = reader.score("b.0")
    assert last.meta.bucket is not None
    assert last.meta.bucket.metrics()["abs_log_ratio_max"] == 0.0
    assert last.meta.comparable.verdict == "yes"
    assert last.logprobs.shape == last.entropy.shape == (20,)
    assert last.routes is not None
    assert last.routes.shape == (20, 4, 4)
    assert teach(config, backend).trajectories == 0
    reader.close()


def test_the_trainers_noise_floor_is_zero_and_taken_once(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    store(config, *(say(str(n), tokens(n, 9), tokens(-~n, 5), trajectory=str(n)) for n in range(4)))
    assert teach(config, backend).noise_floor == 2
    assert teach(config, backend).noise_floor == 0
    for row in reader.scores(kind="noise_floor"):
        assert row.meta.engine == row.meta.trainer == backend.trainer
        assert row.meta.bucket is not None
        assert row.meta.bucket.metrics()["abs_log_ratio_max"] == 0.0
        assert row.meta.router is not None
        assert row.meta.router.metrics()["router_set_disagree_rate"] == 0.0


def test_a_killed_workers_trajectory_is_taken_up_and_counted_once(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    store(config, say("a", tokens(1, 20), tokens(2, 10)))
    leases = Leases(Path(config.store))
    killed = leases.acquire(backend.trainer.digest, worker="killed", ttl_s=60.0)
    assert killed is not None
    assert teach(config, backend).trajectories == 0, "it is leased"
    late = leases.acquire(
        backend.trainer.digest, worker="late", ttl_s=60.0, now=killed.expires + 1.0
    )
    assert late is not None, "it has expired"
    assert not leases.renew(killed)
    leases.release(late)
    leases.close()
    assert teach(config, backend).scored == 1
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


class Slow:
    """A backend during whose forward another worker takes the trajectory over."""

    def __init__(self, real: ReferenceBackend, steal: Callable[[], None]) -> None:
        self._real, self._steal = real, steal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def score(self, sequences: list[Forward]) -> list[SliceResult]:
        self._steal()
        return self._real.score(sequences)


def test_a_lost_lease_is_noticed_and_nothing_is_stored(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    store(config, say("a", tokens(1, 20), tokens(2, 10)))
    leases = Leases(Path(config.store))
    asked = threading.Event()
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
        store=config.store, model=config.model, lease_s=1.0, noise_floor_trajectories=0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Leases, "renew", lose)
        report = teach(quick, Slow(backend, steal))
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
        "30 tokens are more than the trainer's limit of 29",
    )


class Failing(Slow):
    """Out of memory for every sequence of more than ten tokens."""

    parallel = 2

    def __init__(self, real: ReferenceBackend) -> None:
        super().__init__(real, lambda: None)

    def score(self, sequences: list[Forward]) -> list[SliceResult]:
        if any(len(sequence.ids) > 10 for sequence in sequences):
            raise TeacherError("out of memory")
        return super().score(sequences)


def test_a_failing_trajectory_takes_no_other_with_it(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    store(config, say("a", tokens(1, 30), [400]), say("b", tokens(2, 5), [400], trajectory="u"))
    report = teach(config, Failing(backend))
    assert (report.trajectories, report.scored, report.refused) == (2, 1, 1)
    (reason,) = reader.score("a.0").meta.comparable.reasons
    assert (reason.code, reason.detail) == ("scoring_failed", "out of memory")


def test_an_engine_that_repeats_itself_has_a_noise_floor_of_zero(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    runs = [say(name, tokens(1, 9), tokens(2, 6), trajectory=name, seed=7) for name in "ab"]
    store(config, *runs)
    assert teach(config, backend).noise_floor == 3, "two of the trainer, one of the engine"
    assert teach(config, backend).noise_floor == 0
    (row,) = [
        row for row in reader.scores(kind="noise_floor") if isinstance(row.meta.engine, Engine)
    ]
    assert row.meta.engine == row.meta.trainer == runs[0].meta.engine
    assert row.meta.trace_id == "b.0"
    assert row.meta.bucket is not None
    assert row.meta.bucket.n_tokens == 6
    assert row.meta.bucket.metrics()["abs_log_ratio_max"] == 0.0
    assert row.meta.comparable.reasons == []


def test_runs_that_diverge_are_compared_up_to_there(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    same, prompt = tokens(2, 6), tokens(1, 9)
    first = say("a", prompt, [*same, 400, 401], seed=7)
    second = say("b", prompt, [*same, 402], trajectory="u", seed=7)
    store(config, first, second)
    teach(config, backend)
    (row,) = [
        row for row in reader.scores(kind="noise_floor") if isinstance(row.meta.engine, Engine)
    ]
    assert row.meta.bucket is not None
    assert row.meta.bucket.n_tokens == 6
    (reason,) = row.meta.comparable.reasons
    assert reason.code == "samples_diverged"
    assert "share 6 tokens of 8 and 7" in reason.detail


def test_the_rotary_trap_is_found_and_named(
    config: TeacherConfig, checkpoints: dict[CheckpointKind, Path], say: Say, reader: Reader
) -> None:
    store(config, say("a", tokens(1, 300), tokens(2, 60)))
    model = AutoModelForCausalLM.from_pretrained(checkpoints["moe"], dtype=torch.float32)
    trapped = ReferenceBackend(model.to(torch.bfloat16).eval(), name="moe")
    assert trapped.trainer.settings["findings"] == "rotary_inv_freq_cast"
    teach(config, trapped)
    meta = reader.score("a.0").meta
    assert meta.comparable.verdict == "no"
    assert "rotary_inv_freq_cast" in {reason.code for reason in meta.comparable.reasons}
    assert meta.bucket is not None
    drift = meta.bucket.metrics()["abs_log_ratio_max"]
    assert isinstance(drift, float)
    assert drift > 0.01, "the numbers are kept, and they are wrong"


def test_a_wrong_checkpoint_is_suspected_by_its_numbers_alone(
    config: TeacherConfig,
    checkpoints: dict[CheckpointKind, Path],
    say: Say,
    reader: Reader,
    tmp_path: Path,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints["moe"])
    torch.manual_seed(0)
    prompt = tokens(1, 50)
    asked = torch.tensor([prompt])
    sampled = model.generate(asked, do_sample=True, top_k=0, min_new_tokens=99, max_new_tokens=99)
    store(config, say("a", prompt, sampled[0, 50:].tolist()))
    wrong = make_checkpoint(tmp_path / "wrong", "moe", seed=1)
    teach(config, ReferenceBackend.load(TeacherConfig(store="unused", model=str(wrong))))
    judged = reader.score("a.0").meta.comparable
    assert judged.verdict == "no"
    assert "checkpoint_mismatch_suspected" in {reason.code for reason in judged.reasons}


def codes(reader: Reader, trace_id: str) -> set[str]:
    return {reason.code for reason in reader.score(trace_id).meta.comparable.reasons}


def test_routes_shifted_by_one_row_are_found(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    right = say("right", tokens(1, 50), tokens(2, 100))
    assert right.routes is not None
    wrong = say(
        "wrong",
        tokens(1, 50),
        tokens(2, 100),
        routes=np.roll(right.routes, 1, axis=0),
        trajectory="u",
    )
    store(config, right, wrong)
    teach(config, backend)
    router = reader.score("right.0").meta.router
    assert router is not None
    assert router.metrics()["router_set_disagree_rate"] == 0.0
    assert "routes_misaligned" not in codes(reader, "right.0")
    assert "routes_misaligned" in codes(reader, "wrong.0")
    assert reader.score("wrong.0").meta.comparable.verdict == "no"


def test_scaled_logprobs_declared_raw_are_a_convention_error(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    store(config, say("a", tokens(1, 50), tokens(2, 100), hot=0.7, temperature=0.7))
    teach(config, backend)
    meta = reader.score("a.0").meta
    assert "logprob_convention_mismatch" in codes(reader, "a.0")
    assert meta.comparable.verdict == "no"
    assert meta.at_requested_temperature is not None
    assert meta.at_requested_temperature.metrics()["abs_log_ratio_max"] == 0.0


def test_processed_logprobs_are_compared_at_their_temperature(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    engine = Engine(name="e", version="1", model="tiny", logprobs_mode="processed_logprobs")
    store(config, say("a", tokens(1, 50), tokens(2, 100), hot=0.7, temperature=0.7, engine=engine))
    teach(config, backend)
    score = reader.score("a.0")
    assert score.meta.temperature == 0.7
    assert score.meta.bucket is not None
    assert score.meta.bucket.metrics()["abs_log_ratio_max"] == 0.0
    assert score.meta.comparable.verdict == "converted"
    assert score.logprobs_at_temperature is not None
    assert (score.logprobs_at_temperature != score.logprobs).all()


def test_following_scores_what_arrives_until_it_is_told_to_stop(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    follower = Worker(TeacherConfig(store=config.store, model=config.model, follow=True), backend)
    stop = threading.Event()
    done: list[Report] = []
    thread = threading.Thread(target=lambda: done.append(follower.run(stop)))
    thread.start()
    store(config, say("a", tokens(1, 20), tokens(2, 10)))
    scored = wait_until(lambda: reader.scores("t", kind="drift"))
    stop.set()
    thread.join(timeout=30)
    follower.close()
    assert len(scored) == 1
    assert done[0].scored == 1


def wait_until(read: Callable[[], list[Any]]) -> list[Any]:
    """What ``read`` gives as soon as it is not empty."""
    tick = threading.Event()
    for _ in range(3000):
        if rows := read():
            return rows
        tick.wait(0.01)
    raise AssertionError("nothing came in 30 s")

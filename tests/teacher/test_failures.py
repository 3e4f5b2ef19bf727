"""What goes wrong beside or inside the worker costs its own traces and nothing else."""


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

"""Each side against itself: what is 0, what is not, and that it is measured once."""


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

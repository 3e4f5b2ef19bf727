"""Each side against itself: what is 0, what is not, and that it is measured once."""

from __future__ import annotations

import numpy as np

from driftgate.storage import Reader
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.floors import ALONE, repeats
from driftgate.teacher.reference import ReferenceBackend
from driftgate.teacher.sequences import Sequence, Slice, assemble
from driftgate.trace import Engine
from tests.teacher.support import MakeTrace, Say, store, teach, tokens


def test_the_same_forward_twice_is_zero_and_taken_once(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    store(config, *(say(str(n), tokens(n, 9), tokens(-~n, 5), trajectory=str(n)) for n in range(4)))
    assert teach(config, backend).noise_floor == 2
    assert teach(config, backend).noise_floor == 0
    for row in reader.scores(kind="noise_floor"):
        assert row.meta.engine == row.meta.trainer == backend.trainer
        assert not row.meta.one_pass
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


def test_a_trace_inside_a_longer_sequence_is_compared_with_itself_alone(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    ids = np.asarray(tokens(0, 400), np.int32)
    store(config, say("a", ids[:40], ids[40:110]), say("b", ids[:370], ids[370:], step=1))
    teach(config, backend)
    floors = {row.meta.trace_id: row.meta for row in reader.scores(kind="noise_floor")}
    assert {name: meta.one_pass for name, meta in floors.items()} == {"a.0": True, "b.0": False}
    part = Slice(trace_id="a.0", prompt_len=40, response_ids=ids[40:110])
    (alone,) = backend.score([Sequence(ids=ids[:109], slices=(part,))])
    inside = reader.score("a.0", backend.trainer.digest)
    wanted = np.abs(alone.logprobs.astype(float) - inside.logprobs).max()
    seen = {}
    for name, meta in floors.items():
        assert meta.bucket is not None
        seen[name] = meta.bucket.metrics()["abs_log_ratio_max"]
    assert wanted > 0.0, "bfloat16 kernels follow the length"
    assert seen == {"a.0": wanted, "b.0": 0.0}


def test_a_long_trajectorys_floor_is_bounded(make_trace: MakeTrace) -> None:
    ids = list(range(101))
    traces = [make_trace(str(n), ids[: n + 1], ids[n + 1 : n + 2], step=n) for n in range(100)]
    (sequence,) = assemble(traces)
    again = repeats([sequence], {trace.meta.trace_id for trace in traces})
    assert again[0] is sequence
    assert 1 < len(again) <= 1 + ALONE
    for one in again[1:]:
        (part,) = one.slices
        assert not part.one_pass
        assert one.ids.tolist() == ids[: int(part.trace_id[:-2]) + 1]

"""The loop over a real store: what it scores, and what it finds wrong with the two sides."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from driftgate.storage import Reader
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.reference import ReferenceBackend
from driftgate.teacher.worker import Report, Worker
from driftgate.testing.checkpoints import CheckpointKind, make_checkpoint
from driftgate.trace import Engine
from tests.teacher.support import Say, store, teach, tokens


def test_a_trajectory_is_scored_in_one_pass_and_once(
    config: TeacherConfig, backend: ReferenceBackend, say: Say
) -> None:
    config = msgspec.structs.replace(config, weight_version="1")
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
    assert last.meta.trainer_weight_version == "1"
    assert last.logprobs.shape == last.entropy.shape == (20,)
    assert last.routes is not None
    assert last.routes.shape == (20, 4, 4)
    assert teach(config, backend).trajectories == 0
    reader.close()


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

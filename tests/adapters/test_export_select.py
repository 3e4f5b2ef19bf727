"""What is trained on and what is not: each reason planted, counted and named."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from driftgate import cli, codes
from driftgate.adapters import formats
from driftgate.adapters.export_base import MANIFEST, Manifest, read_export
from driftgate.adapters.export_select import REASONS, Selection
from driftgate.mismatch import Bucket
from driftgate.samples import Sample
from driftgate.storage import Reader, Record
from driftgate.testing.stores import BAD_TRAINER, write_store
from driftgate.testing.traces import make_intent, make_score, make_trace, make_trajectory
from driftgate.trace import CallOutcome, Comparable, Reward, Score, Trace

NO = Comparable(verdict="no")
UNSENT = "the answer was recorded before it was sent"


def called(*traces: Trace) -> Iterable[Record]:
    return itertools.chain.from_iterable((make_intent(trace), trace) for trace in traces)


def select(
    root: Path, records: Iterable[Record], **options: bool
) -> tuple[list[Sample], Selection]:
    selection = Selection(Reader(write_store(root, records)))
    for name, value in options.items():
        setattr(selection, name, value)
    found = list(selection.samples())
    selection.reader.close()
    return found, selection


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["export", *map(str, arguments)])


def drifted(trace: Trace, d: float, **meta: Any) -> Score:
    """A score whose every token has this log ratio."""
    assert trace.logprobs is not None
    bucket = Bucket.of(trace.logprobs + min(d, 0.0), trace.logprobs - max(d, 0.0))
    return make_score(trace, noise=0.0, bucket=bucket, **meta)


def planted(reason: str) -> list[Record]:
    """One trajectory of one trace that is left out for ``reason``."""
    made = make_trace(trajectory="bad")
    meta, score = made.meta, make_score(made, comparable=NO)
    changed = msgspec.structs.replace
    return {
        "no_tokens": [*called(replace(made, logprobs=None))],
        "incomplete_capture": [
            *called(replace(made, meta=changed(meta, missing=["routes: lost"])))
        ],
        "delivery_uncertain": [*called(replace(made, meta=changed(meta, delivery="uncertain")))],
        "bad_logprobs": [*called(replace(made, logprobs=np.full(5, np.nan, np.float32)))],
        "not_comparable": [*called(made), score],
        "quarantined": [*called(made), drifted(made, -12.0)],
        "trajectory_gap": [*called(made), make_intent(make_trace(trajectory="bad", step=1))],
    }[reason]


@pytest.mark.parametrize("reason", sorted(REASONS.keys() - {"damaged", "retried"}))
def test_each_reason_leaves_its_trace_out(tmp_path: Path, reason: str) -> None:
    good = make_trace(trajectory="good")
    found, selection = select(tmp_path, [*called(good), *planted(reason)])
    assert [sample.meta.trajectory for sample in found] == ["good"]
    assert selection.left_out[reason] == 1
    with_it = {"trajectory_gap"} | ({"quarantined"} if reason == "not_comparable" else set())
    assert set(selection.left_out) <= {reason} | with_it
    assert selection.damaged == []


@pytest.mark.parametrize(
    "reason",
    ["incomplete_capture", "delivery_uncertain", "not_comparable", "quarantined", "trajectory_gap"],
)
def test_what_can_be_trained_on_is_kept_with_a_flag_if_asked(tmp_path: Path, reason: str) -> None:
    found, selection = select(tmp_path, planted(reason), include_incomplete=True)
    (sample,) = found
    assert reason in sample.meta.flags
    assert not selection.left_out


@pytest.mark.parametrize("reason", ["no_tokens", "bad_logprobs"])
def test_what_cannot_be_trained_on_is_never_kept(tmp_path: Path, reason: str) -> None:
    found, selection = select(tmp_path, planted(reason), include_incomplete=True)
    assert found == []
    assert selection.left_out[reason] == 1


def cut(trace: Trace) -> Trace:
    return replace(trace, meta=msgspec.structs.replace(trace.meta, delivery="uncertain"))


@pytest.mark.parametrize("include", [False, True])
def test_an_answer_that_was_cut_and_asked_for_again_is_never_a_sample(
    tmp_path: Path, include: bool
) -> None:
    lost, again = cut(make_trace()), make_trace(call_id="again", retry=1)
    (sample,), selection = select(tmp_path, called(lost, again), include_incomplete=include)
    assert sample.meta.spans[0].trace_id == again.meta.trace_id
    assert selection.left_out["retried"] == 1


def test_one_that_was_sent_whole_and_asked_for_again_is_kept_if_asked(tmp_path: Path) -> None:
    """A retry header does not say which call it repeats: the answer may have been used."""
    sent, again = make_trace(), make_trace(call_id="again", retry=1, seed=1)
    found, selection = select(tmp_path / "a", called(sent, again))
    assert [sample.meta.sample_id for sample in found] == [again.meta.trace_id]
    assert selection.left_out == {"retried": 1}
    found, _ = select(tmp_path / "b", called(sent, again), include_incomplete=True)
    assert [sample.meta.flags for sample in found] == [["retried"], []]


def test_the_score_of_an_answer_that_a_retry_replaced_decides_nothing(tmp_path: Path) -> None:
    lost, again = cut(make_trace(response=200)), make_trace(call_id="again", retry=1)
    nothing = make_score(lost, comparable=NO, bucket=Bucket(n_bad_tokens=200))
    found, _ = select(tmp_path, [*called(lost, again), nothing, drifted(again, 0.0)])
    assert [sample.meta.verdict for sample in found] == ["train"]


def test_a_token_without_a_trainers_number_takes_its_answer_out_of_the_loss(tmp_path: Path) -> None:
    """Minus infinity: the verdict says to mask it."""
    one, two = list(make_trajectory(steps=2, response=40))
    assert one.logprobs is not None
    train = one.logprobs.copy()
    train[3] = -np.inf
    score = make_score(one, bucket=Bucket.of(train, one.logprobs))
    found, selection = select(tmp_path, [*called(one, two), score, drifted(two, 0.0)])
    (sample,) = found
    assert [span.step for span in sample.meta.spans] == [1]
    assert selection.left_out == {"not_comparable": 1}


def test_what_is_scored_so_far_can_condemn_a_run_and_not_acquit_it(tmp_path: Path) -> None:
    one, two = list(make_trajectory(steps=2))
    found, selection = select(tmp_path / "bad", [*called(one, two), drifted(one, -12.0)])
    assert found == []
    assert selection.left_out == {"quarantined": 2}
    half = [drifted(one, -12.0), drifted(two, 0.0, trainer=BAD_TRAINER)]
    assert select(tmp_path / "halves", [*called(one, two), *half])[0] == []
    found, _ = select(tmp_path / "good", [*called(one, two), drifted(one, 0.0)])
    assert [sample.meta.verdict for sample in found] == [None]


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("bad_logprobs", {"mode": "raw_logits"}),
        ("bad_logprobs", {"logprob": 0.5}),
        ("not_comparable", {"structured": "tool_choice=required"}),
        ("not_comparable", {"mode": "processed_logprobs", "top_p": 0.9}),
    ],
)
def test_what_a_trace_declares_needs_no_trainer(
    tmp_path: Path, reason: str, changes: dict[str, Any]
) -> None:
    made = make_trace()
    assert made.logprobs is not None
    made.logprobs[2] = changes.pop("logprob", -1.0)
    mode = changes.pop("mode", "raw_logprobs")
    change = msgspec.structs.replace
    made.meta.engine = change(made.meta.engine, logprobs_mode=mode)
    made.meta.sampling = change(made.meta.sampling, **changes)
    found, selection = select(tmp_path, called(made))
    assert found == []
    assert selection.left_out == {reason: 1}


def test_one_trainer_that_can_compare_is_enough(tmp_path: Path) -> None:
    made = make_trace()
    scores = [make_score(made), make_score(made, comparable=NO, trainer=BAD_TRAINER)]
    found, _ = select(tmp_path, [*called(made), *scores])
    assert len(found) == 1


def test_only_the_step_that_cannot_be_compared_is_masked(tmp_path: Path) -> None:
    """One of three steps has a forced tool call, at 25 nats: the verdict says to mask it."""
    steps = list(make_trajectory(steps=3))
    why = Comparable(verdict="no", reasons=[codes.reason("grammar_masked", "tool", "free it")])
    scores = [drifted(steps[0], -25.0, comparable=why), *(drifted(t, 0.0) for t in steps[1:])]
    found, selection = select(tmp_path, [*called(*steps), *scores])
    (sample,) = found
    assert [span.step for span in sample.meta.spans] == [1, 2]
    assert sample.mask.sum() == 10
    assert sample.tokens.size == len(sample.mask) > 10
    assert selection.left_out == {"not_comparable": 1}


def test_a_reason_that_doubts_a_side_leaves_the_whole_run_out(tmp_path: Path) -> None:
    steps = list(make_trajectory(steps=3))
    why = Comparable(verdict="no", reasons=[codes.reason("tokenizer_mismatch", "two", "one")])
    scores = [drifted(steps[0], 0.0, comparable=why), *(drifted(t, 0.0) for t in steps[1:])]
    found, selection = select(tmp_path, [*called(*steps), *scores])
    assert found == []
    assert selection.left_out == {"not_comparable": 1, "quarantined": 3}


def test_one_trainer_that_lets_a_run_pass_is_enough(tmp_path: Path) -> None:
    made = make_trace()
    scores = [drifted(made, -12.0), drifted(made, 0.0, trainer=BAD_TRAINER)]
    assert len(select(tmp_path, [*called(made), *scores])[0]) == 1


def test_an_answer_that_could_not_be_sent_is_left_out_and_its_run_is_whole(tmp_path: Path) -> None:
    """In ``strict`` it is recorded as delivered first, and taken back by an outcome."""
    one, two = list(make_trajectory(steps=2))
    lost = CallOutcome(call_id=two.meta.call_id, status="cancelled", reason=UNSENT, ended_ns=9)
    found, selection = select(tmp_path, [*called(one, two), lost])
    assert [span.step for sample in found for span in sample.meta.spans] == [0]
    assert selection.left_out == {"delivery_uncertain": 1}


def test_an_answer_that_is_left_out_is_context_of_the_next(tmp_path: Path) -> None:
    one, two = list(make_trajectory(steps=2))
    lost = replace(one, meta=msgspec.structs.replace(one.meta, delivery="uncertain"))
    found, selection = select(tmp_path, called(lost, two))
    (sample,) = found
    assert [span.step for span in sample.meta.spans] == [1]
    assert sample.mask.sum() == 5
    assert selection.left_out == {"delivery_uncertain": 1}


def test_a_reward_is_of_every_sample_of_its_trajectory(tmp_path: Path) -> None:
    root, *_ = steps = list(make_trajectory(steps=2))
    other = make_trace(step=1, choice=1, n=2, base=root, call_id="t1-other")
    reward = Reward(trajectory="t1", value=0.5, given_ns=1)
    found, _ = select(tmp_path, [*called(*steps, other), reward], include_incomplete=True)
    assert [sample.meta.reward for sample in found] == [0.5, 0.5]


def test_calls_stay_apart_if_asked(tmp_path: Path) -> None:
    found, _ = select(tmp_path, called(*make_trajectory(steps=3)), per_trace=True)
    assert [len(sample.meta.spans) for sample in found] == [1, 1, 1]


def test_models_are_never_joined(tmp_path: Path) -> None:
    one, two = list(make_trajectory(steps=2))
    other = replace(two, meta=msgspec.structs.replace(two.meta, model="another"))
    found, _ = select(tmp_path, called(one, other))
    assert [sample.meta.model for sample in found] == ["tiny-moe", "another"]


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A store whose second of three trajectories has a flipped byte."""
    root = tmp_path / "store"
    traces = [make_trace(trajectory=name, started_ns=n) for n, name in enumerate("abc", 1)]
    write_store(root, [record for trace in traces for record in called(trace)])
    (segment,) = root.glob("**/*.dgs")
    data = bytearray(segment.read_bytes())
    reader = Reader(root)
    offset = (
        reader._connections.get()
        .execute("SELECT offset FROM traces WHERE trajectory = 'b'")
        .fetchone()[0]
    )
    reader.close()
    data[offset + 60] ^= 0xFF
    segment.write_bytes(data)
    return root


def test_a_damaged_trace_is_named_and_the_rest_is_exported(damaged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("--format", "trl", "--store", damaged, "-o", out)
    assert result.exit_code == 1
    assert "2 samples, 10 sampled tokens, 1 shard in" in result.stderr
    assert "left out: 1 trace, damaged: could not be read" in result.stderr
    assert "damaged: trace b-0.0: " in result.stderr
    found = read_export(out, formats.load("trl"))
    assert [sample.meta.trajectory for sample in found] == ["a", "c"]
    manifest = msgspec.json.decode((out / MANIFEST).read_bytes(), type=Manifest)
    assert manifest.left_out == {"damaged": 1}
    assert len(manifest.damaged) == 1


def test_json_lines_go_on_after_a_damaged_trace(damaged: Path) -> None:
    result = run("--store", damaged)
    assert result.exit_code == 1
    rows = [msgspec.json.decode(line) for line in result.stdout.splitlines()]
    assert [row["trajectory"] for row in rows] == ["a", "c"]
    assert "damaged: trace b-0.0: " in result.stderr


def test_a_folder_has_to_be_named(damaged: Path) -> None:
    result = run("--format", "verl", "--store", damaged)
    assert result.exit_code == 2
    assert "verl writes a folder: name it" in result.stderr


def test_what_is_missing_to_write_a_format_is_named(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    result = run("--format", "parquet", "--store", damaged, "-o", tmp_path / "out")
    assert "--format parquet needs pyarrow: pip install" in str(result.exception)

"""What is trained on and what is not: each reason planted, counted and named."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from driftgate import cli
from driftgate.adapters import formats
from driftgate.adapters.export_base import MANIFEST, Manifest, read_export
from driftgate.adapters.export_select import REASONS, Selection
from driftgate.samples import Sample
from driftgate.storage import Reader, Record
from driftgate.testing.stores import BAD_TRAINER, write_store
from driftgate.testing.traces import make_intent, make_score, make_trace, make_trajectory
from driftgate.trace import Comparable, Reward, Trace

NO = Comparable(verdict="no")


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
        "trajectory_gap": [*called(made), make_intent(make_trace(trajectory="bad", step=1))],
    }[reason]


@pytest.mark.parametrize("reason", sorted(REASONS.keys() - {"damaged", "retried"}))
def test_each_reason_leaves_its_trace_out(tmp_path: Path, reason: str) -> None:
    good = make_trace(trajectory="good")
    found, selection = select(tmp_path, [*called(good), *planted(reason)])
    assert [sample.meta.trajectory for sample in found] == ["good"]
    assert selection.left_out[reason] == 1
    assert set(selection.left_out) <= {reason, "trajectory_gap"}
    assert selection.damaged == []


@pytest.mark.parametrize(
    "reason", ["incomplete_capture", "delivery_uncertain", "not_comparable", "trajectory_gap"]
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


@pytest.mark.parametrize("include", [False, True])
def test_an_answer_that_was_asked_for_again_is_never_a_sample(
    tmp_path: Path, include: bool
) -> None:
    lost, again = make_trace(), make_trace(call_id="again", retry=1)
    (sample,), selection = select(tmp_path, called(lost, again), include_incomplete=include)
    assert sample.meta.spans[0].trace_id == again.meta.trace_id
    assert selection.left_out == {"retried": 1}


def test_one_trainer_that_can_compare_is_enough(tmp_path: Path) -> None:
    made = make_trace()
    scores = [make_score(made), make_score(made, comparable=NO, trainer=BAD_TRAINER)]
    found, _ = select(tmp_path, [*called(made), *scores])
    assert len(found) == 1


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
    assert "2 samples, 10 sampled tokens, 1 shards" in result.stderr
    assert "left out: 1 traces, damaged: could not be read" in result.stderr
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

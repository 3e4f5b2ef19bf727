"""Every export format leads back to the canonical sample, bit for bit, and holds its contract."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftgate.adapters import formats
from driftgate.adapters.export_base import (
    MANIFEST,
    Format,
    Manifest,
    padded_routes,
    read_export,
    sample_of,
    write_export,
)
from driftgate.adapters.nemo_rl import decode_routes, encode_routes
from driftgate.adapters.prime_rl import TrainingSample
from driftgate.adapters.slime import sample_dict
from driftgate.adapters.verl import batch_of
from driftgate.commands.export import FormatOption
from driftgate.errors import DriftgateError
from driftgate.samples import Sample, assemble, lines
from driftgate.testing.traces import make_trace, make_trajectory
from driftgate.testing.trajectories import runs
from driftgate.trace import Sampling, Trace

NAMES = [name for name in get_args(FormatOption) if name != "jsonl"]
rewards = st.none() | st.floats(allow_nan=False, allow_infinity=False, width=32)


def samples_of(traces: list[Trace], reward: float | None = None) -> list[Sample]:
    found = lines([(t.prompt_ids, t.response_ids) for t in traces])  # type: ignore[misc]
    return [assemble((traces[i] for i in line), reward=reward) for line in found]


def export(samples: list[Sample], out: Path, name: str, limit: int = 1 << 28) -> Format:
    fmt = formats.load(name)
    write_export(samples, out, fmt, left_out={}, damaged=[], shard_bytes=limit)
    return fmt


def assert_same(a: Sample, b: Sample) -> None:
    for name in (field.name for field in fields(Sample)):
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
            assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name
        else:
            assert x == y, name


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(traces=runs(), wide=runs(experts=300), reward=rewards)
def test_reading_gives_back_what_the_layout_can_hold(
    name: str, traces: list[Trace], wide: list[Trace], reward: float | None
) -> None:
    renamed = [replace(t, meta=msgspec.structs.replace(t.meta, model="wide")) for t in wide]
    samples = [*samples_of(traces, reward), *samples_of(renamed, None)]
    with TemporaryDirectory() as folder:
        fmt = export(samples, Path(folder), name)
        found = read_export(Path(folder), fmt)

    def name_of(sample: Sample) -> tuple[str, str]:
        return sample.meta.model, sample.meta.sample_id

    pairs = zip(sorted(samples, key=name_of), sorted(found, key=name_of), strict=True)
    for given_, got in pairs:
        assert_same(got, fmt.carries(given_))


@pytest.mark.parametrize("name", NAMES)
def test_whole_routes_are_carried_wherever_there_is_a_place(name: str) -> None:
    (sample,) = samples_of(list(make_trajectory(steps=3)))
    carried = formats.load(name).carries(sample)
    assert (carried.routes is None) == (name == "trl")


@pytest.mark.parametrize("name", ["verl", "slime", "miles", "prime-rl", "skyrl"])
def test_trainers_that_replay_every_row_never_get_a_made_up_one(name: str) -> None:
    one, two = list(make_trajectory(steps=2))
    (sample,) = samples_of([one, replace(two, routes=None)])
    assert sample.routes is not None
    assert formats.load(name).carries(sample).routes is None


@pytest.mark.parametrize("name", NAMES)
def test_shards_are_bounded_and_hold_like_samples(name: str, tmp_path: Path) -> None:
    samples = [
        assemble([make_trace(trajectory=f"t{n}", routed=n not in (3, 4))], reward=0.0)
        for n in range(8)
    ]
    size = 17 * (32 + 16 * formats.load(name).route_bytes)
    fmt = export(samples, tmp_path, name, limit=2 * size)
    manifest = msgspec.json.decode((tmp_path / MANIFEST).read_bytes(), type=Manifest)
    assert sum(shard.samples for shard in manifest.shards) == 8
    if name != "trl":
        assert sorted(shard.samples for shard in manifest.shards) == [2, 2, 2, 2]
    found = sorted(s.meta.trajectory for s in read_export(tmp_path, fmt))
    assert found == [f"t{n}" for n in range(8)]


def test_models_that_come_by_turns_share_no_shard_and_fill_their_own(tmp_path: Path) -> None:
    samples = [
        assemble([make_trace(trajectory=f"t{n}", model=f"m{n % 2}")], reward=0.0) for n in range(20)
    ]
    export(samples, tmp_path, "slime")
    manifest = msgspec.json.decode((tmp_path / MANIFEST).read_bytes(), type=Manifest)
    assert [shard.samples for shard in manifest.shards] == [10, 10]


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(DriftgateError, match="is not empty"):
        export([], tmp_path, "trl")
    with pytest.raises(DriftgateError, match="is missing: the export is not whole"):
        read_export(tmp_path, formats.load("trl"))


def test_an_expert_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    trace = make_trace(experts=300, k=2)
    assert trace.routes is not None
    high = trace.routes.copy()
    high[0, 0, 0] = 40_000
    with pytest.raises(DriftgateError, match=r"verl cannot hold t1-0\.0: expert id 40000 does not"):
        export([assemble([replace(trace, routes=high)], reward=None)], tmp_path, "verl")


def test_a_shard_that_is_not_its_metas_is_refused() -> None:
    sample = assemble([make_trace(prompt=2, response=2)], reward=None)
    with pytest.raises(ValueError, match="the shard's mask is not that of its meta"):
        sample_of(sample.meta, sample.tokens, [1, 1, 1], [0.0])


@given(traces=runs(), reward=rewards)
def test_verl_by_brute_force(traces: list[Trace], reward: float | None) -> None:
    samples = [formats.load("verl").carries(s) for s in samples_of(traces, reward)]
    kinds = Counter(s.routes is None for s in samples)
    samples = [s for s in samples if (s.routes is None) == kinds.most_common(1)[0][0]]
    batch = batch_of(samples)
    prompts = max(s.meta.prompt_len for s in samples)
    assert {key: array.dtype.name for key, array in batch.items()} == {
        **dict.fromkeys(
            ("prompts", "responses", "input_ids", "attention_mask", "position_ids"), "int64"
        ),
        "response_mask": "int64",
        "rollout_log_probs": "float32",
        **({"routed_experts": "int16"} if samples[0].routes is not None else {}),
        **({} if reward is None else {"rm_scores": "float32"}),
    }
    for row, sample in enumerate(samples):
        for column in range(batch["input_ids"].shape[1]):
            position = column - (prompts - sample.meta.prompt_len)
            real = 0 <= position < sample.meta.tokens
            assert batch["attention_mask"][row, column] == real
            if real:
                assert batch["position_ids"][row, column] == position
                assert batch["input_ids"][row, column] == sample.tokens[position]
            if sample.routes is not None:
                fed = 0 <= position < sample.meta.tokens - 1
                expected = sample.routes[position] if fed else np.zeros((2, 2))
                assert np.array_equal(batch["routed_experts"][row, column], expected)
            if column >= prompts:
                place = column - prompts
                sampled = real and bool(sample.mask[position])
                assert batch["response_mask"][row, place] == sampled
                logprob = sample.logprobs[position] if sampled else 0.0
                assert batch["rollout_log_probs"][row, place] == logprob
                if reward is not None:
                    last = position == sample.meta.tokens - 1
                    assert batch["rm_scores"][row, place] == (np.float32(reward) if last else 0)


def test_a_missing_reward_is_no_zero() -> None:
    with_reward = assemble([make_trace()], reward=0.0)
    without = assemble([make_trace(trajectory="t2")], reward=None)
    scores = batch_of([with_reward, without])["rm_scores"]
    assert scores[0, -1] == 0.0
    assert math.isnan(scores[1, -1])
    assert sample_dict(without, 0)["reward"] is None


@given(traces=runs(), reward=rewards)
def test_slime_keeps_the_lengths_that_it_validates(
    traces: list[Trace], reward: float | None
) -> None:
    for index, sample in enumerate(map(formats.load("slime").carries, samples_of(traces, reward))):
        row = sample_dict(sample, index)
        assert len(row["loss_mask"]) == len(row["rollout_log_probs"]) == row["response_length"]
        assert row["response_length"] <= len(row["tokens"])
        assert sum(row["loss_mask"]) == sum(s.end - s.start for s in sample.meta.spans)
        routes = row["rollout_routed_experts"]
        if routes is not None:
            assert (routes.dtype, len(routes)) == (np.int32, len(row["tokens"]) - 1)
            assert routes.min() >= 0


def test_prime_rl_is_positional(tmp_path: Path) -> None:
    trace = make_trace(prompt=2, response=2, layers=1, k=2, experts=4)
    export([assemble([trace], reward=None)], tmp_path, "prime-rl")
    (row,) = msgspec.msgpack.decode((tmp_path / "shard-00000.msgpack").read_bytes())
    assert len(row) == len(TrainingSample.__struct_fields__) == 16
    tokens, mask, _, temperatures, env, *_ = row
    assert len(tokens) == len(temperatures) == 4
    assert (mask, env, row[14]) == ([False, False, True, True], "driftgate", "t1-0.0")
    data, shape, dtype = row[7]
    rows = np.frombuffer(data, dtype).reshape(shape)
    assert (shape, dtype) == ([4, 1, 2], "uint8")
    assert trace.routes is not None
    assert np.array_equal(rows[:3], trace.routes)
    assert rows[3].tolist() == [[0, 1]]
    assert TrainingSample.__struct_fields__[7] == "routed_experts"


@pytest.mark.parametrize(
    ("mode", "asked", "divided", "elsewhere"),
    [
        ("raw_logprobs", 0.7, 1.0, 1),
        ("processed_logprobs", 0.7, 0.7, 0),
        ("unknown", 0.7, 0.7, 1),
        ("unknown", None, 1.0, 1),
        ("processed_logprobs", None, 1.0, 1),
        ("raw_logprobs", None, 1.0, 1),
        ("raw_logprobs", 0.0, 1.0, 0),
        ("processed_logprobs", 0.0, 1.0, 0),
    ],
)
def test_prime_rl_divides_by_the_temperature_that_the_logprobs_are_at(
    tmp_path: Path, mode: Any, asked: float | None, divided: float, elsewhere: int
) -> None:
    made = make_trace(prompt=2, response=2, sampling=Sampling(temperature=asked))
    made.meta.engine = msgspec.structs.replace(made.meta.engine, logprobs_mode=mode)
    export([assemble([made], reward=None)], tmp_path, "prime-rl")
    (row,) = msgspec.msgpack.decode((tmp_path / "shard-00000.msgpack").read_bytes())
    assert row[3] == [1.0, 1.0, divided, divided]
    manifest = msgspec.json.decode((tmp_path / MANIFEST).read_bytes(), type=Manifest)
    assert (manifest.other_temperature, manifest.verdicts) == (elsewhere, {"none": 1})


def test_skyrl_numbers_the_lines_of_a_run_over_all_shards(tmp_path: Path) -> None:
    lines_of_run = [make_trace(prompt=2, response=2, routed=n != 1, seed=n) for n in range(3)]
    samples = [assemble([t], reward=0.0, line=n) for n, t in enumerate(lines_of_run)]
    export(samples, tmp_path, "skyrl")
    names = [
        (one["instance_id"], one["repetition_id"])
        for shard in sorted(tmp_path.glob("shard-*.json"))
        if not shard.name.endswith(".meta.jsonl")
        for one in msgspec.json.decode(shard.read_bytes())["trajectory_ids"]
    ]
    assert sorted(names) == [("t1", 0), ("t1", 1), ("t1", 2)]


@given(st.sampled_from(["int8", "int16", "int32"]), st.integers(0, 5), st.integers(0, 3))
def test_nemo_rls_envelope(dtype: str, rows: int, layers: int) -> None:
    routes = np.arange(rows * layers * 2, dtype=dtype).reshape(rows, layers, 2) - 1
    envelope = encode_routes(routes)
    assert envelope.startswith(f"nrlre1:{dtype}:{rows}x{layers}x2:")
    assert decode_routes(envelope).tolist() == routes.tolist()


def test_nemo_rls_envelope_of_a_known_array() -> None:
    array = np.arange(4, dtype=np.int16).reshape(2, 1, 2)
    assert encode_routes(array) == "nrlre1:int16:2x1x2:AAABAAIAAwA="


@pytest.mark.parametrize("text", ["", "nrlre1:uint8:1x1x1:AA==", "nrlre2:int8:1x1x1:AA=="])
def test_other_texts_are_no_envelope(text: str) -> None:
    with pytest.raises(ValueError, match="is no nrlre1"):
        decode_routes(text)


def test_nemo_rl_has_a_row_of_minus_one_where_it_must_route_itself(tmp_path: Path) -> None:
    one, two = list(make_trajectory(steps=2, prompt=2, response=2, layers=1, k=2))
    export(samples_of([one, replace(two, routes=None)]), tmp_path, "nemo-rl")
    line = msgspec.json.decode((tmp_path / "shard-00000.jsonl").read_bytes())
    routes = [decode_routes(m["routed_experts"]) for m in line["message_log"]]
    assert [len(r) for r in routes] == [len(m["token_ids"]) for m in line["message_log"]]
    assert one.routes is not None
    joined = np.concatenate(routes)
    assert np.array_equal(joined[:3], one.routes)
    assert (joined[3:] == -1).all()
    assert [m["role"] for m in line["message_log"]] == ["user", "assistant"] * 2


def test_sentinels_are_beyond_the_known_rows() -> None:
    (sample,) = samples_of(list(make_trajectory(steps=1, prompt=2, response=2)))
    rows = padded_routes(sample, 6, np.int16)
    assert sample.routes is not None
    assert np.array_equal(rows[:3], sample.routes)
    assert (rows[3:] == -1).all()

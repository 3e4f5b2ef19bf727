"""Scores under the rollout's routes: what they remove, what they must not change, why there are
none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from driftgate.replay import ReplayPair
from driftgate.storage import Reader
from driftgate.teacher.base import SliceResult
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.held import hold
from driftgate.teacher.reference import ReferenceBackend
from driftgate.teacher.replay import Replayed, Replayer, plan, usable
from driftgate.teacher.scores import drift
from driftgate.teacher.sequences import Replay, Sequence, Slice, assemble
from driftgate.testing.checkpoints import CheckpointKind
from driftgate.testing.traces import TRAINER, make_trajectory
from driftgate.trace import Score, Trace
from tests.teacher.support import MakeTrace, Say, store, teach, tokens

ABS, K3 = "replay_removes_abs_log_ratio_mean", "replay_removes_kl_k3_rollout_train"
ONE_PASS = 1e-4
"""Nats, float32: what a longer sequence changes by its tiling alone."""


@pytest.fixture(scope="module")
def exact(checkpoints: dict[CheckpointKind, Path]) -> ReferenceBackend:
    config = TeacherConfig(store="unused", model=str(checkpoints["moe"]), dtype="float32")
    return ReferenceBackend.load(config)


def routed(rows: int, seed: int) -> npt.NDArray[np.uint8]:
    """Routes [rows, 4, 4] that no router chose."""
    rng = np.random.default_rng(seed)
    return rng.random((rows, 4, 16)).argsort(-1)[..., :4].astype(np.uint8)


def whole(ids: npt.NDArray[np.int32], prompt: int, routes: Any = None) -> Sequence:
    part = Slice(trace_id="a.0", prompt_len=prompt, response_ids=ids[prompt:], temperature=0.7)
    known = None if routes is None else Replay(routes=routes, given=usable(routes, 16))
    return Sequence(ids=ids[:-1], slices=(part,), replay=known)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_routes_replayed_give_the_native_numbers_to_the_bit(
    checkpoints: dict[CheckpointKind, Path], dtype: Any
) -> None:
    config = TeacherConfig(store="unused", model=str(checkpoints["moe"]), dtype=dtype)
    backend = ReferenceBackend.load(config)
    ids = np.asarray(tokens(0, 120), np.int32)
    (native,) = backend.score([whole(ids, 1)])
    assert native.routes is not None
    (again,) = backend.score([whole(ids, 1, native.routes[..., ::-1].copy())])
    assert (again.logprobs == native.logprobs).all()
    assert (again.entropy == native.entropy).all()
    (other,) = backend.score([whole(ids, 1, routed(119, 1))])
    assert np.abs(other.logprobs - native.logprobs).max() > 0.1, "routes do matter here"


@pytest.fixture
def biased() -> tuple[ReferenceBackend, ReferenceBackend]:
    """Two models that differ in the bias by which their routers choose, and in nothing else: it
    has no part in the weights of what was chosen."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=2000, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=2,
        num_key_value_heads=2, n_routed_experts=16, num_experts_per_tok=4, n_group=4,
        topk_group=2, q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=16, initializer_range=0.3, max_position_embeddings=512,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).eval()
    other = DeepseekV3ForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    for layer in other.model.layers[1:]:
        bias = layer.mlp.gate.e_score_correction_bias
        bias.data += 0.05 * torch.randn(bias.shape)
    return ReferenceBackend(model, name="engine"), ReferenceBackend(other, name="trainer")


def test_drift_that_is_routing_alone_is_removed_whole(
    biased: tuple[ReferenceBackend, ReferenceBackend],
    config: TeacherConfig,
    make_trace: MakeTrace,
    reader: Reader,
) -> None:
    engine, trainer = biased
    ids = np.asarray(tokens(3, 150), np.int32)
    (spoken,) = engine.score([whole(ids, 1)])
    assert spoken.layer_ids == (1, 2)
    assert spoken.routes is not None
    full = np.zeros((149, 3, 4), np.uint8)  # an engine counts its dense layer, and leaves it empty
    full[:, 1:] = spoken.routes
    trace = make_trace("a", ids[:50], ids[50:], logprobs=spoken.logprobs[49:], routes=full)
    store(config, trace)
    teach(config, trainer)
    score = reader.score("a.0")
    assert score.meta.router is not None
    changed = score.meta.router.metrics()["router_set_disagree_rate"]
    assert isinstance(changed, float)
    assert 0.01 < changed < 0.9
    drift, left = mean_abs(score)
    assert drift > 0.05
    assert left < 1e-5, "float32 of weights in another order"
    pair = ReplayPair.of(score.meta)
    assert pair is not None
    assert pair.coverage == 1.0
    shares = pair.shares()
    assert shares[ABS] == pytest.approx(1 - left / drift)
    assert shares[ABS] == pytest.approx(1.0, abs=1e-3)
    assert shares[K3] == pytest.approx(1.0, abs=1e-3)
    assert score.logprobs_replay is not None
    np.testing.assert_allclose(score.logprobs_replay, spoken.logprobs[49:], atol=1e-4)


def mean_abs(score: Score) -> tuple[float, float]:
    """mean|D| natively and under replay."""
    assert score.meta.bucket is not None
    assert score.meta.replay is not None
    n = score.meta.bucket.n_tokens
    assert score.meta.replay.n_tokens == n
    return score.meta.bucket.sum_abs / n, score.meta.replay.sum_abs / n


def test_one_pass_replays_what_a_forward_per_step_does(exact: ReferenceBackend) -> None:
    ids = np.asarray(tokens(5, 300), np.int32)
    routes = routed(299, 5)
    traces = [
        named(f"{end}", ids[: end - 40], ids[end - 40 : end], routes) for end in (90, 180, 300)
    ]
    (together,) = assemble(traces)
    assert [part.one_pass for part in together.slices] == [True, True, False]
    passed = replayed(exact, traces, [together])
    apart: dict[str, npt.NDArray[np.float32]] = {}
    for trace in traces:
        apart |= replayed(exact, [trace], assemble([trace]))
    for name, result in passed.items():
        native = exact.score(assemble([trace for trace in traces if trace.meta.trace_id == name]))
        assert np.abs(result - apart[name]).max() < ONE_PASS
        assert np.abs(result - native[0].logprobs).max() > 0.1


def named(name: str, prompt: Any, response: Any, routes: npt.NDArray[np.uint8]) -> Trace:
    from driftgate.testing.traces import make_trajectory

    (trace,) = make_trajectory(name, steps=1)
    meta = msgspec.structs.replace(trace.meta, trace_id=name)
    return replace(
        trace,
        meta=meta,
        prompt_ids=np.asarray(prompt, np.int32),
        response_ids=np.asarray(response, np.int32),
        logprobs=np.full(len(response), -1, np.float32),
        routes=routes[: len(prompt) + len(response) - 1],
    )


def replayed(
    backend: ReferenceBackend, traces: list[Trace], sequences: list[Sequence]
) -> dict[str, npt.NDArray[np.float32]]:
    stored = {trace.meta.trace_id: trace for trace in traces}
    native = {result.trace_id: result for result in backend.score(sequences)}
    found = Replayer(backend, stored.__getitem__).run(
        [hold(trace) for trace in traces], sequences, native
    )
    out = {}
    for name, one in found.items():
        assert one.reason is None
        assert one.coverage == 1.0
        assert one.result is not None
        out[name] = one.result.logprobs
    return out


def test_twins_with_other_routes_are_replayed_each_under_its_own(exact: ReferenceBackend) -> None:
    ids = np.asarray(tokens(6, 80), np.int32)
    twins = [named(name, ids[:40], ids[40:], routed(79, seed)) for seed, name in enumerate("ab")]
    both = replayed(exact, twins, assemble(twins))
    for trace in twins:
        alone = replayed(exact, [trace], assemble([trace]))
        assert (both[trace.meta.trace_id] == alone[trace.meta.trace_id]).all()
    assert np.abs(both["a"] - both["b"]).max() > 0.1


def test_positions_without_a_route_stay_native(exact: ReferenceBackend) -> None:
    ids = np.asarray(tokens(7, 60), np.int32)
    (native,) = exact.score([whole(ids, 1)])
    rows = routed(59, 7)
    rows[:40] = 0  # padding
    rows[50, :, 1] = rows[50, :, 0]  # no choice of four
    part = Slice(trace_id="a.0", prompt_len=1, response_ids=ids[1:])
    asked = plan(Sequence(ids=ids[:-1], slices=(part,)), {"a.0": rows}, None, native)
    assert asked.replay is not None
    assert asked.replay.given.mean() == pytest.approx(18 / 59)
    (result,) = exact.score([asked])
    # Kernels sort tokens by expert: what others chose changes the tiling, and the last bits.
    assert np.abs(result.logprobs[:40] - native.logprobs[:40]).max() < ONE_PASS
    assert np.abs(result.logprobs[40:] - native.logprobs[40:]).max() > 0.1
    assert result.routes is not None
    known = asked.replay.given
    assert (np.sort(result.routes, -1)[known] == np.sort(rows, -1)[known]).all()


def test_shares_are_over_the_same_tokens_where_each_pass_lost_one() -> None:
    """Token 0 is NaN natively and token 1 under replay: equal counts of other tokens."""
    trace = next(iter(make_trajectory(steps=1, response=20, routed=False)))
    assert trace.logprobs is not None
    native, under = trace.logprobs + np.float32(0.05), trace.logprobs - np.float32(0.01)
    native[0], under[1] = np.nan, np.nan
    native = np.minimum(native, 0.0)
    result = SliceResult(
        trace_id=trace.meta.trace_id, logprobs=native, entropy=native, at_temperature=None,
        routes=None, margins=None, layer_ids=(), experts=None, one_pass=False, forward_s=0.0,
    )  # fmt: skip
    again = Replayed(result=replace(result, logprobs=under), coverage=1.0)
    score = drift(hold(trace), result, trainer=TRAINER, now_ns=1, replayed=again)
    pair = ReplayPair.of(score.meta)
    assert pair is not None
    assert (pair.native.n_tokens, pair.under.n_tokens) == (19, 18)
    assert set(pair.shares().values()) == {None}
    assert "not the same ones" in pair.undefined()[ABS]


def test_experts_that_the_trainer_does_not_have_are_left_out_and_counted(
    config: TeacherConfig, exact: ReferenceBackend, say: Say, reader: Reader
) -> None:
    """A sentinel of its own in each slot, in one of four layers."""
    rows = routed(39, 3)
    rows[:, 0] = (200, 201, 202, 203)
    store(config, say("a", tokens(1, 20), tokens(2, 20), routes=rows))
    teach(config, exact)
    meta = reader.score("a.0").meta
    assert meta.replay_coverage == 0.75
    assert meta.router is not None
    values = meta.router.metrics()
    assert (values["n_cells"], values["n_excluded_out_of_range"]) == (60, 20)


def test_scores_without_a_replay_say_why(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    right = say("shifted", tokens(1, 50), tokens(2, 100), trajectory="a")
    assert right.routes is not None
    shifted = replace(right, routes=np.roll(right.routes, 1, axis=0).astype(np.uint8))
    missing = say("missing", tokens(3, 20), tokens(4, 9), trajectory="b", routes=None)
    deeper = say("deeper", tokens(5, 9), tokens(6, 9), trajectory="c", routes=routed(17, 1)[:, :2])
    store(config, shifted, missing, deeper)
    teach(config, backend)
    reasons = {}
    for name in ("shifted.0", "missing.0", "deeper.0"):
        score = reader.score(name)
        assert score.meta.replay is None
        assert score.meta.replay_coverage is None
        assert score.logprobs_replay is None
        reasons[name] = score.meta.replay_reason or ""
    assert reasons["shifted.0"] == "the rollout's routes say nothing here: routes_misaligned"
    assert reasons["missing.0"] == "the trace has no routes"
    assert "routes have 2 layers" in reasons["deeper.0"]


def test_no_drift_has_no_share_and_switched_off_costs_nothing(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    store(config, say("a", tokens(1, 20), tokens(2, 10)))
    teach(config, backend)
    meta = reader.score("a.0").meta
    pair = ReplayPair.of(meta)
    assert pair is not None
    assert pair.shares() == {ABS: None, K3: None}
    assert set(pair.undefined().values()) == {"there is no drift that replay could remove"}
    other = msgspec.structs.replace(config, store=f"{config.store}-2", replay=False)
    store(other, say("a", tokens(1, 20), tokens(2, 10)))
    assert teach(other, backend).replay_s == 0.0
    again = Reader(Path(other.store))
    assert again.score("a.0").meta.replay_reason == "replay is switched off"
    again.close()


def test_a_dense_model_has_nothing_to_replay(
    checkpoints: dict[CheckpointKind, Path], config: TeacherConfig, say: Say, reader: Reader
) -> None:
    dense = TeacherConfig(store=config.store, model=str(checkpoints["dense"]))
    store(config, say("a", tokens(1, 20), tokens(2, 10)))
    teach(dense, ReferenceBackend.load(dense))
    assert reader.score("a.0").meta.replay_reason == "the trainer's model has no routers"

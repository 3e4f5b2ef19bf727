"""Several sequences in one forward give the numbers of each alone, and say that they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from driftgate.errors import TeacherError
from driftgate.teacher.batches import Batching, batch, groups
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.reference import ReferenceBackend
from driftgate.teacher.sequences import Sequence, Slice
from driftgate.testing.checkpoints import CheckpointKind
from tests.teacher.fsdp_ranks import difference, sequences
from tests.teacher.support import Say, store, teach, tokens

TILING = 1e-4
"""Nats, float32: other shapes choose other kernels, and random ids have a logprob of -30, where
float32 is spaced by 2e-6, and of -45 at the temperature of 0.7."""

TOGETHER = [how for how in get_args(Batching) if how != "alone"]


def test_groups_are_of_similar_length_and_bounded() -> None:
    lengths = [5, 40, 7, 38, 100]
    assert groups(lengths, "alone", 1000) == [[4], [1], [3], [2], [0]]
    assert groups(lengths, "padded", 80) == [[4], [1, 3], [2, 0]]
    assert groups(lengths, "packed", 85) == [[4], [1, 3, 2], [0]]


@pytest.mark.parametrize("how", TOGETHER)
def test_rows_lead_to_the_tokens_that_predict(how: Batching) -> None:
    made = sequences(replay=True)
    fed = batch(made, how)
    flat = fed.ids.reshape(-1)
    before = np.concatenate([one.ids[p.first : p.last] for one in made for p in one.slices])
    assert np.array_equal(flat[fed.rows], before)
    assert fed.replay is not None
    given = [one.replay for one in made if one.replay is not None]
    assert fed.replay.given.sum() == sum(int(one.given.sum()) for one in given)
    assert len(fed.replay.routes) == len(flat)


@pytest.mark.parametrize("how", TOGETHER)
@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("limit", [400, 5000])
def test_together_equals_alone(
    checkpoints: dict[CheckpointKind, Path], kind: CheckpointKind, how: Batching, limit: int
) -> None:
    config = TeacherConfig(store="unused", model=str(checkpoints[kind]), dtype="float32")
    wanted = ReferenceBackend.load(config).score(sequences(replay=kind == "moe"))
    batched = msgspec.structs.replace(config, batching=how, batch_tokens=limit)
    backend = ReferenceBackend.load(batched)
    ours = backend.score(sequences(replay=kind == "moe"))
    assert [one.trace_id for one in ours] == [one.trace_id for one in wanted]
    assert difference("logprobs", ours, wanted) < TILING
    assert difference("entropy", ours, wanted) < TILING
    assert difference("at_temperature", ours, wanted) < TILING
    assert difference("routes", ours, wanted) == 0
    assert backend.trainer.settings["batching"] == how


def test_what_stands_beside_a_sequence_does_not_leak_into_it(backend: ReferenceBackend) -> None:
    """The block mask is real: without it a packed sequence would see its neighbour's tokens."""
    model = backend._scorer.model
    packed = ReferenceBackend(model, name="tiny", batching="packed")
    ids = np.asarray(tokens(5, 40), np.int32)
    part = Slice(trace_id="a", prompt_len=1, response_ids=ids[1:])
    one = Sequence(ids=ids[:-1], slices=(part,))
    found = []
    for seed in (6, 7):
        other = np.asarray(tokens(seed, 40), np.int32)
        beside = Slice(trace_id="b", prompt_len=1, response_ids=other[1:])
        results = packed.score([Sequence(ids=other[:-1], slices=(beside,)), one])
        found.append(results[1].logprobs)
    assert np.array_equal(found[0], found[1])


HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16},
        **{"linear_value_head_dim": 16, "num_experts": 8, "shared_expert_intermediate_size": 32},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 32},
    },
    "falcon_h1": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2},
}
"""Linear attention, state spaces, short convolutions, a mask that does not look at positions."""


def random_model(family: str, dtype: torch.dtype, **more: Any) -> Any:
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    heads = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        described = AutoConfig.for_model(family, **sizes, **heads, pad_token_id=0, **more)
        made = AutoModelForCausalLM.from_config(described, dtype=dtype).eval()
        for name, parameter in made.named_parameters():
            if not any(one in name for one in ("norm", "A_log", "dt")):
                parameter.data.normal_(std=0.2)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", HYBRIDS)
def test_a_model_whose_packed_sequences_see_each_other_is_refused(
    family: str, dtype: torch.dtype
) -> None:
    model = random_model(family, dtype, **HYBRIDS[family])
    with pytest.raises(TeacherError, match="lets packed sequences see each other"):
        ReferenceBackend(model, name="tiny", batching="packed")
    assert ReferenceBackend(model, name="tiny", batching="padded").parallel > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_sliding_window_packs(family: str, dtype: torch.dtype) -> None:
    model = random_model(family, dtype, sliding_window=16)
    assert ReferenceBackend(model, name="tiny", batching="packed").parallel > 1


def test_a_worker_gathers_enough_for_a_batch(
    config: TeacherConfig, backend: ReferenceBackend, say: Say
) -> None:
    traces = [say(f"{n}", tokens(n, 12), tokens(n + 9, 6), trajectory=str(n)) for n in range(5)]
    store(config, *traces)
    together = ReferenceBackend(backend._scorer.model, name="tiny", batching="padded")
    report = teach(config, together)
    assert (report.trajectories, report.scored, report.refused) == (5, 5, 0)
    assert together.trainer.digest != backend.trainer.digest


def test_megatron_has_no_batching(config: TeacherConfig) -> None:
    with pytest.raises(ValueError, match="not for megatron"):
        msgspec.structs.replace(config, batching="packed", backend="megatron")

"""The equality tests of the trainer on CUDA: other kernels, the same claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Qwen3Config

from driftgate.teacher.batches import Batching
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.reference import ReferenceBackend, load_model
from driftgate.teacher.sequences import Sequence, Slice
from driftgate.testing.checkpoints import CheckpointKind
from tests.teacher.support import tokens

CUDA = torch.cuda.is_available()
FP8_CAPABILITY = (8, 9)
"""Ada and Hopper: what transformers asks for in `FineGrainedFP8Config`."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA, reason="gpu: there is no CUDA device"),
]

Dtype = Literal["float32", "bfloat16"]
TOLERANCE: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 0.25}
"""Nats on random ids, whose logprobs are -30; the head sees other rows than in whole logits."""


def fed(seed: int, length: int) -> Sequence:
    ids = np.asarray(tokens(seed, length), np.int32)
    whole = Slice(trace_id=str(seed), prompt_len=8, response_ids=ids[8:])
    return Sequence(ids=ids[:-1], slices=(whole,))


@torch.no_grad()
def plainly(model: Any, one: Sequence) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Whole logits and a softmax in float64."""
    part = one.slices[0]
    ids = torch.from_numpy(one.ids).long().to(model.device)
    logits = model(ids[None], use_cache=False).logits[0, part.first : part.last].double()
    target = torch.from_numpy(part.response_ids).long().to(model.device)[:, None]
    return np.asarray(logits.log_softmax(-1).gather(-1, target)[:, 0].cpu().numpy())


@pytest.mark.parametrize("dtype", get_args(Dtype))
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_reference_equals_hugging_face_on_the_device(
    checkpoints: dict[CheckpointKind, Path], kind: CheckpointKind, dtype: Dtype
) -> None:
    config = TeacherConfig(store="unused", model=str(checkpoints[kind]), dtype=dtype)
    model = load_model(config).to("cuda").eval()
    backend = ReferenceBackend(model, name="tiny")
    assert backend.no_replay is None if kind == "moe" else backend.no_replay
    assert backend.trainer.settings["device"] == torch.cuda.get_device_name()
    for seed, length in ((1, 40), (2, 700)):
        one = fed(seed, length)
        (ours,) = backend.score([one])
        assert np.abs(ours.logprobs - plainly(model, one)).max() < TOLERANCE[dtype]


@pytest.mark.parametrize("how", ["padded", "packed"])
def test_together_equals_alone_on_the_device(
    checkpoints: dict[CheckpointKind, Path], how: Batching
) -> None:
    config = TeacherConfig(store="unused", model=str(checkpoints["dense"]), dtype="float32")
    model = load_model(config).to("cuda").eval()
    made = [fed(seed, 30 + 40 * seed) for seed in range(4)]
    wanted = ReferenceBackend(model, name="tiny").score(made)
    ours = ReferenceBackend(model, name="tiny", batching=how).score(made)
    for a, b in zip(ours, wanted, strict=True):
        assert np.abs(a.logprobs - b.logprobs).max() < TOLERANCE["float32"]


@pytest.mark.skipif(
    not CUDA or torch.cuda.get_device_capability() < FP8_CAPABILITY,
    reason="gpu: the device has no FP8",
)
def test_an_fp8_model_is_scored_as_it_computes(tmp_path: Path) -> None:
    """Block scales are of 128 by 128 weights, so every size is a multiple of that."""
    made = AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        ),
        dtype=torch.bfloat16,
    )  # fmt: skip
    made.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=FineGrainedFP8Config(), device_map="cuda"
    ).eval()
    one = fed(3, 200)
    (ours,) = ReferenceBackend(model, name="fp8").score([one])
    assert np.abs(ours.logprobs - plainly(model, one)).max() < TOLERANCE["bfloat16"]

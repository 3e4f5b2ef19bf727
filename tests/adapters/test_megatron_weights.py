"""What the stand-alone Megatron worker refuses, before anything is built."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from driftgate.errors import TeacherError
from driftgate.teacher.config import TeacherConfig

with warnings.catch_warnings():  # several, about what is not installed
    warnings.simplefilter("ignore")
    from driftgate.adapters.megatron import attach
    from driftgate.adapters.megatron_weights import check_divides, settings_of
    from driftgate.teacher.megatron import MegatronBackend

LAYOUT = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
LAYOUT |= {"expert_model_parallel_size": 1}


@pytest.mark.parametrize(
    ("described", "said"),
    [
        (DeepseekV3Config(), "no mapping for model_type='deepseek_v3'"),
        (Gemma2Config(), "no mapping for model_type='gemma2'"),
        (LlamaConfig(attention_bias=True), "biases"),
        (Qwen3Config(hidden_act="gelu"), "activation 'gelu'"),
        (MixtralConfig(sliding_window=4096), "sliding_window"),
        (
            Qwen3Config(use_sliding_window=True, sliding_window=16, max_window_layers=2),
            "sliding_attention",
        ),
        (
            LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
            "rotary embedding 'linear'",
        ),
    ],
)
def test_a_model_without_a_mapping_is_refused(described: Any, said: str) -> None:
    with pytest.raises(TeacherError, match=said):
        settings_of(described, torch.float32, LAYOUT)


@pytest.mark.parametrize(
    ("described", "size", "said"),
    [
        (Qwen3Config(), {"tensor_model_parallel_size": 3}, "attention heads do not divide by --tp"),
        (
            Qwen3Config(num_attention_heads=8, num_key_value_heads=2),
            {"tensor_model_parallel_size": 4},
            "2 key-value heads do not divide by --tp 4",
        ),
        (
            Qwen3Config(vocab_size=99, num_key_value_heads=2),
            {"tensor_model_parallel_size": 2},
            "99 words of the vocabulary",
        ),
        (Qwen3Config(num_hidden_layers=7), {"pipeline_model_parallel_size": 2}, "7 layers"),
        (Qwen3MoeConfig(num_experts=6), {"expert_model_parallel_size": 4}, "6 experts"),
        (Qwen3Config(), {"expert_model_parallel_size": 2}, "0 experts"),
    ],
)
def test_what_does_not_divide_is_named(described: Any, size: dict[str, int], said: str) -> None:
    with pytest.raises(TeacherError, match=said):
        check_divides(described, LAYOUT | size)


def test_the_first_dense_layer_and_the_routers_division_are_taken_over() -> None:
    described = Qwen3MoeConfig(num_hidden_layers=4, mlp_only_layers=[0], norm_topk_prob=False)
    settings = settings_of(described, torch.float32, LAYOUT)
    assert settings["moe_layer_freq"] == [0, 1, 1, 1]
    assert settings["moe_router_pre_softmax"] is True


def test_only_megatron_models_can_be_attached_to() -> None:
    with pytest.raises(TeacherError, match="Linear is not a Megatron-Core GPTModel"):
        attach(nn.Linear(2, 2))
    with pytest.raises(TeacherError, match="2 virtual pipeline stages"):
        attach([nn.Linear(2, 2), nn.Linear(2, 2)])


def test_a_machine_without_a_device_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = TeacherConfig(store="unused", model=str(tmp_path), backend="megatron", device="cpu")
    with pytest.raises(TeacherError, match=r"CUDA devices only .* use --backend fsdp here"):
        MegatronBackend.load(config)

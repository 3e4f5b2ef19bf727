"""Tiny random checkpoints of the families that are mapped to Megatron-Core.

Their norms are not 1, which would hide a wrong mapping, and their logits stay small: float32 ends
at 1e-6 of them, and a mapping is told right or wrong by 1e-5 nats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

__all__ = ["CONFIGS", "make_family"]

MIXTURE = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
RENORMED = {**MIXTURE, "norm_topk_prob": True}
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dense": (Qwen3Config, {"num_hidden_layers": 4}),
    "moe": (Qwen3MoeConfig, {"num_hidden_layers": 4, "mlp_only_layers": [0], **RENORMED}),
    "unnormed": (Qwen3MoeConfig, {"norm_topk_prob": False, **MIXTURE}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "tied": (Qwen3Config, {"tie_word_embeddings": True}),
}
"""What a mapping can get wrong: a first layer without experts, routers that do not divide by their
sum, biases, other families, weights that the two ends share."""


def make_family(root: Path, name: str) -> Path:
    """A checkpoint in ``root / name``, one of ``CONFIGS``; the same weights every time."""
    kind, more = CONFIGS[name]
    generator = torch.Generator().manual_seed(list(CONFIGS).index(name))
    config = kind(
        vocab_size=2000,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        dtype="float32",
        eos_token_id=None,
        pad_token_id=0,
        **({"num_hidden_layers": 2, "tie_word_embeddings": False} | more),
    )
    model = AutoModelForCausalLM.from_config(config)
    for weight, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1.0 + 0.3 * noise if "norm" in weight else 0.1 * noise
    model.save_pretrained(root / name)
    (root / name / "chat_template.jinja").write_text("{{ messages }}")
    return root / name

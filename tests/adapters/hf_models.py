"""Tiny random models of every family that routes in its own way, run once with a tap on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from driftgate.adapters.hf import Routed, RouterTap

__all__ = ["BY_SOFTMAX", "FAMILIES", "MIXTURES", "K", "Seen", "ran"]

LAYERS, EXPERTS, K, TOKENS = 4, 16, 4, 50

COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": K,
    "attn_implementation": "eager",
    "pad_token_id": 0,
}
GROUPED = {
    "n_routed_experts": EXPERTS,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": 32}

FAMILIES: dict[str, tuple[Any, dict[str, Any], tuple[int, ...]]] = {
    "qwen3": (Qwen3Config, {}, ()),
    "qwen3_moe": (Qwen3MoeConfig, {**QWEN, "mlp_only_layers": [0]}, (1, 2, 3)),
    "mixtral": (MixtralConfig, {"num_local_experts": EXPERTS}, (0, 1, 2, 3)),
    "olmoe": (OlmoeConfig, {"num_experts": EXPERTS}, (0, 1, 2, 3)),
    "deepseek_v3": (DeepseekV3Config, {**GROUPED, **LATENT}, (2, 3)),
    "glm4_moe": (Glm4MoeConfig, GROUPED, (2, 3)),
    "gpt_oss": (GptOssConfig, {"num_local_experts": EXPERTS, "head_dim": 16}, (0, 1, 2, 3)),
}
"""Each with the layers that have experts: dense ones come first, or are named."""
MIXTURES = [name for name, (_, _, layers) in FAMILIES.items() if layers]
BY_SOFTMAX = [name for name in MIXTURES if name not in ("deepseek_v3", "glm4_moe")]


class Seen:
    """What the experts of every layer were called with, and the logits of its router."""

    def __init__(self, model: nn.Module) -> None:
        self.chosen: dict[int, torch.Tensor] = {}
        self.logits: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts.register_forward_pre_hook(self._experts(index))
                router = getattr(layer.mlp, "gate", None) or layer.mlp.router
                router.register_forward_hook(self._router(index))

    def _experts(self, layer: int) -> Any:
        def keep(_module: Any, args: tuple[Any, ...]) -> None:
            (self.chosen[layer],) = (
                one for one in args if one.dtype == torch.int64 and one.shape[-1] == K
            )

        return keep

    def _router(self, layer: int) -> Any:
        def keep(_module: Any, _args: Any, output: Any) -> None:
            self.logits[layer] = output[0]

        return keep


def ran(family: str) -> tuple[Routed | None, Seen]:
    """What the tap recorded of 50 tokens, and what the layers were really called with."""
    kind, more, _ = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(kind(**(COMMON | more))).eval()
    generator = torch.Generator().manual_seed(1)
    for name, one in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" not in name:
            noise = torch.randn(one.shape, generator=generator)
            one.data = 1.0 + 0.3 * noise if "norm" in name else 0.2 * noise
    seen, tap = Seen(model), RouterTap(model)
    ids = torch.randint(300, (1, TOKENS), generator=generator)
    with torch.no_grad(), tap.capture(torch.arange(TOKENS)) as capture:
        model.base_model(input_ids=ids, use_cache=False)
    return capture.result(), seen

"""From a Hugging Face model to Megatron-Core's: the settings, and the weights of one rank.

For the stand-alone worker, which has a checkpoint and no training job. It knows the families whose
every tensor and setting it can place (``FAMILIES``) and refuses the rest with words: a mapping that
forgets a norm or a rotary base gives numbers that look like drift.

Each weight is *pulled*: for a parameter that this rank has, its Hugging Face tensors are found by
name and its part is cut out, so a rank never makes more than it keeps.

Only Megatron's own modules are used (the *local* spec), because TransformerEngine's run on no CPU
and could not be tested here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from driftgate.errors import TeacherError

__all__ = ["FAMILIES", "build", "check_divides", "settings_of"]

FAMILIES = {"qwen2": False, "qwen3": True, "qwen3_moe": True, "mixtral": False, "llama": False}
"""transformers' ``model_type``, and whether queries and keys are normed per head."""

EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.linear_(fc1|fc2)\.weight")
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")

PLAIN = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
"""Parameters of a layer that are one tensor on both sides."""


class _RmsNorm(torch.nn.RMSNorm):
    """Torch's own, under the constructor that Megatron calls: Megatron's wrapper of it refuses
    sequence parallelism, which matters for gradients only."""

    def __init__(self, config: Any, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


def settings_of(described: Any, dtype: torch.dtype, layout: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``TransformerConfig`` for a transformers config.

    ``layout``: Megatron's own names of the parallel sizes. Raises ``TeacherError`` for a model that
    this mapping does not cover.
    """
    _refuse(described)
    heads = int(described.num_attention_heads)
    width = getattr(described, "head_dim", None) or described.hidden_size // heads
    return {
        "num_layers": int(described.num_hidden_layers),
        "hidden_size": int(described.hidden_size),
        "ffn_hidden_size": int(described.intermediate_size),
        "num_attention_heads": heads,
        "num_query_groups": int(described.num_key_value_heads),
        "kv_channels": int(width),
        "normalization": "RMSNorm",
        "layernorm_epsilon": float(described.rms_norm_eps),
        "qk_layernorm": FAMILIES[described.model_type],
        "add_bias_linear": False,
        "add_qkv_bias": described.model_type == "qwen2",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "perform_initialization": False,
        # Each of these needs a kernel that a plain installation lacks.
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        **_experts(described),
        **layout,
    }


def build(model: Any, layout: Mapping[str, Any], max_tokens: int) -> GPTModel:
    """The Megatron model of this rank with the weights of a transformers ``model`` on the CPU.

    Megatron's process groups must be there. Raises ``TeacherError`` where the model is of another
    family or does not divide over ``layout``.
    """
    from megatron.core import parallel_state

    described = model.config
    dtype = next(model.parameters()).dtype
    check_divides(described, layout)
    config = TransformerConfig(**settings_of(described, dtype, layout))
    with torch.device(torch.cuda.current_device()):
        made = GPTModel(
            config,
            _spec(config),
            vocab_size=int(described.vocab_size),
            max_sequence_length=max_tokens,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=bool(described.tie_word_embeddings),
            position_embedding_type="rope",
            rotary_base=_rope_base(described),
        )
    _fill(made, model.state_dict())
    return made.eval()


def _refuse(described: Any) -> None:
    if described.model_type not in FAMILIES:
        raise TeacherError(
            f"the megatron backend has no mapping for model_type={described.model_type!r}, only "
            f"for {', '.join(FAMILIES)}; use --backend fsdp, or driftgate.adapters.megatron.attach "
            "inside your training job"
        )
    rope = (getattr(described, "rope_parameters", None) or {}).get("rope_type", "default")
    windows = set(getattr(described, "layer_types", None) or []) - {"full_attention"}
    if getattr(described, "sliding_window", None) and described.model_type == "mixtral":
        windows.add("sliding_window")
    bias = getattr(described, "attention_bias", False) or getattr(described, "mlp_bias", False)
    odd = {
        f"rotary embedding {rope!r}": rope != "default",
        f"attention of {', '.join(sorted(windows))}": bool(windows),
        "biases": bool(bias),
        f"activation {described.hidden_act!r}": described.hidden_act != "silu",
    }
    for what, is_odd in odd.items():
        if is_odd:
            raise TeacherError(f"the megatron backend has no mapping for {what}; use fsdp")


def check_divides(described: Any, layout: Mapping[str, Any]) -> None:
    """Raises ``TeacherError`` where Megatron would pad, or assert without words."""
    tp, pp = layout["tensor_model_parallel_size"], layout["pipeline_model_parallel_size"]
    ep = layout["expert_model_parallel_size"]
    experts = _expert_count(described)
    for name, count, parts, option in (
        ("attention heads", described.num_attention_heads, tp, "--tp"),
        ("key-value heads", described.num_key_value_heads, tp, "--tp"),
        ("words of the vocabulary", described.vocab_size, tp, "--tp"),
        ("layers", described.num_hidden_layers, pp, "--pp"),
        ("experts", experts, ep, "--ep"),
    ):
        if count % parts or (parts > 1 and not count):
            raise TeacherError(f"{count} {name} do not divide by {option} {parts}")


def _expert_count(described: Any) -> int:
    for name in ("num_experts", "num_local_experts"):
        if getattr(described, name, None):
            return int(getattr(described, name))
    return 0


def _experts(described: Any) -> dict[str, Any]:
    """The part of ``settings_of`` about the mixture of experts."""
    count = _expert_count(described)
    if not count:
        return {}
    layers = range(int(described.num_hidden_layers))
    step = int(getattr(described, "decoder_sparse_step", 1))
    dense = set(getattr(described, "mlp_only_layers", None) or ())
    sparse = [int(layer not in dense and (layer + 1) % step == 0) for layer in layers]
    width = getattr(described, "moe_intermediate_size", None) or described.intermediate_size
    return {
        "num_moe_experts": count,
        "moe_router_topk": int(described.num_experts_per_tok),
        "moe_ffn_hidden_size": int(width),
        "moe_layer_freq": sparse,
        # Softmax over the chosen is the chosen of a softmax over all, divided by their sum.
        "moe_router_pre_softmax": not getattr(described, "norm_topk_prob", True),
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_permute_fusion": False,
        "expert_tensor_parallel_size": 1,
    }


def _rope_base(described: Any) -> float:
    """transformers 5 has ``rope_parameters`` in place of ``rope_theta``."""
    base = described.rope_parameters["rope_theta"]
    return int(base) if float(base).is_integer() else float(base)


def _spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm"
    )
    for layer in block.layer_specs:
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = _RmsNorm
        if config.qk_layernorm:
            attention = parts.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = _RmsNorm
    block.layer_norm = _RmsNorm
    return block


def _fill(made: GPTModel, tensors: Mapping[str, Tensor]) -> None:
    """Put this rank's part of ``tensors`` into every parameter of ``made``."""
    group = made.pg_collection.tp
    tp, rank = dist.get_world_size(group), dist.get_rank(group)
    pull = _Pull(made, tensors)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            whole, parts = pull(name)
            divided = [i for i, n in enumerate(parameter.shape) if n != whole.shape[i]]
            if divided:
                (axis,) = divided
                # Gate and up are each divided, not the one after the other.
                chunks = [one.chunk(tp, axis)[rank] for one in whole.chunk(parts, axis)]
                whole = torch.cat(chunks, axis)
            if whole.shape != parameter.shape:
                raise TeacherError(
                    f"{name} is {list(parameter.shape)}, its weights {list(whole.shape)}"
                )
            parameter.copy_(whole)


class _Pull:
    """Finds the weights of a parameter by its Megatron name."""

    def __init__(self, made: GPTModel, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._config = made.config
        self._first_expert = 0
        self._layers = [int(layer.layer_number) - 1 for layer in made.decoder.layers]
        if made.config.num_moe_experts:
            ep = made.pg_collection.ep
            each = made.config.num_moe_experts // dist.get_world_size(ep)
            self._first_expert = each * dist.get_rank(ep)

    def __call__(self, name: str) -> tuple[Tensor, int]:
        """The whole tensor in Megatron's order, and of how many parts it consists that are divided
        over the tensor-parallel ranks each for itself."""
        if name == "embedding.word_embeddings.weight":
            return self._tensors["model.embed_tokens.weight"], 1
        if name == "output_layer.weight":
            return self._tensors["lm_head.weight"], 1
        if name == "decoder.final_layernorm.weight":
            return self._tensors["model.norm.weight"], 1
        found = LAYER.fullmatch(name)
        assert found is not None, name
        prefix = f"model.layers.{self._layers[int(found[1])]}."
        return self._of_layer(prefix, found[2])

    def _of_layer(self, prefix: str, name: str) -> tuple[Tensor, int]:
        if name in PLAIN:
            return self._tensors[prefix + PLAIN[name]], 1
        if name in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
            return self._interleaved(prefix + "self_attn.", name.rsplit(".", 1)[1]), 1
        if name == "mlp.linear_fc1.weight":
            halves = [self._tensors[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up")]
            return torch.cat(halves), 2
        found = EXPERT.fullmatch(name)
        assert found is not None, name
        stacked = "gate_up_proj" if found[2] == "fc1" else "down_proj"
        expert = self._first_expert + int(found[1])
        return self._tensors[f"{prefix}mlp.experts.{stacked}"][expert], 1

    def _interleaved(self, prefix: str, kind: str) -> Tensor:
        """Queries, keys and values, group by group of key-value heads."""
        groups = self._config.num_query_groups
        parts = [self._tensors[f"{prefix}{part}_proj.{kind}"] for part in "qkv"]
        split = [part.view(groups, -1, *part.shape[1:]) for part in parts]
        joined = torch.cat(split, dim=1)
        return joined.reshape(-1, *joined.shape[2:])

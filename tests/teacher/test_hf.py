"""The traps of Hugging Face models, found and named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from driftgate.adapters.hf import RouterTap, inspect_model
from driftgate.errors import TeacherError
from driftgate.storage import Reader
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.reference import ReferenceBackend
from driftgate.testing.checkpoints import CheckpointKind
from tests.teacher.support import Say, store, teach, tokens


@pytest.fixture
def dense(checkpoints: dict[CheckpointKind, Path]) -> Path:
    return checkpoints["dense"]


def test_a_model_loaded_in_bfloat16_has_no_findings(dense: Path) -> None:
    assert inspect_model(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)) == []


def test_a_cast_model_is_found_by_its_dtype(dense: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).to(torch.bfloat16)
    (finding,) = inspect_model(model)
    assert finding.code == "rotary_inv_freq_cast"
    assert "model.rotary_emb.inv_freq is bfloat16, not float32" in finding.detail


def test_a_model_cast_there_and_back_is_found_by_its_values(dense: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    (finding,) = inspect_model(model.to(torch.bfloat16).float())
    assert "differs from its float32 value" in finding.detail


def by_layer_type(family: str) -> nn.Module:
    """Frequencies of their own for sliding and full attention."""
    described = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    if family == "gemma4_text":
        described.vocab_size_per_layer_input = 64
    made: nn.Module = AutoModelForCausalLM.from_config(described, dtype=torch.float32)
    return made


@pytest.mark.parametrize("family", ["gemma3_text", "gemma4_text", "olmo3"])
def test_frequencies_of_each_type_of_layer_are_looked_at(family: str) -> None:
    assert inspect_model(by_layer_type(family)) == []
    cast = [finding.detail for finding in inspect_model(by_layer_type(family).to(torch.bfloat16))]
    back = [finding.detail for finding in inspect_model(by_layer_type(family).bfloat16().float())]
    layers = "model.rotary_emb.full_attention", "model.rotary_emb.sliding_attention"
    assert cast == [f"{one}_inv_freq is bfloat16, not float32" for one in layers]
    # Gemma 4's full attention is of a type that is not recomputed.
    recomputed = list(layers[1:] if family == "gemma4_text" else layers)
    assert [detail.split("_inv_freq differs from its float32")[0] for detail in back] == recomputed


class SigmoidTopKRouter(nn.Module):
    """Chooses by sigmoid + bias, as DeepSeek does: its softmax says nothing about its choice."""

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        bias = torch.linspace(3.0, -3.0, logits.shape[-1])
        weights, indices = (logits.sigmoid() + bias).topk(2, sorted=False)
        return logits, weights, indices


class OldTopKRouter(nn.Linear):
    """Returns logits alone, as transformers 4 did."""


def holder(router: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Identity(), router])})


def test_another_way_of_choosing_has_no_margins_and_no_order() -> None:
    router = SigmoidTopKRouter()
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    with RouterTap(holder(router)).capture(torch.arange(50)) as capture:
        _, _, chosen = router(logits)
    routed = capture.result()
    assert routed is not None
    assert routed.layer_ids == (1,)
    assert (routed.routes[:, 0] == chosen.numpy()).all()
    assert routed.margins is None
    assert not routed.ordered


def test_a_mixture_whose_routers_are_not_known_is_not_called_dense(
    config: TeacherConfig, say: Say, reader: Reader
) -> None:
    """HunYuan's router is called a gate; what explains drift must not say that it has none."""
    made = AutoConfig.for_model(
        "hunyuan_v1_moe", **SMALL, num_experts=16, moe_topk=4, pad_token_id=0, eos_token_id=None
    )
    backend = ReferenceBackend(AutoModelForCausalLM.from_config(made).eval(), name="hunyuan")
    store(config, say("a", tokens(1, 20), tokens(2, 10)))
    teach(config, backend)
    meta = reader.score("a.0").meta
    why = "the routers of hunyuan_v1_moe are not known to driftgate"
    assert (meta.router_reason, meta.replay_reason) == (why, why)


SMALL = {
    "vocab_size": 2000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "head_dim": 16,
}


def test_hooks_are_gone_after_the_capture() -> None:
    router = SigmoidTopKRouter()
    with RouterTap(holder(router)).capture(torch.arange(1)):
        pass
    assert not router._forward_hooks


def test_an_older_layout_is_refused() -> None:
    router = OldTopKRouter(4, 8)
    tap = RouterTap(holder(router))
    with tap.capture(torch.arange(1)), pytest.raises(TeacherError, match=r"transformers >= 5\.19"):
        router(torch.zeros(1, 4))


def test_a_router_that_did_not_run_is_named() -> None:
    with RouterTap(holder(SigmoidTopKRouter())).capture(torch.arange(1)) as capture:
        pass
    with pytest.raises(TeacherError, match=r"layers \[1\]"):
        capture.result()

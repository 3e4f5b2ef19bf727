"""Each family's router, told which experts to use: its weights against the family's own formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from driftgate.adapters.hf_replay import forced
from driftgate.errors import TeacherError

S, H, E, K = 64, 32, 16, 4
COMMON: dict[str, Any] = {
    "hidden_size": H,
    "num_hidden_layers": 1,
    "num_experts_per_tok": K,
    "num_attention_heads": 2,
    "vocab_size": 32,
}


def softmax_then_choose(z: Tensor, ids: Tensor, _: nn.Module) -> Tensor:
    p = z.double().exp() / z.double().exp().sum(-1, keepdim=True)
    return p.gather(-1, ids) / p.gather(-1, ids).sum(-1, keepdim=True)


def softmax_not_normalised(z: Tensor, ids: Tensor, _: nn.Module) -> Tensor:
    return (z.double().exp() / z.double().exp().sum(-1, keepdim=True)).gather(-1, ids)


def choose_then_softmax(z: Tensor, ids: Tensor, _: nn.Module) -> Tensor:
    chosen = z.double().gather(-1, ids).exp()
    return chosen / chosen.sum(-1, keepdim=True)


def sigmoid_scaled(z: Tensor, ids: Tensor, router: nn.Module) -> Tensor:
    chosen = (1 / (1 + (-z.double()).exp())).gather(-1, ids)
    scale = float(getattr(router, "routed_scaling_factor", 1.0))
    return chosen / chosen.sum(-1, keepdim=True) * scale


Formula = Callable[[Tensor, Tensor, nn.Module], Tensor]
FAMILIES: dict[str, tuple[str, dict[str, Any], Formula]] = {
    "Qwen3Moe": ("TopKRouter", {"num_experts": E, "norm_topk_prob": True}, softmax_then_choose),
    "Olmoe": ("TopKRouter", {"num_experts": E}, softmax_not_normalised),
    "Mixtral": ("TopKRouter", {"num_local_experts": E}, softmax_then_choose),
    "GptOss": ("TopKRouter", {"num_local_experts": E}, choose_then_softmax),
    "MiniMaxM2": ("TopKRouter", {"num_local_experts": E}, sigmoid_scaled),
    "DeepseekV3": (
        "TopkRouter",
        # Groups chosen among and groups chosen as many as experts: only one topk is over experts.
        {"n_routed_experts": E, "n_group": 8, "topk_group": K, "routed_scaling_factor": 2.5},
        sigmoid_scaled,
    ),
    "Glm4Moe": (
        "TopkRouter",
        {"n_routed_experts": E, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5},
        sigmoid_scaled,
    ),
}


def router_of(family: str) -> tuple[nn.Module, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """A random router, and what its block calls it with."""
    suffix, settings, _ = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **settings})
    module = type(transformers.AutoModelForCausalLM.from_config(config)).__module__
    made = getattr(__import__(module, fromlist=["_"]), f"{family}{suffix}")(config)
    generator = torch.Generator().manual_seed(1)
    for tensor in [*made.parameters(), *made.buffers()]:
        tensor.data = torch.randn(tensor.shape, generator=generator)
    bias = torch.randn(E, generator=generator)
    if family == "MiniMaxM2":
        return made, lambda hidden: made(hidden, bias)
    return made, made


def hidden() -> Tensor:
    return torch.randn(S, H, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_forced_experts_get_the_weights_that_their_router_gives_them(family: str) -> None:
    router, call = router_of(family)
    _, native_weights, native = call(hidden())
    wanted = torch.rand(S, E, generator=torch.Generator().manual_seed(3)).argsort(-1)[:, :K]
    given = torch.arange(S) % 3 > 0
    with forced([router], [E], wanted[:, None], given[:, None]):
        logits, weights, ids = call(hidden())
    assert torch.equal(ids.sort(-1)[0][given], wanted.sort(-1)[0][given])
    assert torch.equal(ids[~given], native[~given])
    assert torch.equal(weights[~given], native_weights[~given])
    formula = FAMILIES[family][2](logits, ids, router)
    torch.testing.assert_close(weights.double(), formula, atol=1e-6, rtol=1e-5)
    again = call(hidden())[2]
    assert torch.equal(again, native), "nothing stays behind"


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_a_routers_own_choice_in_another_order_changes_no_bit(family: str) -> None:
    router, call = router_of(family)
    _, weights, ids = call(hidden())
    with forced([router], [E], ids.flip(-1)[:, None], torch.ones(S, 1, dtype=torch.bool)):
        _, replayed, chosen = call(hidden())
    assert torch.equal(chosen, ids)
    assert torch.equal(replayed, weights)


def test_an_expert_that_the_router_does_not_have_is_no_choice() -> None:
    router, call = router_of("Qwen3Moe")
    native = call(hidden())[2]
    foreign = torch.full((S, 1, K), 200)
    with forced([router], [E], foreign, torch.ones(S, 1, dtype=torch.bool)):
        assert torch.equal(call(hidden())[2], native)


class Threshold(nn.Module):
    """Chooses without a topk."""

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, ids = logits.sort(-1, descending=True)
        return logits, weights[:, :K], ids[:, :K]


def test_a_router_that_does_not_choose_by_topk_is_refused() -> None:
    router = Threshold()
    ids = torch.arange(K).expand(S, 1, K)
    with (
        forced([router], [E], ids, torch.ones(S, 1, dtype=torch.bool)),
        pytest.raises(TeacherError, match="Threshold chose its experts by 0 topk over 16"),
    ):
        router(torch.randn(S, E))
    assert torch.randn(3, 5).topk(2)[1].shape == (3, 2), "the mode has ended"

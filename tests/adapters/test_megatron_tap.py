"""Megatron-Core's router under given routes, by the tap alone."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from driftgate.adapters.trainer import Forced

S, E, K = 5, 16, 2


def tap(forced: Forced) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's own, while it is imported
        from driftgate.adapters.megatron_tap import RouterTap
    config = SimpleNamespace(moe_router_group_topk=None, moe_router_pre_softmax=False)
    made = RouterTap(SimpleNamespace(score_function="softmax", config=config))
    made.force(forced, 0, slice(0, S), S)
    return made


def choose(scores: torch.Tensor, k: int, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.topk(scores, k, dim=1)


def test_an_expert_that_the_router_does_not_have_is_no_choice() -> None:
    routes = np.full((S, 1, K), (14, 15), np.uint16)
    routes[2] = (14, 200)
    scores = torch.randn(S, E, generator=torch.Generator().manual_seed(0))
    weights, ids = tap(Forced(routes, np.ones((S, 1), np.bool_))).get_replay_topk(
        scores, K, default_compute_topk=choose
    )
    wanted = torch.from_numpy(routes[:, 0].astype(np.int64))
    wanted[2] = scores[2].topk(K)[1]
    assert torch.equal(ids, wanted)
    assert torch.equal(weights, scores.gather(1, wanted))

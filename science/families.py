"""Routers of real model classes, tiny and random: what is recorded against what ran.

The reference for routes is what the experts of each layer were really called with. That the
highest router logits are not it shows what a recorder of logits would report of a sigmoid with a
bias: drift that is not there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from driftgate.adapters.hf_replay import forced
from science.table import Row, exactly, worst
from tests.adapters import test_hf_replay as by_formula
from tests.adapters.hf_models import BY_SOFTMAX, FAMILIES, MIXTURES, K, ran

__all__ = ["routers"]

WEIGHTS = 1e-5
"""Relative, float32 against formulas in float64."""


def routers(part: str) -> Iterator[Row]:
    """Routes of every family, and the weights of forced experts."""
    routed, _ = ran("qwen3")
    yield exactly(part, "qwen3, which is dense, has routes", routed is not None, False)
    for family in MIXTURES:
        routed, seen = ran(family)
        assert routed is not None
        layers = ", ".join(map(str, routed.layer_ids))
        wanted = ", ".join(map(str, FAMILIES[family][2]))
        yield exactly(part, f"{family}: layers with experts", layers, wanted)
        used = np.stack([one.numpy() for one in seen.chosen.values()], axis=1)
        differ = int((routed.routes != used).any(-1).sum())
        cells = used.shape[0] * used.shape[1]
        what = f"{family}: {cells} cells, other experts than were called"
        yield exactly(part, what, differ, 0)
        top = np.stack([one.topk(K).indices.numpy() for one in seen.logits.values()], axis=1)
        shared = (used[..., :, None] == top[..., None, :]).any(-1).mean()
        what = f"{family}: topk(router_logits), which names {shared:.0%} of them, is right"
        yield exactly(part, what, bool(shared == 1), family in BY_SOFTMAX)
    yield from _forced(part)


@torch.no_grad()
def _forced(part: str) -> Iterator[Row]:
    """Experts that a rollout chose get the weights that the router's own formula gives them."""
    for family in sorted(by_formula.FAMILIES):
        router, call = by_formula.router_of(family)
        x = by_formula.hidden()
        generator = torch.Generator().manual_seed(3)
        order = torch.rand(len(x), by_formula.E, generator=generator).argsort(-1)
        wanted = order[:, : by_formula.K]
        everywhere = torch.ones(len(x), 1, dtype=torch.bool)
        with forced([router], [by_formula.E], wanted[:, None], everywhere):
            logits, weights, ids = call(x)
        other = int((ids.sort(-1)[0] != wanted.sort(-1)[0]).sum())
        yield exactly(part, f"{family}: forced experts that were not used", other, 0)
        formula = by_formula.FAMILIES[family][2](logits, ids, router)
        apart = float(((weights.double() - formula).abs() / formula.abs().clamp_min(1e-9)).max())
        yield worst(part, f"{family}: weights of forced experts", apart, WEIGHTS, "by formula")

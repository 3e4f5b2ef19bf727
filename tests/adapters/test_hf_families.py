"""Routes of real model classes, tiny and random: what the experts were really given, by absolute
layer, in every family that chooses in its own way."""

from __future__ import annotations

import numpy as np
import pytest

from tests.adapters.hf_models import BY_SOFTMAX, FAMILIES, MIXTURES, K, ran


@pytest.mark.parametrize("family", MIXTURES)
def test_routes_are_what_the_experts_were_given_at_absolute_layers(family: str) -> None:
    routed, seen = ran(family)
    assert routed is not None
    assert routed.layer_ids == FAMILIES[family][2] == tuple(seen.chosen)
    given = np.stack([one.numpy() for one in seen.chosen.values()], axis=1)
    assert (routed.routes == given).all()


def test_a_dense_model_has_no_routes() -> None:
    assert ran("qwen3")[0] is None


@pytest.mark.parametrize("family", MIXTURES)
def test_the_highest_logits_are_not_what_a_biased_sigmoid_chooses(family: str) -> None:
    """Half of the experts that ``topk(router_logits)`` names were never used: routes rebuilt from
    logits would be a drift of their own."""
    routed, seen = ran(family)
    assert routed is not None
    top = np.stack([one.topk(K).indices.numpy() for one in seen.logits.values()], axis=1)
    shared = (routed.routes[..., :, None] == top[..., None, :]).any(-1).mean()
    if family in BY_SOFTMAX:
        assert shared == 1.0
        assert routed.margins is not None
        assert routed.ordered
    else:
        assert shared < 0.8
        assert routed.margins is None
        assert not routed.ordered

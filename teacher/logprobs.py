"""Log-probabilities from hidden states, for as many positions as a trajectory has.

Shape letters: ``N`` scored positions, ``H`` hidden size, ``V`` vocabulary, ``C`` positions of a
chunk.

The logits of a long trajectory do not fit: 32k positions of a 150k vocabulary are 20 GB in float32.
So the head runs over chunks of the scored positions only, and each chunk's logits give the
log-probabilities at both temperatures and the entropy before they are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CHUNK_POSITIONS", "Scored", "score_hidden"]

CHUNK_POSITIONS = 1024
"""0.6 GB of float32 logits for a vocabulary of 150k; larger chunks are not faster."""


class Scored(NamedTuple):
    """Float32 on the device of the hidden states."""

    logprobs: Tensor
    """[N] nats, of the target under the model at T = 1."""
    entropy: Tensor
    """[N] nats, of the model's distribution at T = 1."""
    at_temperature: Tensor | None
    """[N] nats, under the logits divided by each row's temperature; None if no temperature was
    given."""


def score_hidden(
    head: Callable[[Tensor], Tensor],
    hidden_NH: Tensor,
    targets_N: Tensor,
    *,
    temperature_N: Tensor | None = None,
    chunk: int = CHUNK_POSITIONS,
) -> Scored:
    """Score ``targets_N`` (int64 ids) under ``head(hidden)``, the logits in the model's own dtype.

    ``head`` is the model's own ``lm_head``, so that a bias and tied or sharded weights are right by
    construction. The logits are widened to float32 before anything else, as engines do.
    """
    logprobs, entropy, scaled = [], [], []
    for start in range(0, len(targets_N), chunk):
        rows = slice(start, start + chunk)
        z_CV = head(hidden_NH[rows]).float()
        target_C1 = targets_N[rows, None]
        lse_C = z_CV.logsumexp(-1)
        picked_C = z_CV.gather(-1, target_C1).squeeze(-1)
        logprobs.append(picked_C - lse_C)
        if temperature_N is not None:
            t_C = temperature_N[rows]
            scaled.append(picked_C / t_C - (z_CV / t_C[:, None]).logsumexp(-1))
        # entr(p) is -p log p, and 0 for a banned token, whose logit is -inf.
        entropy.append(torch.special.entr((z_CV - lse_C[:, None]).exp_()).sum(-1))
    return Scored(torch.cat(logprobs), torch.cat(entropy), torch.cat(scaled) if scaled else None)

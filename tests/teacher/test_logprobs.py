"""Chunked scoring against a float64 log-softmax over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from driftgate.teacher.logprobs import score_hidden

N, H, V = 37, 16, 211
TOLERANCE = 4e-6
"""Nats; float32 sums over 211 logits of size 4."""


@pytest.fixture
def head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(H, V).requires_grad_(False)


@pytest.mark.parametrize("chunk", [1, 7, 37, 1024])
def test_values_do_not_depend_on_the_chunk(head: nn.Linear, chunk: int) -> None:
    hidden, targets = 4 * torch.randn(N, H), torch.randint(V, (N,))
    temperature = torch.linspace(0.5, 1.5, N)
    scored = score_hidden(head, hidden, targets, temperature_N=temperature, chunk=chunk)
    z = hidden.double() @ head.weight.double().T + head.bias.double()
    full = z.log_softmax(-1)
    wanted = full.gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(scored.logprobs.double(), wanted, atol=TOLERANCE, rtol=0)
    entropy = -(full.exp() * full).sum(-1)
    torch.testing.assert_close(scored.entropy.double(), entropy, atol=TOLERANCE, rtol=0)
    warm = (z / temperature[:, None].double()).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert scored.at_temperature is not None
    torch.testing.assert_close(scored.at_temperature.double(), warm, atol=2 * TOLERANCE, rtol=0)


def test_one_temperature_is_not_computed_twice(head: nn.Linear) -> None:
    assert score_hidden(head, torch.randn(2, H), torch.tensor([1, 2])).at_temperature is None


def test_a_banned_token_adds_nothing_to_the_entropy() -> None:
    def head(hidden: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[0.0, 0.0, float("-inf")]]).expand(len(hidden), 3)

    scored = score_hidden(head, torch.zeros(1, 1), torch.tensor([0]))
    assert scored.entropy.item() == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert scored.logprobs.item() == pytest.approx(-torch.tensor(2.0).log().item(), abs=1e-6)


def test_a_logit_that_is_no_number_is_not_hidden() -> None:
    def head(hidden: torch.Tensor) -> torch.Tensor:
        return torch.full((len(hidden), 3), float("nan"))

    scored = score_hidden(head, torch.zeros(1, 1), torch.tensor([0]))
    assert scored.logprobs.isnan().all()
    assert scored.entropy.isnan().all()

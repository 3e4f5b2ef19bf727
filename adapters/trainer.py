"""What scoring needs of a model that somebody else built, shards and trains.

A trainer's adapter runs one forward of that model and hands over its last hidden states while the
head's weights are there. It holds facts about the foreign project, changes nothing of the model,
and knows nothing of traces, stores or metrics. Nothing here imports torch: tensors come in.

Shape letters: ``T`` positions fed, ``N`` positions scored, ``H`` hidden size, ``V`` this rank's
part of the vocabulary, ``L`` MoE layers, ``K`` experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from driftgate.adapters.hf import Routed
from driftgate.trace import Reason, Routes

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

__all__ = ["Forced", "Head", "Place", "TrainerAdapter"]

R = TypeVar("R")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Head:
    """The last step of a forward, for as long as its weights are there."""

    project: Callable[[Tensor], Tensor]
    """[C, H] -> [C, V] logits of any number of positions, in the model's dtype."""
    hidden_NH: Tensor
    """After the last norm, at the positions that were asked for."""
    group: ProcessGroup | None
    """The ranks that share the vocabulary; None: all of it is here."""
    first_id: int
    """Token id of column 0."""


class Forced(NamedTuple):
    """The experts that a forward is to use in place of those that its routers would choose."""

    routes: Routes
    """[T, L, K] ids, L all MoE layers of the model."""
    given: npt.NDArray[np.bool_]
    """[T, L] where there are ids to use; elsewhere the router chooses by itself."""


class Place(NamedTuple):
    """Where a rank stands among those that hold the model."""

    replica: int
    """Which copy of the model it is part of; the copies work on different sequences."""
    replicas: int
    has_head: bool
    """It alone of its copy reports log-probabilities."""
    has_routes: bool
    """It alone of its copy reports the routes of its layers."""


class TrainerAdapter(Protocol):
    """A model inside a training job. Every rank has one, and every rank calls each method."""

    backend: str
    """As in ``trace.Trainer.backend``."""
    device: torch.device
    place: Place
    vocab_size: int
    """Token ids that it takes."""
    max_tokens: int
    """Positions that it was made for."""
    shared_length: bool
    """All copies must feed the same number of positions at once."""
    no_replay: str | None
    """Why ``forward`` takes no ``forced``; None where it does. Known after ``own_logprobs``."""
    findings: list[Reason]
    settings: dict[str, str]
    """What of the model and its libraries changes its numbers; for the fingerprint."""

    def forward(
        self,
        ids_T: Tensor,
        rows_N: Tensor,
        reduce: Callable[[Head], R],
        *,
        length: int,
        forced: Forced | None = None,
    ) -> tuple[R | None, Routed | None]:
        """Feed one sequence; ``reduce`` gets the head and the hidden states at ``rows_N``.

        ``length``: positions to feed, at least T; what is added stands after the sequence and
        changes nothing before it. Returns what ``reduce`` returned, None on ranks without a head,
        and the choices at ``rows_N`` of the routers that this rank has, None where it has none.

        Parameters, buffers, gradients, random states and modes are afterwards what they were.
        """
        ...

    def own_logprobs(self, ids_T: Tensor, targets_T: Tensor) -> Tensor | None:
        """[T] the log-probabilities of ``targets_T`` by the model's own last step, as it trains;
        None on ranks without a head."""
        ...

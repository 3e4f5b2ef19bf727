"""A Hugging Face model that a training job has sharded with torch's ``fully_shard`` (FSDP2), or not
sharded: its log-probabilities and its routes, and no trace of the visit.

The forward goes through the module that the job calls itself, so that every gather that FSDP has
hung on it happens. The head is taken over from inside: a hook gets the hidden states while the
head's weights are whole, has them scored in chunks, and lets the head itself see one row only, so
that [T, V] logits never exist. That row's logits then prove that nothing is done after the head.

Shape letters: ``T`` positions fed, ``N`` positions asked for, ``H`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from driftgate.adapters.hf import Routed, RouterTap, inspect_model, model_limit, text_config
from driftgate.adapters.hf_replay import forced as forced_routes
from driftgate.adapters.hf_replay import watched
from driftgate.adapters.trainer import Forced, Head, Place
from driftgate.errors import TeacherError
from driftgate.trace import Reason

__all__ = ["FsdpModel", "attach"]

R = TypeVar("R")

UNPROVEN = "no forward has shown yet how the routers choose"
"""Until the first one: a router that fails under given routes would leave the job's forward in the
middle."""

AFTER_HEAD_TOLERANCE = 1e-2
"""Nats. The head's tiling may change with its shape; a soft cap or a scale changes far more."""


def attach(model: nn.Module) -> FsdpModel:
    """The adapter of a causal language model of transformers that a job trains; call it on every
    rank.

    Raises ``TeacherError`` for a module that is none.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or not hasattr(model, "config"):
        raise TeacherError(
            f"{type(model).__name__} is not a causal language model of transformers: pass the one "
            "that fully_shard was called on"
        )
    return FsdpModel(model, head)


class FsdpModel:
    """See ``TrainerAdapter``."""

    backend = "fsdp"
    shared_length = False

    def __init__(self, model: Any, head: nn.Module) -> None:
        self._model, self._head = model, head
        self._tap = RouterTap(model)
        parameter = next(model.parameters())
        self.device = parameter.device
        alone = not dist.is_initialized()
        self.place = Place(
            replica=0 if alone else dist.get_rank(),
            replicas=1 if alone else dist.get_world_size(),
            has_head=True,
            has_routes=True,
        )
        self.vocab_size = int(text_config(model).vocab_size)
        self.max_tokens = model_limit(model)
        self.findings: list[Reason] = inspect_model(model)
        self.no_replay: str | None = UNPROVEN
        self.settings = {
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "attention": str(model.config._attn_implementation),
            "stored_dtype": str(parameter.dtype).removeprefix("torch."),
        }

    def forward(
        self,
        ids_T: Tensor,
        rows_N: Tensor,
        reduce: Callable[[Head], R],
        *,
        length: int,
        forced: Forced | None = None,
    ) -> tuple[R | None, Routed | None]:
        """See ``TrainerAdapter``. Raises ``TeacherError`` if the model changes its logits after
        the head."""
        padded = torch.zeros(max(length, len(ids_T)), dtype=torch.int64, device=self.device)
        padded[: len(ids_T)] = ids_T
        rows_N = rows_N.to(self.device)
        routing = self._routing(forced, len(padded))
        with _undisturbed(self._model), self._tap.capture(rows_N) as capture, routing:
            reduced, hidden_1H, logits_1V = self._run(padded, rows_N, reduce)
            own = logits_1V.float().log_softmax(-1)
            error = (own - hidden_1H.float().log_softmax(-1)).abs().max().item()
        if not error < AFTER_HEAD_TOLERANCE:
            raise TeacherError(
                f"{type(self._model).__name__} changes its logits after the head (by {error:.3g} "
                "nats): it cannot be scored in chunks"
            )
        return reduced, capture.result()

    def own_logprobs(self, ids_T: Tensor, targets_T: Tensor) -> Tensor | None:
        """See ``TrainerAdapter``: the model's own logits, whole. Tells ``no_replay``."""
        with _undisturbed(self._model), watched(self._tap.modules) as faults:
            logits_TV = self._model(input_ids=ids_T[None].to(self.device), use_cache=False).logits
        self.no_replay = faults[0] if faults else self._tap.without
        full: Tensor = logits_TV[0].float().log_softmax(-1)
        return full.gather(-1, targets_T.to(self.device)[:, None])[:, 0]

    def _routing(self, forced: Forced | None, length: int) -> AbstractContextManager[None]:
        """``forced`` in force for the next forward of ``length`` positions; what is added behind
        the sequence routes by itself."""
        if forced is None:
            return nullcontext()
        fed, layers, k = forced.routes.shape
        routes_TLK = torch.zeros((length, layers, k), dtype=torch.int64)
        given_TL = torch.zeros((length, layers), dtype=torch.bool)
        routes_TLK[:fed] = torch.from_numpy(forced.routes.astype(np.int64))
        given_TL[:fed] = torch.from_numpy(forced.given)
        device = self.device
        return forced_routes(
            self._tap.modules, self._tap.experts, routes_TLK.to(device), given_TL.to(device)
        )

    def _run(
        self, ids_T: Tensor, rows_N: Tensor, reduce: Callable[[Head], R]
    ) -> tuple[R, Tensor, Tensor]:
        """What ``reduce`` returned, and the first row's logits: by the head alone, and as the
        model returns them."""
        found: list[tuple[R, Tensor]] = []

        def take_over(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            # Not head(…), which would run this hook again.
            def project(hidden_CH: Tensor) -> Tensor:
                logits: Tensor = head.forward(hidden_CH)
                return logits

            hidden_NH = args[0][0][rows_N]
            whole = Head(project=project, hidden_NH=hidden_NH, group=None, first_id=0)
            found.append((reduce(whole), project(hidden_NH[:1])))
            return (hidden_NH[None, :1],)

        hook = self._head.register_forward_pre_hook(take_over)
        try:
            logits_11V = self._model(input_ids=ids_T[None], use_cache=False).logits
        finally:
            hook.remove()
        ((reduced, by_head_1V),) = found
        return reduced, by_head_1V, logits_11V[0]


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode as it was afterwards, and the weights
    that FSDP keeps gathered at the root after a forward given back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        if isinstance(model, FSDPModule):
            model.reshard()

"""Records and forces what Megatron-Core's routers choose, for one forward.

By Megatron's own ``RouterReplay``, as a private instance per router: the process-wide list that the
class keeps (where an actor and a reference model get mixed), and whatever a training job has
recorded in it, stay untouched, and the model need not have been built with
``moe_enable_routing_replay``.

Shape letters: ``S`` positions that this rank's routers see, ``E`` experts, ``K`` experts per token.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor

from driftgate.adapters.trainer import Forced
from driftgate.errors import TeacherError

__all__ = ["RouterTap", "routers"]


def routers(model: GPTModel) -> dict[int, TopKRouter]:
    """This rank's routers by absolute layer, ascending; those of multi-token prediction are not
    part of the policy."""
    found = {
        int(module.layer_number) - 1: module
        for module in model.decoder.modules()
        if isinstance(module, TopKRouter)
    }
    return dict(sorted(found.items()))


class RouterTap(RouterReplay):  # type: ignore[misc]
    """One router's ``RouterReplay`` for one forward, kept off the class's process-wide list."""

    def __init__(self, router: TopKRouter) -> None:
        self.clear_indices()
        self.clear_router_replay_action()
        self.by_softmax = router.score_function == "softmax" and not (
            router.config.moe_router_group_topk
        )
        self._are_logits = not router.config.moe_router_pre_softmax
        self.ordered = True
        self.margin: Tensor | None = None
        """[S] as in ``Routed``, before anything is forced; of no meaning without ``by_softmax``."""
        self._forced_SK: Tensor | None = None
        self._given_S: Tensor | None = None

    @property
    def chosen(self) -> Tensor | None:
        """[S, K] int64 the experts that were used."""
        return self.recorded_topk_idx if self._forced_SK is None else self.target_topk_idx

    def force(self, forced: Forced, slot: int, mine: slice, tokens: int) -> None:
        """Use ``forced`` of MoE layer number ``slot`` at the positions ``mine`` of ``tokens``."""
        fed, _, k = forced.routes.shape
        routes = np.zeros((tokens, k), np.int64)
        given = np.zeros(tokens, np.bool_)
        routes[:fed], given[:fed] = forced.routes[:, slot], forced.given[:, slot]
        self._forced_SK = torch.from_numpy(routes[mine])
        self._given_S = torch.from_numpy(given[mine])

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """``RouterReplay``'s RECORD, and its REPLAY_FORWARD where routes are forced."""
        how = (scores, topk, num_groups, group_topk, default_compute_topk)
        self.router_replay_action = RouterReplayAction.RECORD
        probs_SK, own_SK = super().get_replay_topk(*how)
        self._look(scores, own_SK)
        if self._forced_SK is None or self._given_S is None:
            return probs_SK, own_SK
        if self._forced_SK.shape != own_SK.shape:
            raise TeacherError(
                f"routes of shape {tuple(self._forced_SK.shape)} do not fit a router that chooses "
                f"{tuple(own_SK.shape)}"
            )
        # An id that the router does not have is no choice of its model.
        given_S = self._given_S & (self._forced_SK < scores.shape[-1]).all(-1)
        given_S1 = given_S.to(own_SK.device)[:, None]
        self.target_topk_idx = torch.where(given_S1, self._forced_SK.to(own_SK.device), own_SK)
        self.router_replay_action = RouterReplayAction.REPLAY_FORWARD
        return cast(tuple[Tensor, Tensor], super().get_replay_topk(*how))

    def _look(self, scores_SE: Tensor, own_SK: Tensor) -> None:
        chosen_SK = scores_SE.gather(-1, own_SK).float()
        others_S = scores_SE.scatter(-1, own_SK, float("-inf")).float().amax(-1)
        self.ordered &= bool((chosen_SK[:, :-1] >= chosen_SK[:, 1:]).all())
        last_S = chosen_SK.amin(-1)
        # The gap of the logits is that of the log-probabilities.
        gap_S = last_S - others_S if self._are_logits else last_S.log() - others_S.log()
        self.margin = gap_S.clamp_min(0.0)

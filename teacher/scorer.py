"""One forward of a causal language model that scores traces: the part all torch backends share.

It is a module of its own, so that FSDP can shard it as the root: the head's weights are then
gathered for the whole forward and the head can run chunk by chunk inside it.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from driftgate.adapters.hf import Routed, RouterTap
from driftgate.adapters.hf_replay import forced
from driftgate.errors import TeacherError
from driftgate.teacher.base import SliceResult
from driftgate.teacher.logprobs import Scored, score_hidden
from driftgate.teacher.sequences import Replay, Sequence

__all__ = ["PROBE_TOKENS", "PROBE_TOLERANCE", "Scorer", "split_rows", "temperatures"]

Forced: TypeAlias = tuple[Tensor, Tensor]
"""Routes to use, int64 [T, L, K], and where, bool [T, L]."""

PROBE_TOKENS = 64
"""Fed once at start, to prove that the head is the model's last step and that routes are
ordered."""


class Scorer(nn.Module):
    """A Hugging Face causal language model and its head, run apart so that logits stay in
    chunks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.tap = RouterTap(model)
        self.no_replay: str | None = None
        """Why routes cannot be replayed in this model; known after ``probe``."""

    def forward(
        self,
        ids_1T: Tensor,
        rows_N: Tensor,
        targets_N: Tensor,
        temperature_N: Tensor | None,
        replay: Forced | None = None,
    ) -> tuple[Scored, Routed | None]:
        """Score ``targets_N`` by the logits at positions ``rows_N`` of one sequence."""
        routing = nullcontext() if replay is None else self._forced(replay)
        with self.tap.capture(rows_N) as capture, routing:
            hidden_TH = self.model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state[
                0
            ]
        scored = score_hidden(
            self.model.get_output_embeddings(),
            hidden_TH[rows_N],
            targets_N,
            temperature_N=temperature_N,
        )
        return scored, capture.result()

    @torch.no_grad()
    def run(self, sequence: Sequence, device: torch.device) -> list[SliceResult]:
        """Score every slice of ``sequence`` in one forward."""
        started = time.perf_counter()
        slices = sequence.slices
        rows = torch.cat([torch.arange(part.first, part.last) for part in slices])
        targets = torch.from_numpy(np.concatenate([part.response_ids for part in slices]))
        temperature = temperatures(sequence)
        scored, routed = self(
            torch.from_numpy(sequence.ids).long().to(device)[None],
            rows.to(device),
            targets.long().to(device),
            None if temperature is None else temperature.to(device),
            _on(sequence.replay, device),
        )
        return split_rows(sequence, scored, routed, time.perf_counter() - started)

    @torch.no_grad()
    def probe(self, device: torch.device) -> bool:
        """Prove the assumptions on one short forward; True where routes come in descending order.

        Raises ``TeacherError`` if the model does more to its logits than its head does, which
        ``forward`` leaves out.
        """
        vocab = int(self.model.config.vocab_size)
        ids = torch.arange(PROBE_TOKENS, device=device) * 7919 % vocab
        rows = torch.arange(PROBE_TOKENS, device=device)
        scored, routed = self(ids[None], rows, ids, None)
        # FSDP keeps its root's weights gathered after a forward, so the head is there to call.
        full = self.model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
        error = (full.gather(-1, ids[:, None])[:, 0] - scored.logprobs).abs().max().item()
        if not error < PROBE_TOLERANCE:
            raise TeacherError(
                f"{type(self.model).__name__} changes its logits after the head (its own forward "
                f"differs by {error:.3g} nats); the teacher cannot score it in chunks"
            )
        self.no_replay = self._replay_fault(ids, rows, scored, routed)
        return routed is not None and routed.margins is not None and routed.ordered

    def _replay_fault(
        self, ids: Tensor, rows: Tensor, scored: Scored, routed: Routed | None
    ) -> str | None:
        """Why this model's routers do not take given routes, or None: proven by giving some."""
        if routed is None:
            return "the trainer's model has no routers"
        own = torch.from_numpy(routed.routes.astype(np.int64)).to(ids.device)
        counts = torch.tensor(self.tap.experts, device=ids.device)[None, :, None]
        given = torch.ones(own.shape[:2], dtype=torch.bool, device=ids.device)
        try:
            again, _ = self(ids[None], rows, ids, None, (own, given))
            _, moved = self(ids[None], rows, ids, None, ((own + 1) % counts, given))
        except TeacherError as error:
            return str(error)
        assert moved is not None
        taken = np.sort(moved.routes, -1) == np.sort(((own + 1) % counts).cpu().numpy(), -1)
        if not taken.all():
            return "the routers do not use the routes that they are given"
        if not torch.equal(again.logprobs, scored.logprobs):
            return "the model's own routes, replayed, do not give its own numbers"
        return None

    def _forced(self, replay: Forced) -> AbstractContextManager[None]:
        return forced(self.tap.modules, self.tap.experts, *replay)


PROBE_TOLERANCE = 1e-2
"""Nats. The head's tiling may change with its shape; a soft cap or a scale changes far more."""


def _on(replay: Replay | None, device: torch.device) -> Forced | None:
    if replay is None:
        return None
    routes = torch.from_numpy(replay.routes.astype(np.int64)).to(device)
    return routes, torch.from_numpy(replay.given).to(device)


def temperatures(sequence: Sequence) -> Tensor | None:
    """[N] temperature of each row, 1 where none was asked for; None if no slice asked."""
    if all(part.temperature is None for part in sequence.slices):
        return None
    return torch.cat(
        [torch.full((len(part.response_ids),), part.temperature or 1.0) for part in sequence.slices]
    )


def split_rows(
    sequence: Sequence, scored: Scored, routed: Routed | None, forward_s: float
) -> list[SliceResult]:
    """Cut a forward's rows into the results of its slices."""
    logprobs, entropy = scored.logprobs.cpu().numpy(), scored.entropy.cpu().numpy()
    scaled = None if scored.at_temperature is None else scored.at_temperature.cpu().numpy()
    per_row_s = forward_s / len(logprobs)
    margins = routed.margins if routed is not None else None
    results, end = [], 0
    for part in sequence.slices:
        at = slice(end, end := end + len(part.response_ids))
        results.append(
            SliceResult(
                trace_id=part.trace_id,
                logprobs=logprobs[at],
                entropy=entropy[at],
                at_temperature=(
                    scaled[at] if scaled is not None and part.temperature is not None else None
                ),
                routes=routed.routes[at] if routed is not None else None,
                margins=margins[at] if margins is not None else None,
                layer_ids=routed.layer_ids if routed is not None else (),
                one_pass=part.one_pass,
                forward_s=per_row_s * (at.stop - at.start),
            )
        )
    return results

"""One forward of a causal language model that scores traces: the part all torch backends share.

It is a module of its own, so that FSDP can shard it as the root: the head's weights are then
gathered for the whole forward and the head can run chunk by chunk inside it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from driftgate.adapters.hf import Routed, RouterTap, text_config
from driftgate.adapters.hf_replay import forced
from driftgate.errors import TeacherError
from driftgate.teacher.base import SliceResult
from driftgate.teacher.batches import Batching, batch
from driftgate.teacher.logprobs import Scored, score_hidden
from driftgate.teacher.sequences import Replay, Sequence, Slice

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
        """Raises ``TeacherError`` for a model whose part before the head is not known."""
        super().__init__()
        if model.base_model is model:
            raise TeacherError(
                f"{type(model).__name__} does not name its part before the head; "
                "the teacher cannot score it in chunks"
            )
        self.model = model
        self.tap = RouterTap(model)
        self.no_replay: str | None = None
        """Why routes cannot be replayed in this model; known after ``probe``."""

    def forward(
        self,
        ids_BT: Tensor,
        rows_N: Tensor,
        targets_N: Tensor,
        temperature_N: Tensor | None,
        replay: Forced | None = None,
        positions_BT: Tensor | None = None,
    ) -> tuple[Scored, Routed | None]:
        """Score ``targets_N`` by the logits at places ``rows_N`` of all B * T."""
        routing = nullcontext() if replay is None else self._forced(replay)
        placed = {} if positions_BT is None else {"position_ids": positions_BT}
        with self.tap.capture(rows_N) as capture, routing:
            hidden_BTH = self.model.base_model(
                input_ids=ids_BT, use_cache=False, **placed
            ).last_hidden_state
        scored = score_hidden(
            self.model.get_output_embeddings(),
            hidden_BTH.flatten(0, 1)[rows_N],
            targets_N,
            temperature_N=temperature_N,
        )
        return scored, capture.result()

    @torch.no_grad()
    def run(
        self, sequences: Seq[Sequence], device: torch.device, how: Batching = "alone"
    ) -> list[list[SliceResult]]:
        """Score every slice of ``sequences`` in one forward; the results of each sequence."""
        started = time.perf_counter()
        fed = batch(sequences, how)
        targets = np.concatenate([part.response_ids for part in fed.slices])
        temperature = temperatures(fed.slices)
        scored, routed = self(
            torch.from_numpy(fed.ids).to(device),
            torch.from_numpy(fed.rows).to(device),
            torch.from_numpy(targets).long().to(device),
            None if temperature is None else temperature.to(device),
            _on(fed.replay, device),
            None if fed.positions is None else torch.from_numpy(fed.positions).to(device),
        )
        results = iter(split_rows(fed.slices, scored, routed, time.perf_counter() - started))
        return [list(islice(results, len(one.slices))) for one in sequences]

    @torch.no_grad()
    def probe(self, device: torch.device, how: Batching = "alone") -> bool:
        """Prove the assumptions on short forwards; True where routes come in descending order.

        Raises ``TeacherError`` if the model does more to its logits than its head does, which
        ``forward`` leaves out, or if it is to be ``packed`` and its sequences see each other.
        """
        vocab = int(text_config(self.model).vocab_size)
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
        if how == "packed":
            self._prove_apart(device, vocab)
        return routed is not None and routed.margins is not None and routed.ordered

    def _prove_apart(self, device: torch.device, vocab: int) -> None:
        """Raises ``TeacherError`` unless two packed sequences have the same numbers in either
        order: state-space, linear-attention and convolution layers run on over the boundary, and
        some families make no blocks of ``position_ids``.

        Shapes and experts' shares are the same both times, so that there is no tiling to excuse.
        """
        count, last = np.arange(2 * PROBE_TOKENS).reshape(2, -1), PROBE_RESPONSE + 1
        first, second = (
            Sequence(ids=ids, slices=(Slice(trace_id="", prompt_len=1, response_ids=ids[1:last]),))
            for ids in (count * 7919 % vocab).astype(np.int32)
        )
        one = self.run([first, second], device, "packed")
        other = self.run([second, first], device, "packed")[::-1]
        pairs = zip(one, other, strict=True)
        moved = float(np.mean([np.abs(a.logprobs - b.logprobs) for (a,), (b,) in pairs]))
        narrow = next(self.model.parameters()).dtype.itemsize == 2
        if not moved < (APART_TOLERANCE_16 if narrow else APART_TOLERANCE):
            raise TeacherError(
                f"{type(self.model).__name__} lets packed sequences see each other (what stands "
                f"before one moves its numbers by {moved:.3g} nats); use --batching padded"
            )

    def _replay_fault(
        self, ids: Tensor, rows: Tensor, scored: Scored, routed: Routed | None
    ) -> str | None:
        """Why this model's routers do not take given routes, or None: proven by giving some."""
        if routed is None:
            return self.tap.without
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
PROBE_RESPONSE = 16
"""Tokens: a short convolution reaches no further."""
APART_TOLERANCE, APART_TOLERANCE_16 = 1e-5, 5e-2
"""Mean nats, in float32 and in 16 bits. On a CPU no attention-only family moves by a bit; the least
leak that was seen is 5e-5 in a random LFM2 whose tokens are all alike, 0.3 in weights as wide as a
trained one's."""


def _on(replay: Replay | None, device: torch.device) -> Forced | None:
    if replay is None:
        return None
    routes = torch.from_numpy(replay.routes.astype(np.int64)).to(device)
    return routes, torch.from_numpy(replay.given).to(device)


def temperatures(slices: Seq[Slice]) -> Tensor | None:
    """[N] temperature of each row, 1 where none was asked for; None if no slice asked."""
    if all(part.temperature is None for part in slices):
        return None
    return torch.cat(
        [torch.full((len(part.response_ids),), part.temperature or 1.0) for part in slices]
    )


def split_rows(
    slices: Seq[Slice], scored: Scored, routed: Routed | None, forward_s: float
) -> list[SliceResult]:
    """Cut a forward's rows into the results of ``slices``."""
    logprobs, entropy = scored.logprobs.cpu().numpy(), scored.entropy.cpu().numpy()
    scaled = None if scored.at_temperature is None else scored.at_temperature.cpu().numpy()
    per_row_s = forward_s / len(logprobs)
    margins = routed.margins if routed is not None else None
    results, end = [], 0
    for part in slices:
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
                experts=routed.experts if routed is not None else None,
                one_pass=part.one_pass,
                forward_s=per_row_s * (at.stop - at.start),
            )
        )
    return results

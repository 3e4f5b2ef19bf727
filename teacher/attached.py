"""Scores with a model that is spread over the ranks of a process group, through its adapter.

For a training job's own model (``driftgate.adapters.megatron.attach``, ``…fsdp.attach``), and for
the stand-alone Megatron worker, which attaches to a model that it built. Every copy of the model
works on a sequence of its own; a round gives one to each, of similar lengths, and a copy without
one runs a dummy, because all ranks must run the same number of forwards. The last pipeline stage
reports log-probabilities, each stage the routes of its layers; rank 0 puts them together. It alone
knows of storage.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from driftgate.adapters.hf import Routed
from driftgate.adapters.trainer import Forced, Head, TrainerAdapter
from driftgate.errors import DriftgateError, TeacherError
from driftgate.teacher.base import SliceResult
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.logprobs import Scored, VocabShard, score_hidden
from driftgate.teacher.scorer import PROBE_TOKENS, PROBE_TOLERANCE, split_rows, temperatures
from driftgate.teacher.sequences import Sequence, Slice
from driftgate.teacher.worker import Report, Worker
from driftgate.trace import Trainer

__all__ = ["AttachedBackend"]

CONTROL_TIMEOUT = timedelta(days=3650)
"""The other ranks wait for work as long as rank 0 has none. A rank that dies closes its
connections, which ends the wait at once."""

DUMMY = Sequence(
    ids=np.zeros(2, np.int32),
    slices=(Slice(trace_id="", prompt_len=1, response_ids=np.zeros(1, np.int32)),),
)


class _Part(NamedTuple):
    """What one rank knows of one sequence."""

    scored: Scored | None
    routed: Routed | None
    forward_s: float


class _Probed(NamedTuple):
    """What one rank learnt from the forward at start."""

    dtype: str | None
    error: float | None
    """Nats, of the head run apart against the model's own last step."""
    ordered: bool | None
    """None: it has no routers."""


class AttachedBackend:
    """One rank of a spread-out trainer. Make one on every rank, at the same point.

    ``score_batch`` and ``score_store`` are called on every rank alike, as a training job does. The
    stand-alone worker calls ``score`` on rank 0 and ``serve`` on the others instead.
    """

    def __init__(
        self,
        adapter: TrainerAdapter,
        *,
        name: str,
        checkpoint: str | None = None,
        train_dtype: str | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """``name``: of the model, as cells show it. ``checkpoint``: its digest, where known.
        ``texts``: of `driftgate.adapters.hf_texts.text_digests`, where the tokenizer is known.

        Runs one short forward. Raises ``TeacherError``, on every rank, if the model does more to
        its logits than its head does.
        """
        self._adapter = adapter
        self.rank = dist.get_rank()
        self._control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        self.parallel = adapter.place.replicas
        self.vocab_size, self.max_tokens = adapter.vocab_size, adapter.max_tokens
        self.findings = adapter.findings
        self._places: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(self._places, adapter.place, group=self._control)
        self.trainer = self._fingerprint(name, checkpoint, train_dtype, texts or {})
        self.no_replay = adapter.no_replay

    def score(self, sequences: Seq[Sequence]) -> list[SliceResult]:
        """Rank 0: score ``sequences`` on all ranks, the others being in ``serve``.

        A rank that fails inside a forward leaves the others waiting for its part, so no error here
        can be survived: it ends the process, whose connections close with it.
        """
        assert self.rank == 0
        # Longest first, so that the sequences of one round are of similar length.
        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].ids))
        ordered = [sequences[index] for index in order]
        dist.broadcast_object_list([ordered], src=0, group=self._control)
        gathered: list[Any] = [None] * len(self._places)
        dist.gather_object(self._share(ordered), gathered, dst=0, group=self._control)
        by_sequence: list[list[SliceResult]] = [[] for _ in sequences]
        for place, index in enumerate(order):
            by_sequence[index] = self._joined(gathered, place, ordered[place])
        return [result for results in by_sequence for result in results]

    def serve(self) -> None:
        """Other ranks: do what rank 0 sends until it is done. Raises ``TeacherError`` if it ended
        for a reason."""
        assert self.rank != 0
        while True:
            work: list[Any] = [None]
            dist.broadcast_object_list(work, src=0, group=self._control)
            if isinstance(work[0], str):
                if work[0]:
                    raise TeacherError(work[0])
                return
            dist.gather_object(self._share(work[0]), None, dst=0, group=self._control)

    def dismiss(self, why: str = "") -> None:
        """Rank 0: end the ``serve`` of the other ranks, which raise ``why`` if there is one."""
        assert self.rank == 0
        dist.broadcast_object_list([why], src=0, group=self._control)

    def score_batch(self, sequences: Seq[Sequence]) -> list[SliceResult]:
        """Every rank calls it; rank 0's ``sequences`` are scored, and only it gets results."""
        if self.rank != 0:
            self.serve()
            return []
        results = self.score(sequences)
        self.dismiss()
        return results

    def score_store(
        self,
        store: str,
        *,
        model: str,
        weight_version: str | None = None,
        served_model: str | None = None,
    ) -> Report | None:
        """Score what a store holds and this trainer has not scored yet; every rank calls it.

        ``model``: a checkpoint directory with the policy's tokenizer, which the traces' tokens are
        checked against; its weights are not read. ``weight_version``: of the weights as they are
        now, as the engine's calls name theirs. Rank 0 gets what was done, the others None.

        Raises ``DriftgateError`` on every rank where the store fails.
        """
        if self.rank != 0:
            self.serve()
            return None
        try:
            report = self._worked(
                TeacherConfig(
                    store=store,
                    model=model,
                    weight_version=weight_version,
                    served_model=served_model,
                )
            )
        except (DriftgateError, ValueError) as error:
            self.dismiss(f"rank 0 could not score {store}: {error}")
            raise
        self.dismiss()
        return report

    def close(self) -> None:
        """Leave this backend's own process group; every rank does. The model is as it was."""
        dist.destroy_process_group(self._control)

    def _worked(self, config: TeacherConfig) -> Report:
        worker = Worker(config, self, refused=False)  # each update of the weights starts one
        try:
            return worker.run(threading.Event())
        finally:
            worker.close()

    def _share(self, ordered: Seq[Sequence]) -> list[_Part]:
        """This rank's part of a sequence of each round."""
        place = self._adapter.place
        parts = []
        for start in range(0, len(ordered), place.replicas):
            fed = ordered[start : start + place.replicas]
            mine = fed[place.replica] if place.replica < len(fed) else DUMMY
            longest = max(len(one.ids) for one in fed)
            length = longest if self._adapter.shared_length else len(mine.ids)
            parts.append(self._run(mine, length))
        return parts

    def _run(self, sequence: Sequence, length: int) -> _Part:
        started = time.perf_counter()
        slices = sequence.slices
        rows = torch.cat([torch.arange(part.first, part.last) for part in slices])
        targets = torch.from_numpy(np.concatenate([part.response_ids for part in slices]))
        device = self._adapter.device
        warm = temperatures(slices)
        replay = sequence.replay
        scored, routed = self._adapter.forward(
            torch.from_numpy(sequence.ids).long().to(device),
            rows.to(device),
            _scoring(targets.long().to(device), None if warm is None else warm.to(device)),
            length=length,
            forced=None if replay is None else Forced(replay.routes, replay.given),
        )
        return _Part(_on_cpu(scored), routed, time.perf_counter() - started)

    def _joined(self, gathered: list[Any], place: int, sequence: Sequence) -> list[SliceResult]:
        """The results of sequence number ``place`` from the parts of the ranks that fed it."""
        replica, turn = place % self.parallel, place // self.parallel
        parts: list[_Part] = [
            shared[turn]
            for shared, where in zip(gathered, self._places, strict=True)
            if where.replica == replica
        ]
        (scored,) = (part.scored for part in parts if part.scored is not None)
        routed = _all_layers([part.routed for part in parts if part.routed is not None])
        # The stages of one copy work one after the other.
        return split_rows(sequence.slices, scored, routed, max(part.forward_s for part in parts))

    def _fingerprint(
        self,
        name: str,
        checkpoint: str | None,
        train_dtype: str | None,
        texts: Mapping[str, str],
    ) -> Trainer:
        """What this trainer is called, from what its ranks found out together."""
        everyone: list[Any] = [None] * len(self._places)
        dist.all_gather_object(everyone, self._probe(), group=self._control)
        errors = [probed.error for probed in everyone if probed.error is not None]
        if not max(errors) < PROBE_TOLERANCE:
            raise TeacherError(
                f"the model changes its logits after the head (its own differ by {max(errors):.3g} "
                "nats); it cannot be scored in chunks"
            )
        ordered = [probed.ordered for probed in everyone if probed.ordered is not None]
        device = self._adapter.device
        settings = {**self._adapter.settings, **texts}
        settings["device"] = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        )
        if train_dtype is not None:
            settings["train_dtype"] = train_dtype
        if self.findings:
            settings["findings"] = ",".join(sorted({one.code for one in self.findings}))
        return Trainer(
            backend=self._adapter.backend,
            model=name,
            checkpoint=checkpoint,
            dtype=next(probed.dtype for probed in everyone if probed.dtype is not None),
            world_size=len(self._places),
            routes_ordered=bool(ordered) and all(ordered),
            settings=settings,
        )

    def _probe(self) -> _Probed:
        """One short forward, scored in chunks and by the model's own last step."""
        device = self._adapter.device
        ids = torch.arange(PROBE_TOKENS, device=device) * 7919 % self.vocab_size
        seen: list[str] = []

        def reduce(head: Head) -> Scored:
            seen.append(str(head.hidden_NH.dtype).removeprefix("torch."))
            return _scoring(ids, None)(head)

        rows = torch.arange(PROBE_TOKENS, device=device)
        scored, routed = self._adapter.forward(ids, rows, reduce, length=PROBE_TOKENS)
        own = self._adapter.own_logprobs(ids, ids)
        ordered = None if routed is None else routed.margins is not None and routed.ordered
        if scored is None or own is None:
            return _Probed(None, None, ordered)
        return _Probed(seen[0], (own - scored.logprobs).abs().max().item(), ordered)


def _scoring(targets_N: Tensor, temperature_N: Tensor | None) -> Callable[[Head], Scored]:
    """Score ``targets_N`` by whatever part of the vocabulary a head has."""

    def reduce(head: Head) -> Scored:
        shard = None if head.group is None else VocabShard(head.group, head.first_id)
        return score_hidden(
            head.project, head.hidden_NH, targets_N, temperature_N=temperature_N, shard=shard
        )

    return reduce


def _on_cpu(scored: Scored | None) -> Scored | None:
    if scored is None:
        return None
    warm = scored.at_temperature
    return Scored(scored.logprobs.cpu(), scored.entropy.cpu(), None if warm is None else warm.cpu())


def _all_layers(parts: list[Routed]) -> Routed | None:
    """The routes of all stages, in the order of their layers."""
    if not parts:
        return None
    parts = sorted(parts, key=lambda part: part.layer_ids)
    margins = [part.margins for part in parts if part.margins is not None]
    return Routed(
        routes=np.concatenate([part.routes for part in parts], axis=1),
        margins=np.concatenate(margins, axis=1) if len(margins) == len(parts) else None,
        layer_ids=tuple(layer for part in parts for layer in part.layer_ids),
        experts=max(part.experts for part in parts),
        ordered=all(part.ordered for part in parts),
    )

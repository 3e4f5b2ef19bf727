"""Torch FSDP2: the model sharded over the ranks of a process group, equal to the reference bit for
bit.

Every rank scores its own sequences (data parallel) while the weights of a layer are gathered for as
long as it runs. All ranks must therefore run the same number of forwards: a round gives one
sequence to each rank, of similar lengths, and a rank without one runs a dummy. Rank 0 is the only
one that knows of storage; the others do what it sends.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from driftgate.adapters.hf import inspect_model, model_limit, text_config
from driftgate.adapters.hf_digest import checkpoint_digest
from driftgate.adapters.hf_texts import text_digests
from driftgate.errors import TeacherError
from driftgate.teacher.base import SliceResult
from driftgate.teacher.batches import SEQUENCES_AT_ONCE, Batching, groups
from driftgate.teacher.config import BATCH_TOKENS, TeacherConfig
from driftgate.teacher.reference import fingerprint, load_model, pick_device
from driftgate.teacher.scorer import Scorer
from driftgate.teacher.sequences import Sequence, Slice
from driftgate.trace import Reason

__all__ = ["FsdpBackend"]

CONTROL_TIMEOUT = timedelta(days=3650)
"""The other ranks wait for work as long as rank 0 follows a quiet store. A rank that dies closes
its connections, which ends the wait at once."""

DUMMY = Sequence(
    ids=np.zeros(2, np.int32),
    slices=(Slice(trace_id="", prompt_len=1, response_ids=np.zeros(1, np.int32)),),
)


class FsdpBackend:
    """One rank of the sharded trainer. Rank 0 calls ``score``; every other rank calls ``serve``."""

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        checkpoint: str | None,
        device: torch.device,
        train_dtype: str | None = None,
        texts: Mapping[str, str] | None = None,
        batching: Batching = "alone",
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self.rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._batching, self._batch_tokens = batching, batch_tokens
        self.parallel = self._ranks * (1 if batching == "alone" else SEQUENCES_AT_ONCE)
        self._device = device
        self._control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        self.findings: list[Reason] = inspect_model(model)
        self.vocab_size = int(text_config(model).vocab_size)
        self.max_tokens = model_limit(model)
        self._scorer = Scorer(model).eval().requires_grad_(False)
        mesh = init_device_mesh(device.type, (self._ranks,))
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(self._scorer, mesh=mesh)
        self.trainer = fingerprint(
            model,
            backend="fsdp",
            name=name,
            checkpoint=checkpoint,
            ordered=self._scorer.probe(device, batching),
            findings=self.findings,
            train_dtype=train_dtype,
            texts=texts,
            world_size=self._ranks,
            batching=batching,
        )
        self.no_replay = self._scorer.no_replay

    @classmethod
    def load(cls, config: TeacherConfig) -> FsdpBackend:
        """Join the process group that torchrun describes in the environment and load the
        checkpoint."""
        device = pick_device(config)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        root = Path(config.model)
        digest = checkpoint_digest(root) if dist.get_rank() == 0 else None
        return cls(
            load_model(config),
            name=root.resolve().name,
            checkpoint=digest,
            device=device,
            train_dtype=config.train_dtype,
            texts=text_digests(root),
            batching=config.batching,
            batch_tokens=config.batch_tokens,
        )

    def score(self, sequences: Seq[Sequence]) -> list[SliceResult]:
        """Rank 0: score ``sequences`` on all ranks, the results in their order.

        A rank that fails inside a forward leaves the others waiting for its weights, so no error
        here can be survived, nor followed by a ``close``: it ends the process, whose connections
        close with it, and torchrun ends the rest.
        """
        assert self.rank == 0
        # Longest first, so that the sequences of one round are of similar length.
        lengths = [len(one.ids) for one in sequences]
        grouped = groups(lengths, self._batching, self._batch_tokens)
        work = [[sequences[index] for index in group] for group in grouped]
        dist.broadcast_object_list([work], src=0, group=self._control)
        gathered: list[Any] = [None] * self._ranks
        dist.gather_object(self._share(work), gathered, dst=0, group=self._control)
        by_sequence: list[list[SliceResult]] = [[] for _ in sequences]
        for place, group in enumerate(grouped):
            found = gathered[place % self._ranks][place // self._ranks]
            for index, results in zip(group, found, strict=True):
                by_sequence[index] = results
        return [result for results in by_sequence for result in results]

    def serve(self) -> None:
        """Other ranks: do what rank 0 sends until it closes."""
        assert self.rank != 0
        while True:
            work: list[Any] = [None]
            dist.broadcast_object_list(work, src=0, group=self._control)
            if work[0] is None:
                return
            dist.gather_object(self._share(work[0]), None, dst=0, group=self._control)

    def dismiss(self) -> None:
        """Rank 0: end the ``serve`` of the other ranks."""
        assert self.rank == 0
        dist.broadcast_object_list([None], src=0, group=self._control)

    def close(self) -> None:
        """Dismiss the others, then leave the process group; every rank does, and none that
        failed: the others may be inside a forward, where they would never hear of it."""
        if self.rank == 0:
            self.dismiss()
        dist.destroy_process_group()

    def _share(self, work: Seq[Seq[Sequence]]) -> list[list[list[SliceResult]]]:
        """This rank's results, one forward per round: number ``rank`` of each ``ranks``, or a
        dummy."""
        shared = []
        for start in range(0, len(work), self._ranks):
            place = start + self.rank
            fed = work[place] if place < len(work) else [DUMMY]
            shared.append(self._scorer.run(fed, self._device, self._batching))
        return shared


def _layers(model: Any) -> Any:
    """The layers that are sharded one by one. Raises ``TeacherError`` where they are not found."""
    found = getattr(model.get_decoder(), "layers", None)
    if found is None:
        raise TeacherError(
            f"the layers of {type(model).__name__} are not found to shard; use --backend reference"
        )
    return found

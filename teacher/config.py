"""Settings of the teacher, validated once at start."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from driftgate.logs import LogFormat
from driftgate.storage import MAX_LEASE_S
from driftgate.teacher.batches import Batching

__all__ = ["BATCH_TOKENS", "BackendName", "TeacherConfig"]

BackendName = Literal["reference", "fsdp", "megatron"]

BATCH_TOKENS = 8192
"""Positions of a forward of several sequences: the attention of packed ones takes memory with its
square, 64 MB of mask here."""


class TeacherConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to score with what. Raises ``ValueError`` for settings that cannot work."""

    store: str
    """Directory of the store that the gateway writes."""
    model: str
    """Directory of the trainer's checkpoint."""
    backend: BackendName = "reference"
    """``reference``: one process, the oracle. ``fsdp``: torch ``fully_shard`` over ``nproc``
    processes. ``megatron``: Megatron-Core over ``nproc`` processes."""
    nproc: int = 1
    """Processes of the ``fsdp`` or ``megatron`` backend on this machine."""
    tensor_parallel: int = 1
    """``megatron``: ranks that share each layer."""
    pipeline_parallel: int = 1
    """``megatron``: ranks that hold consecutive layers."""
    expert_parallel: int = 1
    """``megatron``: ranks that share the experts of a layer."""
    sequence_parallel: bool = False
    """``megatron``: the tensor-parallel ranks also share the positions between their layers."""
    follow: bool = False
    """Keep scoring as traces arrive; else stop when nothing is left."""
    served_model: str | None = None
    """Score only traces of this served model name; None scores every trace in the store."""
    weight_version: str | None = None
    """Policy version of the checkpoint, as the engine's calls name theirs; None: unknown."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the weights; ``auto`` is the checkpoint's own."""
    train_dtype: str | None = None
    """Precision that the training job computes in; scores in another one are marked as such."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: CUDA where there is one."""
    attention: str = "sdpa"
    """transformers' attention implementation."""
    experts: str | None = None
    """transformers' MoE implementation (``eager``, ``grouped_mm``, ``batched_mm``). None: its own
    choice, which is what a training job runs: ``grouped_mm``. Against vLLM's CPU kernel on the same
    bfloat16 input it errs 7 % less than ``eager``; either is twice as far from float64 as vLLM."""
    max_tokens: int | None = None
    """Longest sequence that fits this machine; longer ones get a score that says so. None: the
    model's own limit."""
    batching: Batching = "alone"
    """``alone``: a forward for each sequence. ``padded``, ``packed``: several of similar length in
    one, which is faster for short ones and changes the last bits; the fingerprint says so. Not for
    ``megatron``."""
    batch_tokens: int = BATCH_TOKENS
    """Positions of such a forward at most, padding among them; a longer sequence is alone."""
    noise_floor_trajectories: int = 2
    """The trainer scores the first so many trajectories twice, as its own noise floor."""
    floor_traces: int = 0
    """Not 0: score nothing, and run the trainer twice over so many of the newest traces."""
    replay: bool = True
    """Score a mixture of experts a second time under the rollout's routes, where it has them. It
    costs a forward more for each one, and a dense model nothing. On unless switched off: a score is
    taken once, and what routing contributes to its drift cannot be told later without this."""
    log_format: LogFormat = "text"
    """``json``: one object a line on stderr, for a collector."""
    lease_s: float = 120.0
    """A trajectory leased by a worker that died is free again after this many seconds."""

    def __post_init__(self) -> None:
        if not (Path(self.model) / "config.json").is_file():
            raise ValueError(f"model={self.model!r} is no checkpoint directory (no config.json)")
        if self.nproc < 1 or (self.backend == "reference" and self.nproc != 1):
            raise ValueError(f"nproc={self.nproc}: reference is one process, fsdp at least one")
        if self.floor_traces < 0 or (self.floor_traces and self.follow):
            raise ValueError(f"floor_traces={self.floor_traces}: at least 0, and not with follow")
        if self.batching != "alone" and self.backend == "megatron":
            raise ValueError(f"batching={self.batching!r} is not for megatron")
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens={self.batch_tokens} must be at least 1")
        self._check_layout()
        if not 1 <= self.lease_s <= MAX_LEASE_S or self.noise_floor_trajectories < 0:
            raise ValueError(
                f"lease_s must be at least 1 and at most {MAX_LEASE_S:.0f}, and "
                "noise_floor_trajectories at least 0"
            )
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(
                f"max_tokens={self.max_tokens} leaves no room for a prompt and a response"
            )

    def _check_layout(self) -> None:
        tp, pp, ep = self.tensor_parallel, self.pipeline_parallel, self.expert_parallel
        if min(tp, pp, ep) < 1:
            raise ValueError(f"tp={tp}, pp={pp} and ep={ep} must be at least 1")
        if self.backend != "megatron":
            if (tp, pp, ep) != (1, 1, 1) or self.sequence_parallel:
                raise ValueError(f"tp, pp, ep and sequence_parallel are not for {self.backend}")
        elif self.nproc % (tp * pp) or self.nproc % (ep * pp):
            raise ValueError(
                f"nproc={self.nproc} must be a multiple of tp * pp = {tp * pp} and of "
                f"ep * pp = {ep * pp}"
            )
        elif self.sequence_parallel and tp == 1:
            raise ValueError("sequence_parallel shares positions over tp ranks: tp must be above 1")

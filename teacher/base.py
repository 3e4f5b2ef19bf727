"""What the worker asks of a backend: a fingerprint, and numbers for sequences.

Shape letters: ``T`` tokens of a sequence, ``R`` response tokens of a trace, ``L`` MoE layers, ``E``
experts of each, ``K`` experts per token.

One sequence is one forward: no padding and no packing. Kernels choose their tiling by shape, so a
batch changes a result in its last bits, and the trainer would then add noise of its own to what it
measures. One exception is taken for its speed: traces whose tokens are a prefix of another's share
its forward (``driftgate.teacher.sequences``, which says what that changes), and the trainer's noise
floor says how much it is on the traces at hand.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from driftgate.teacher.sequences import Sequence
from driftgate.trace import Reason, Routes, Trainer

__all__ = ["Backend", "SliceResult"]

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SliceResult:
    """The trainer's numbers for one trace."""

    trace_id: str
    logprobs: F32
    """[R] nats at T = 1."""
    entropy: F32
    """[R] nats at T = 1."""
    at_temperature: F32 | None
    """[R] nats at the slice's temperature; None if it has none."""
    routes: Routes | None
    """[R, L, K] experts at the rows that predict the response; None for a dense model."""
    margins: F32 | None
    """[R, L] router logit of the last chosen expert minus that of the first not chosen; None where
    the router does not choose the highest of its softmax."""
    layer_ids: tuple[int, ...]
    """[L] absolute numbers of the MoE layers."""
    experts: int | None
    """E: the trainer has no expert with an id from here on; None for a dense model."""
    one_pass: bool
    """Scored inside a forward over a longer sequence."""
    forward_s: float
    """This trace's share of its forward's wall time: shares add up."""


class Backend(Protocol):
    """A loaded trainer. Only one process talks to it; what it does with others is its own
    affair."""

    trainer: Trainer
    findings: list[Reason]
    """What is known to make this trainer's numbers wrong."""
    vocab_size: int
    max_tokens: int
    """Longest sequence that ``score`` takes."""
    no_replay: str | None
    """Why it cannot score under given routes (``Sequence.replay``); None where it can."""
    parallel: int
    """Sequences it works on at once: give it at least so many where you have them."""

    def score(self, sequences: Seq[Sequence]) -> list[SliceResult]:
        """Results of every slice of every sequence, in their order.

        Raises ``TeacherError`` where these sequences cannot be scored but others may be, such as
        for want of memory. Anything else that it raises means that the backend is lost.
        """
        ...

    def close(self) -> None:
        """Release other processes and devices. Not to be called after ``score`` has lost the
        backend."""
        ...

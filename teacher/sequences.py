"""Which forwards score a trajectory: as few as possible, and each trace in exactly one of them.

A trace with prompt ``p`` and response ``r`` needs the logits at positions ``P - 1 .. P + R - 2``,
so the tokens that must be fed are ``(p + r)[:-1]``: its *input*. Two traces share a forward exactly
where one's input is a prefix of the other's. A turn of an agent whose next prompt keeps its tokens
is such a case, and so are two runs with the same tokens and a sample that another one continues.

A causal model defines the same numbers for a prefix whatever follows it, but its kernels choose
their tiling by shape, so the last bits change. Measured, a trace alone against the same trace
inside a longer sequence, largest difference of a log-probability in nats: 2.7e-5 in float32;
in bfloat16 .13 on random ids and .03 to .05 on texts that a model sampled. That is the price of
not computing each history anew at every step; the trainer's noise floor measures it.

Pure: arrays in, values out. Branches and ``n > 1`` choices need no case of their own.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from driftgate.facts import as_sampled
from driftgate.temperature import effective_temperature
from driftgate.trace import Routes, Trace

__all__ = ["Replay", "Sequence", "Slice", "alone", "assemble", "is_scorable"]

I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Slice:
    """The part of a forward that scores one trace.

    Response token ``j`` stands at position ``prompt_len + j`` of the sequence and is predicted at
    ``prompt_len - 1 + j``.
    """

    trace_id: str
    prompt_len: int
    """P, at least 1."""
    response_ids: I32
    """[R] the tokens whose log-probabilities are asked for, R at least 1."""
    temperature: float | None = None
    """Score at this temperature, which is the one that the engine divided by, as well as at 1;
    None where that is 1, or greedy, which has no density to compare with."""
    one_pass: bool = False
    """Scored inside a forward over a longer sequence."""

    @property
    def first(self) -> int:
        """Position that predicts the first response token."""
        return self.prompt_len - 1

    @property
    def last(self) -> int:
        """One past the position that predicts the last response token."""
        return self.prompt_len - 1 + len(self.response_ids)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Replay:
    """The experts that a forward is to use in place of those that its routers would choose."""

    routes: Routes
    """[T, L, K] expert ids of every position fed, L the trainer's MoE layers."""
    given: npt.NDArray[np.bool_]
    """[T, L] where there are ids to use; elsewhere the router chooses by itself."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Sequence:
    """One forward: the tokens to feed and the traces that it scores."""

    ids: I32
    """[T] token ids from position 0."""
    slices: tuple[Slice, ...]
    replay: Replay | None = None
    """None: the model routes by itself."""


def is_scorable(trace: Trace) -> bool:
    """True where the trace has a prompt, a response and a logprob for each response token."""
    return (
        trace.prompt_ids is not None
        and trace.response_ids is not None
        and trace.logprobs is not None
        and len(trace.prompt_ids) > 0
        and len(trace.response_ids) > 0
        and len(trace.logprobs) == len(trace.response_ids)
    )


def alone(sequence: Sequence, part: Slice) -> Sequence:
    """A forward of the tokens that ``part`` of ``sequence`` needs, and of nothing after them."""
    return Sequence(ids=sequence.ids[: part.last], slices=(replace(part, one_pass=False),))


def assemble(traces: Seq[Trace]) -> list[Sequence]:
    """The fewest sequences that score each of ``traces`` once, in the order of their first trace.

    Raises ``ValueError`` for a trace without ids, which ``is_scorable`` would have told.

    Sorted as big-endian bytes, an input stands directly before an input that it is a prefix of, so
    one comparison with the neighbour finds each trace's forward: O(n log n) comparisons of bytes.
    """
    inputs = [_input(trace) for trace in traces]
    order = sorted(range(len(traces)), key=inputs.__getitem__)
    leaf = dict.fromkeys(order, -1)
    following: int | None = None
    for index in reversed(order):
        covered = following is not None and inputs[following].startswith(inputs[index])
        leaf[index] = leaf[following] if covered and following is not None else index
        following = index
    members: dict[int, list[int]] = {}
    for index in range(len(traces)):
        members.setdefault(leaf[index], []).append(index)
    return [
        Sequence(
            ids=np.frombuffer(inputs[head], dtype=">i4").astype(np.int32),
            slices=tuple(_slice(traces[index], one_pass=index != head) for index in group),
        )
        for head, group in members.items()
    ]


def _input(trace: Trace) -> bytes:
    """Big-endian bytes of the tokens that have to be fed to score ``trace``."""
    if not is_scorable(trace) or trace.prompt_ids is None or trace.response_ids is None:
        raise ValueError(
            f"trace {trace.meta.trace_id} has no prompt, response or logprobs to score"
        )
    fed = np.concatenate([trace.prompt_ids, trace.response_ids[:-1]])
    return fed.astype(">i4").tobytes()


def _slice(trace: Trace, *, one_pass: bool) -> Slice:
    assert trace.prompt_ids is not None
    assert trace.response_ids is not None
    return Slice(
        trace_id=trace.meta.trace_id,
        prompt_len=len(trace.prompt_ids),
        response_ids=trace.response_ids,
        temperature=_temperature(as_sampled(trace.meta.engine, trace.meta.sampling).temperature),
        one_pass=one_pass,
    )


def _temperature(asked: float | None) -> float | None:
    used = effective_temperature(asked)
    return used if used > 0.0 and used != 1.0 else None

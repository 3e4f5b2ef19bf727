"""Several sequences in one forward, for speed: a labelled variant, off unless asked for.

Kernels choose their tiling by shape, so company changes a result in its last bits; the trainer's
fingerprint says which way was used, and scores of two ways never share a cell. ``padded`` puts
sequences of similar length in rows, ``packed`` puts them end to end with positions that start anew,
of which transformers makes an attention mask in blocks. Where a model does not, or carries a state
along the row, ``packed`` is refused at load.

Pure: arrays in, values out. Shape letters: ``B`` rows, ``T`` positions of a row.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from driftgate.teacher.sequences import Replay, Sequence, Slice

__all__ = ["SEQUENCES_AT_ONCE", "Batch", "Batching", "batch", "groups"]

Batching = Literal["alone", "padded", "packed"]

SEQUENCES_AT_ONCE = 16
"""Sequences that a worker gathers for each batch: leases that it holds at once, and their routes in
memory."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Batch:
    """What one forward is fed."""

    ids: npt.NDArray[np.int64]
    """[B, T]; 0 behind the end of a row."""
    positions: npt.NDArray[np.int64] | None
    """[B, T] within each sequence; None: each row is one sequence, from 0."""
    rows: npt.NDArray[np.int64]
    """[N] places in [B * T] that predict the responses, in the order of ``slices``."""
    slices: tuple[Slice, ...]
    replay: Replay | None
    """Of all B * T places."""


def groups(lengths: Seq[int], how: Batching, limit: int) -> list[list[int]]:
    """Indices into ``lengths`` by forward: the longest first, so that neighbours are alike.

    A forward has at most ``limit`` positions, padding among them; a longer sequence is alone.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    found: list[list[int]] = []
    for index in order:
        if found and how != "alone":
            last = found[-1]
            size = (
                lengths[last[0]] * (len(last) + 1)
                if how == "padded"
                else sum(lengths[one] for one in last) + lengths[index]
            )
            if size <= limit:
                last.append(index)
                continue
        found.append([index])
    return found


def batch(sequences: Seq[Sequence], how: Batching) -> Batch:
    """One forward of ``sequences``, at least one; several only where ``how`` is not ``alone``."""
    lengths = [len(one.ids) for one in sequences]
    packed = how == "packed"
    assert len(lengths) == 1 or how != "alone"
    width = sum(lengths) if packed else max(lengths)
    height = 1 if packed else len(lengths)
    starts = [sum(lengths[:n]) if packed else n * width for n in range(len(lengths))]
    ids = np.zeros(height * width, np.int64)
    positions = np.zeros(height * width, np.int64)
    for start, one in zip(starts, sequences, strict=True):
        ids[start : start + len(one.ids)] = one.ids
        positions[start : start + len(one.ids)] = np.arange(len(one.ids))
    placed = [(s, part) for s, one in zip(starts, sequences, strict=True) for part in one.slices]
    rows = [np.arange(start + part.first, start + part.last) for start, part in placed]
    return Batch(
        ids=ids.reshape(height, width),
        positions=positions[None] if packed else None,
        rows=np.concatenate(rows),
        slices=tuple(part for _, part in placed),
        replay=_replay(sequences, starts, height * width),
    )


def _replay(sequences: Seq[Sequence], starts: Seq[int], places: int) -> Replay | None:
    """The routes of all ``places``; given nowhere in padding and where a sequence has none."""
    known = [(s, one.replay) for s, one in zip(starts, sequences, strict=True) if one.replay]
    if not known:
        return None
    shape = places, *known[0][1].routes.shape[1:]
    routes = np.zeros(shape, np.uint16)
    given = np.zeros(shape[:2], np.bool_)
    for start, replay in known:
        routes[start : start + len(replay.routes)] = replay.routes
        given[start : start + len(replay.given)] = replay.given
    return Replay(routes=routes, given=given)

"""The second score of a mixture of experts: the same tokens under the routes of their rollout.

What is left of the drift when both sides use the same experts is not routing, and what is gone is
what routing replay (R3) would remove in training. The native score comes first and stays as it is;
this one costs a forward more for each of its own.

Which routes a position gets: those of the trace that sampled there, so that each token is scored
under the choice that was made for it. Positions that no trace of the forward sampled at, the
prompts, take the rows of the longest trace in it. Where two traces sampled at one position (twins,
branches with a common start), each has a forward of its own. A position without a row, or whose row
is no choice (padding, repeated ids, experts that the trainer does not have), is routed by the model
itself; ``coverage`` says how many.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from driftgate.errors import DriftgateError
from driftgate.router import by_layer
from driftgate.teacher.base import Backend, SliceResult
from driftgate.teacher.held import Held
from driftgate.teacher.sequences import Replay, Sequence, Slice
from driftgate.trace import Routes, Trace

__all__ = ["Replayed", "Replayer", "plan", "usable"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Replayed:
    """The trainer's numbers for one trace under the rollout's routes, or why there are none."""

    result: SliceResult | None = None
    coverage: float | None = None
    """Share of the (position, layer) cells that the trace's forward needed and that had a route of
    the rollout."""
    reason: str | None = None


class Replayer:
    """Scores traces again under their own routes."""

    def __init__(
        self, backend: Backend, read: Callable[[str], Trace], *, enabled: bool = True
    ) -> None:
        """``read``: a stored trace by its id. DriftgateError where it cannot be read."""
        self._backend = backend
        self._read = read
        self._enabled = enabled
        self.forward_s = 0.0

    def run(
        self,
        held: Seq[Held],
        sequences: Seq[Sequence],
        results: Mapping[str, SliceResult],
    ) -> dict[str, Replayed]:
        """By trace id, for each of ``held``; ``results``: the native ones of ``sequences``.

        As many sequences at once as the backend works on: their routes, [T, L, K] each, are read
        for these alone.
        """
        found = {
            one.trace.meta.trace_id: Replayed(reason=self._refuses(one, results)) for one in held
        }
        rows = {
            one.trace.meta.trace_id: one.routes
            for one in held
            if one.routes is not None and found[one.trace.meta.trace_id].reason is None
        }
        groups = [group for one in sequences for group in _apart(one, rows)]
        groups.sort(key=lambda one: -len(one.ids))
        step = self._backend.parallel
        for start in range(0, len(groups), step):
            found |= self._score(groups[start : start + step], rows, results)
        return found

    def _refuses(self, one: Held, results: Mapping[str, SliceResult]) -> str | None:
        """Why ``one`` cannot be replayed, or None."""
        native = results[one.trace.meta.trace_id]
        if native.routes is None:
            return self._backend.no_replay or "the trainer's model has no routers"
        if not self._enabled:
            return "replay is switched off"
        if self._backend.no_replay is not None:
            return self._backend.no_replay
        if one.routes is None:
            return one.no_routes
        try:
            cut = by_layer(one.routes, native.layer_ids)
        except ValueError as error:
            return str(error)
        if cut.shape != native.routes.shape:
            return f"routes {cut.shape} of the rollout, {native.routes.shape} of the trainer"
        return None

    def _score(
        self,
        groups: Seq[Sequence],
        rows: Mapping[str, Routes],
        results: Mapping[str, SliceResult],
    ) -> dict[str, Replayed]:
        planned: list[Sequence] = []
        found: dict[str, Replayed] = {}
        started = time.perf_counter()
        try:
            for group in groups:
                base = max(group.slices, key=lambda part: part.last)
                whole = self._read(base.trace_id).routes
                planned.append(plan(group, rows, whole, results[base.trace_id]))
            scored = self._backend.score(planned)
        except DriftgateError as error:
            log.warning("no replay of %d forwards: %s", len(groups), error)
            reason = f"scoring under the rollout's routes failed: {error}"[:500]
            return {part.trace_id: Replayed(reason=reason) for one in groups for part in one.slices}
        self.forward_s += time.perf_counter() - started
        parts = [(one, part) for one in planned for part in one.slices]
        for (one, part), result in zip(parts, scored, strict=True):
            assert one.replay is not None
            coverage = float(one.replay.given[: part.last].mean())
            found[part.trace_id] = Replayed(result=result, coverage=coverage)
        return found


def plan(
    sequence: Sequence,
    rows: Mapping[str, Routes],
    whole: Routes | None,
    native: SliceResult,
) -> Sequence:
    """``sequence`` with the routes that its positions are to use.

    ``rows``: [R, L, K] by trace, the rows that predict its response. ``whole``: [P + R - 1, L, K]
    of the longest trace. Either may count dense layers in its L. ``native``: what the trainer gave
    for one of the traces, which says what experts it has.
    """
    layer_ids, experts = native.layer_ids, native.experts
    assert experts is not None
    k = rows[sequence.slices[0].trace_id].shape[-1]
    routes = np.zeros((len(sequence.ids), len(layer_ids), k), np.uint16)
    known = np.zeros(routes.shape[:2], np.bool_)
    spans = [(part.first, rows[part.trace_id]) for part in sequence.slices]
    for start, span in [*([(0, whole)] if whole is not None else []), *spans]:
        cut = by_layer(span, layer_ids)
        routes[start : start + len(cut)] = cut
        known[start : start + len(cut)] = usable(cut, experts)
    return replace(sequence, replay=Replay(routes=routes, given=known))


def usable(routes: Routes, experts: int) -> npt.NDArray[np.bool_]:
    """[N, L] cells of [N, L, K] that are a choice among ``experts``: no padding, no id twice, none
    that no expert has."""
    ordered = np.sort(routes, axis=-1)
    apart = (ordered[..., 1:] != ordered[..., :-1]).all(axis=-1)
    return np.asarray(apart & (routes < experts).all(axis=-1))


def _apart(sequence: Sequence, wanted: Mapping[str, Routes]) -> Iterator[Sequence]:
    """``sequence`` once for each set of ``wanted`` slices that sampled at different positions, fed
    no further than they need."""
    groups: list[list[Slice]] = []
    for part in sequence.slices:
        if part.trace_id not in wanted:
            continue
        for group in groups:
            if all(part.last <= other.first or other.last <= part.first for other in group):
                group.append(part)
                break
        else:
            groups.append([part])
    for group in groups:
        end = max(part.last for part in group)
        slices = tuple(replace(part, one_pass=part.last < end) for part in group)
        yield Sequence(ids=sequence.ids[:end], slices=slices)

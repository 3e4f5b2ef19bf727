"""Which experts a cell's tokens went to, over its newest answers. Blocking.

Counted when it is asked for, from the route arrays themselves: sums by expert kept beside every
score would be most of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from driftgate.errors import FormatError, NotFoundError
from driftgate.gateway.pairing import CellName
from driftgate.live_views import ExpertLoad, LayerLoad
from driftgate.load import Loads, apart, count_loads
from driftgate.storage import Reader

__all__ = ["LOOKED", "expert_load"]

log = logging.getLogger("driftgate.api")

LOOKED = 64
"""Answers that are looked at, the newest: their routes are read from segments, some 5 ms each."""


def expert_load(reader: Reader, cell: CellName) -> ExpertLoad:
    """The load of a cell of drift; of no answer where none has routes of both sides."""
    total: Loads | None = None
    answers = 0
    for loads in _loads(reader, cell):
        try:
            total = loads if total is None else total.merge(loads)
        except ValueError as error:  # an engine whose layers changed: the newest answers count
            log.warning("%s", error)
            break
        answers += 1
    if total is None:
        return ExpertLoad(answers=0, limit=LOOKED, k=0, experts=0, layers=[])
    return ExpertLoad(
        answers=answers,
        limit=LOOKED,
        k=total.k,
        experts=total.rollout_LE.shape[1],
        layers=[
            LayerLoad(
                layer=layer,
                tokens=int(total.tokens_L[row]),
                rollout=total.rollout_LE[row].tolist(),
                train=total.train_LE[row].tolist(),
                apart=apart(total.rollout_LE[row], total.train_LE[row]),
            )
            for row, layer in enumerate(total.layers)
        ],
    )


def _loads(reader: Reader, cell: CellName) -> Iterator[Loads]:
    """Of each answer, the newest first."""
    for trace_id in reversed(reader.answers_of(cell.engine, cell.model, limit=LOOKED)):
        try:
            score = reader.score(trace_id, cell.trainer)
            routes = reader.trace(trace_id).routes
        except NotFoundError:  # not scored by this trainer
            continue
        except FormatError as error:
            log.warning("%s", error)
            continue
        if routes is None or score.routes is None or score.meta.router is None:
            continue
        if not len(score.routes):
            continue
        yield count_loads(routes[-len(score.routes) :], score.routes, score.meta.router.layers)

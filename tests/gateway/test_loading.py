"""What the API says of the load of a cell's experts, against what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from driftgate.gateway.loading import expert_load
from driftgate.gateway.pairing import CellName
from driftgate.storage import Reader
from driftgate.testing.stores import write_store
from driftgate.testing.traces import ENGINE, TRAINER, make_score, make_trajectory
from driftgate.trace import Score, Trace
from tests.web.stores import routed_score

CELL = CellName(ENGINE.digest, TRAINER.digest, "tiny-moe")


def scored(name: str) -> list[tuple[Trace, Score]]:
    traces = make_trajectory(name, steps=2, response=40)
    return [(trace, routed_score(trace, flips=5, seed=1)) for trace in traces]


def test_the_load_of_a_cell_is_of_all_its_answers(tmp_path: Path) -> None:
    pairs = [*scored("a"), *scored("b")]
    reader = Reader(write_store(tmp_path, [record for pair in pairs for record in pair]))
    found = expert_load(reader, CELL)
    reader.close()
    assert (found.answers, found.k) == (4, 4)
    for row, layer in enumerate(found.layers):
        assert layer.tokens == 160
        for side, counts in (("rollout", layer.rollout), ("train", layer.train)):
            wanted = np.zeros(found.experts, int)
            for trace, score in pairs:
                routes = trace.routes[-40:] if side == "rollout" else score.routes  # type: ignore[index]
                assert routes is not None
                np.add.at(wanted, routes[:, row].ravel(), 1)
            assert counts == wanted.tolist(), side
    # Only the last layer was flipped: 5 tokens of 40 went one expert further.
    assert [layer.apart == 0 for layer in found.layers[:-1]] == [True] * (len(found.layers) - 1)
    assert found.layers[-1].apart


def test_a_cell_without_routes_has_no_load(tmp_path: Path) -> None:
    (trace,) = make_trajectory("dense", steps=1, routed=False)
    reader = Reader(write_store(tmp_path, [trace, make_score(trace)]))
    assert expert_load(reader, CELL).answers == 0
    reader.close()

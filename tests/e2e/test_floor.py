"""`driftgate floor` against a real engine and a real trainer; what the matrix then shows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from driftgate.gateway.answers import Answers
from driftgate.storage import Reader
from driftgate.testing.engine import EngineProcess
from driftgate.trace import Engine
from tests.e2e.support import Scored, driftgate, stored_scores

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

TRACES = 6
LARGEST = {"dense": 1e-4, "moe": 0.5}
"""Nats, float32 and bfloat16: an engine's decode is nearer to its prefill than this."""


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_floors_of_both_sides_stand_beside_every_number(
    engines: dict[str, EngineProcess], scored: dict[str, Scored], tmp_path: Path, kind: str
) -> None:
    store = Path(shutil.copytree(scored[kind].store, tmp_path / "store"))
    arguments = ("floor", "--store", store, "--traces", str(TRACES))
    run = driftgate(*arguments, "--engine", engines[kind].url, "--concurrency", "1")
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    assert re.search(r"engine decode_vs_prefill: \d+ tokens of 6 answers", run.stdout)
    assert re.search(r"engine repeat: \d+ tokens of \d answers", run.stdout)
    found = [
        s for s in stored_scores(store, kind="noise_floor") if s.meta.trainer.settings.get("floor")
    ]
    assert len(found) == TRACES
    for score in found:
        assert isinstance(score.meta.engine, Engine)
        assert score.meta.bucket is not None
        largest = score.meta.bucket.metrics()["abs_log_ratio_max"]
        assert isinstance(largest, float)
        assert largest < LARGEST[kind]
        assert (score.meta.router is not None) == (kind == "moe")
    again = driftgate(*arguments, "--model", scored[kind].checkpoint)
    assert again.returncode == 0, again.stderr
    reader = Reader(store)
    cells = Answers(reader).cells().items
    reader.close()
    native = scored[kind].native.digest
    (cell,) = [c for c in cells if c.kind == "drift" and c.trainer_digest == native]
    assert {(floor.side, floor.label) for floor in cell.floors} == {
        ("engine", "repeat"),
        ("engine", "decode_vs_prefill"),
        ("trainer", "repeat"),
    }


def test_replay_on_a_real_engines_routes(scored: dict[str, Scored]) -> None:
    one = scored["moe"]
    reader = Reader(one.store)
    cells = Answers(reader).cells().items
    reader.close()
    for trainer in (one.native, one.exact):
        (cell,) = [c for c in cells if c.kind == "drift" and c.trainer_digest == trainer.digest]
        assert cell.replay is not None
        assert cell.router is not None
        shares = cell.replay.shares.metrics
        print(
            trainer.dtype, "set-disagree", cell.router.metrics["router_set_disagree_rate"],
            "mean|D|", cell.replay.native.metrics["abs_log_ratio_mean"],
            "under replay", cell.replay.measures.metrics["abs_log_ratio_mean"], shares,
            "coverage", cell.replay.coverage,
        )  # fmt: skip
        share = shares["replay_removes_abs_log_ratio_mean"]
        assert isinstance(share, float)
        assert 0.1 < share <= 1.0, "routing is part of the drift of this engine, and not all of it"
        assert cell.replay.coverage == 1.0
        low_high = cell.intervals["replay_removes_abs_log_ratio_mean"]
        assert low_high.low <= share <= low_high.high

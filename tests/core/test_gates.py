"""Each gate just inside and just outside the threshold that its trainer ships."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from driftgate.bootstrap import intervals
from driftgate.gates import GATES, SEQ_GATES, TOKEN_GATES, seq_hits, token_hits
from driftgate.mismatch import Bucket

NUDGE = 1e-9

TOKEN_EDGES = [
    ("gate_verl_tis_clip_frac", 2.0, +1),
    ("gate_icepop_drop_frac", 5.0, +1),
    ("gate_icepop_drop_frac", 0.5, -1),
    ("gate_areal_drop_frac", 5.0, +1),
]
"""(gate, rho at its edge, the side that it catches)"""

SEQ_EDGES = [
    ("gate_verl_seqtis_clip_frac", math.log(2.0), +1),
    ("gate_verl_seqrs_drop_frac", math.log(2.0), +1),
    ("gate_verl_seqrs_drop_frac", math.log(0.5), -1),
    ("gate_trl_seqmask_drop_frac", math.log(3.0), +1),
    ("gate_geo_drop_frac", 4 * math.log(1.001), +1),
    ("gate_geo_drop_frac", 4 * math.log(0.999), -1),
    ("gate_skyrl_geo_drop_frac", 4 * math.log(1.01), +1),
    ("gate_skyrl_geo_drop_frac", 4 * math.log(0.99), -1),
    ("gate_opsm_drop_frac", -4e-4, -1),
]
"""(gate, sum of D over four tokens at its edge, the side that it catches)"""


@pytest.mark.parametrize(("gate", "rho", "side"), TOKEN_EDGES)
def test_token_gates_catch_from_their_edge_on(gate: str, rho: float, side: int) -> None:
    d = np.array([math.log(rho) - side * NUDGE, math.log(rho) + side * NUDGE])
    assert token_hits(d, np.zeros(2))[gate] == 1


def test_the_probability_gate_counts_both_sides() -> None:
    moved = np.array([0.2 + NUDGE, -0.2 - NUDGE, 0.2 - NUDGE, 0.0])
    assert token_hits(np.zeros(4), moved)["gate_dppo_drop_frac"] == 2


@pytest.mark.parametrize(("gate", "total", "side"), SEQ_EDGES)
def test_sequence_gates_catch_from_their_edge_on(gate: str, total: float, side: int) -> None:
    inside, outside = (np.full(4, (total + sign * side * NUDGE) / 4) for sign in (-1, 1))
    assert (seq_hits(inside)[gate], seq_hits(outside)[gate]) == (0, 1)


def test_one_token_below_the_veto_drops_the_response() -> None:
    d = np.zeros(100)
    assert seq_hits(d)["gate_veto_drop_frac"] == 0
    d[57] = math.log(1e-4) - NUDGE
    assert seq_hits(d)["gate_veto_drop_frac"] == 1


def test_the_k3_gate_is_of_the_mean() -> None:
    edge = 0.140_186_9  # expm1(x) - x = .0103
    d = np.full(7, edge)
    assert math.expm1(edge) - edge > 0.01
    assert seq_hits(d)["gate_verl_k3rs_drop_frac"] == 1
    d[0] = 0.0
    assert seq_hits(d)["gate_verl_k3rs_drop_frac"] == 0


def test_every_gate_says_where_its_number_comes_from() -> None:
    assert GATES.keys() == TOKEN_GATES.keys() | SEQ_GATES.keys()
    for name, gate in GATES.items():
        assert name.endswith(f"_{gate.action}_frac")
        assert gate.rule.endswith(".")
        projects = ("verl", "TRL", "prime-rl", "AReaL", "SkyRL", "slime")
        assert any(project in gate.source for project in projects)


def test_a_gate_that_was_not_counted_is_null_and_stays_so_when_merged() -> None:
    rollout = np.full(10, -1.0)
    new = Bucket.of(rollout + 0.8, rollout)
    known = {k: v for k, v in new.token_hits.items() if k != "gate_areal_drop_frac"}
    old = msgspec.structs.replace(new, token_hits=known)
    for bucket in (old, old.merge(new), new.merge(old), Bucket().merge(old)):
        assert bucket.metrics()["gate_areal_drop_frac"] is None
        assert "score them again" in bucket.undefined()["gate_areal_drop_frac"]
        assert bucket.metrics()["gate_verl_tis_clip_frac"] == 1.0
    bounds = intervals({"a": old, "b": new}, resamples=10).values
    assert "gate_areal_drop_frac" not in bounds
    assert bounds["gate_verl_tis_clip_frac"] == (1.0, 1.0)

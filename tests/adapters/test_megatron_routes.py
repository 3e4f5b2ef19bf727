"""Replay lists per rank against brute force, and through Megatron's own class in a small router."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftgate.adapters.megatron_routes import Rank, local_layers, replay_data
from driftgate.samples import Sample, assemble
from driftgate.testing.traces import make_trace, make_trajectory

SEQ, LAYERS, K = 24, 4, 2


def batch(count: int, *, moe: int = LAYERS) -> list[Sample]:
    return [
        assemble(
            [make_trace(trajectory=f"t{n}", prompt=5 + n, response=4, layers=moe, k=K)],
            reward=None,
        )
        for n in range(count)
    ]


def positions(rank: Rank) -> list[int]:
    """Positions of a rank in the order of its tokens, one by one."""
    size = SEQ // (2 * rank.cp)
    mine = [
        p
        for p in range(SEQ)
        if rank.cp == 1 or p // size in (rank.cp_rank, 2 * rank.cp - 1 - rank.cp_rank)
    ]
    if not rank.sequence_parallel:
        return mine
    each = len(mine) // rank.tp
    return [p for i, p in enumerate(mine) if i // each == rank.tp_rank]


@st.composite
def ranks(draw: st.DrawFn) -> Rank:
    tp, pp, cp = (draw(st.sampled_from([1, 2])) for _ in range(3))
    return Rank(
        tp=tp,
        tp_rank=draw(st.integers(0, tp - 1)),
        sequence_parallel=draw(st.booleans()),
        pp=pp,
        pp_rank=draw(st.integers(0, pp - 1)),
        cp=cp,
        cp_rank=draw(st.integers(0, cp - 1)),
    )


@given(
    rank=ranks(),
    count=st.integers(1, 3),
    moe=st.sampled_from([[0, 1, 2, 3], [1, 2, 3], [3]]),
    everywhere=st.booleans(),
)
def test_every_rank_by_brute_force(
    rank: Rank, count: int, moe: list[int], everywhere: bool
) -> None:
    samples = batch(count, moe=LAYERS if everywhere else len(moe))
    lists = replay_data(samples, seq_len=SEQ, num_layers=LAYERS, moe_layers=moe, rank=rank)
    mine = [layer for layer in moe if layer * rank.pp // LAYERS == rank.pp_rank]
    assert len(lists) == len(mine)
    for layer, rows in zip(mine, lists, strict=True):
        expected = []
        for position in positions(rank):
            for sample in samples:
                assert sample.routes is not None
                fed = position < sample.meta.tokens - 1
                column = layer if everywhere else moe.index(layer)
                chosen = sample.routes[position, column] if fed else np.arange(K)
                expected.append(chosen.tolist())
        assert rows.dtype == np.int64
        assert rows.tolist() == expected


def test_the_ranks_of_a_layout_hold_each_row_once() -> None:
    samples = batch(2)
    whole = replay_data(samples, seq_len=SEQ, num_layers=LAYERS, moe_layers=range(LAYERS))
    counted = [
        rows
        for tp in range(2)
        for cp in range(2)
        for rows in replay_data(
            samples,
            seq_len=SEQ,
            num_layers=LAYERS,
            moe_layers=range(LAYERS),
            rank=Rank(tp=2, tp_rank=tp, sequence_parallel=True, cp=2, cp_rank=cp),
        )[:1]
    ]
    assert sorted(np.concatenate(counted).tolist()) == sorted(whole[0].tolist())


def test_a_missing_row_is_refused_or_marked_and_never_an_expert() -> None:
    one, two = list(make_trajectory(steps=2, prompt=3, response=3, k=K))
    sample = assemble([one, replace(two, routes=None)], reward=None)
    arguments = {"seq_len": SEQ, "num_layers": LAYERS, "moe_layers": range(LAYERS)}
    with pytest.raises(ValueError, match="no routes at 6 positions, the first 5"):
        replay_data([sample], **arguments)  # type: ignore[arg-type]
    rows = replay_data([sample], missing="sentinel", **arguments)[0]  # type: ignore[arg-type]
    assert one.routes is not None
    assert np.array_equal(rows[:5], one.routes[:, 0])
    assert (rows[5:11] == -1).all()
    assert rows[11:].tolist() == [[0, 1]] * (SEQ - 11)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"seq_len": 8}, "has 9 tokens, seq_len is 8"),
        ({"num_layers": 5}, "routes of 4 layers fit neither 3 MoE layers nor all 5"),
        ({"rank": Rank(pp=3)}, "4 layers in 3 pipeline stages"),
        ({"rank": Rank(cp=5)}, "seq_len 24 is no multiple of 2"),
        ({"rank": Rank(tp=5, sequence_parallel=True)}, "24 positions of a rank"),
    ],
)
def test_what_does_not_fit_is_said(options: dict[str, object], why: str) -> None:
    arguments: dict[str, object] = {"seq_len": SEQ, "num_layers": LAYERS, "moe_layers": [1, 2, 3]}
    with pytest.raises(ValueError, match=why):
        replay_data(batch(1), **(arguments | options))  # type: ignore[arg-type]


def test_dense_models_have_nothing_to_replay() -> None:
    dense = assemble([make_trace(routed=False)], reward=None)
    with pytest.raises(ValueError, match="has no routes"):
        replay_data([dense], seq_len=SEQ, num_layers=LAYERS, moe_layers=range(LAYERS))


def test_stages_are_of_one_length() -> None:
    assert [list(local_layers(4, Rank(pp=2, pp_rank=r))) for r in range(2)] == [[0, 1], [2, 3]]

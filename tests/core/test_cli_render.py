"""Renderables: the numbers that stand in them, and the colour that says whether to believe them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console, RenderableType

from driftgate import render
from driftgate.mismatch import Bucket
from driftgate.testing.traces import ENGINE, TRAINER
from driftgate.trace import Comparable, Reason
from driftgate.views import (
    CellView,
    DriftEvent,
    FloorView,
    Interval,
    LagView,
    Measures,
    ReasonCount,
    ReplayView,
    RouterMeasures,
    ScoreView,
    WorstView,
)

WORST = WorstView(
    trace_id="c.0",
    step=3,
    choice=1,
    token_index=7,
    position=20,
    token_id=42,
    log_ratio=-1.25,
    train_logprob=-2.0,
    rollout_logprob=-0.75,
    text="\n",
    before="def f():",
    after="return",
)


def plain(what: RenderableType) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(what, soft_wrap=True)
    return console.export_text()


def measures(d: float, tokens: int = 50) -> Measures:
    """Of ``tokens`` tokens whose log ratio is ``d``."""
    rollout = np.full(tokens, -1.0)
    bucket = Bucket.of(rollout + d, rollout)
    return Measures(metrics=bucket.metrics(), undefined=bucket.undefined())


def score(d: float = 0.001, **fields: Any) -> ScoreView:
    given: dict[str, Any] = {
        "trace_id": "c.0",
        "trajectory": "run",
        "step": 3,
        "choice": 1,
        "model": "tiny",
        "kind": "drift",
        "engine": ENGINE,
        "engine_digest": ENGINE.digest,
        "trainer": TRAINER,
        "trainer_digest": TRAINER.digest,
        "temperature": 1.0,
        "comparable": Comparable(verdict="yes"),
        "measures": measures(d),
        "worst": WORST,
        "scored_ns": 1,
    }
    return ScoreView(**(given | fields))


def cell(**fields: Any) -> CellView:
    given: dict[str, Any] = {
        "engine": ENGINE,
        "engine_digest": ENGINE.digest,
        "trainer": TRAINER,
        "trainer_digest": TRAINER.digest,
        "model": "tiny",
        "kind": "drift",
        "trajectories": 2,
        "n_tokens": 50,
        "n_seqs": 2,
        "few": True,
        "scored": 2,
        "captured": 3,
        "comparable": {"yes": 2},
        "verdict": "yes",
        "reasons": [],
        "measures": measures(0.001),
        "all_measures": measures(0.001),
        "worst": WORST,
    }
    return CellView(**(given | fields))


NO = Comparable(verdict="no", reasons=[Reason(code="wrong_checkpoint", detail="d", fix="f")])


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (score(0.001), "green"),
        (score(0.06), "amber"),
        (score(0.3), "red"),
        (score(0.001, comparable=NO), None),
        (score(0.001, measures=None), None),
        (score(0.001, router=RouterMeasures(metrics={"router_set_disagree_rate": 0.3})), "red"),
        (score(0.001, router=RouterMeasures(metrics={"router_set_disagree_rate": None})), "green"),
        (cell(), "green"),
        (cell(measures=None), None),
    ],
)
def test_colour_is_the_worst_band_of_a_valid_comparison(
    view: ScoreView | CellView, expected: str | None
) -> None:
    assert render.colour(view) == expected


def test_fp8_has_the_wider_band_of_k3() -> None:
    of = Measures(metrics={"kl_k3_rollout_train": 2e-3})
    fp8 = msgspec.structs.replace(ENGINE, settings={"quantization": "fp8"})
    assert render.colour(score(measures=of)) == "amber"
    assert render.colour(score(measures=of, engine=fp8)) == "green"
    assert render.colour(cell(measures=of, engine=fp8)) == "green"


def test_bad_tokens_are_never_green() -> None:
    good = measures(0.001)
    bad = msgspec.structs.replace(good, metrics=good.metrics | {"n_bad_tokens": 1})
    assert render.colour(score(measures=bad)) == "amber"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("inf"), "–"),
        (0.0, "0"),
        (1234567, "1,234,567"),
        (0.25, "0.2500"),
        (1.5e-6, "1.50e-06"),
        (4e7, "4.00e+07"),
        (-0.5, "-0.5000"),
    ],
)
def test_numbers_are_short_and_absent_is_not_zero(value: Any, text: str) -> None:
    assert render.number(value) == text


def test_a_drift_line_says_where_how_much_and_which_token() -> None:
    view = score(router=RouterMeasures(metrics={"router_set_disagree_rate": 0.045}))
    line = plain(render.drift_line(DriftEvent(cursor=9, score=view))).rstrip("\n")
    assert line == (
        "● run 3.1  n=50  k3 5.00e-07  mean|D| 1.00e-03  max|D| 1.00e-03  comparable yes"
        '  router 4.5%  worst "\\n" -1.250'
    )


def test_a_drift_line_names_why_it_is_not_comparable() -> None:
    line = plain(render.drift_line(DriftEvent(cursor=9, score=score(comparable=NO))))
    assert "comparable no (wrong_checkpoint)" in line


def test_the_worst_token_stands_in_its_text() -> None:
    text = plain(render.worst_in_context(WORST))
    assert "step 3, choice 1, token 7  engine -0.7500  trainer -2.0000  D -1.250" in text
    assert "def f():\nreturn" in text


def test_what_a_model_says_neither_styles_nor_steers_the_terminal() -> None:
    evil = msgspec.structs.replace(WORST, text="[/red]\x1b]0;x\x07\x9b2J", before="[bold]\x1b[2J")
    text = plain(render.worst_in_context(evil)) + plain(render.matrix([cell(worst=evil)]))
    assert "[bold]␦[2J" in text
    assert text.count("[/red]") == 2
    assert not {"\x1b", "\x07", "\x9b"} & set(text)


def test_a_token_without_text_is_named_by_its_id() -> None:
    assert "⟨42⟩" in plain(render.worst_in_context(msgspec.structs.replace(WORST, text=None)))


def rows(cells: list[CellView]) -> Iterator[list[str]]:
    for line in plain(render.matrix(cells)).splitlines():
        yield [part.strip() for part in line.strip("│").split("│")]


def test_the_matrix_shows_interval_and_floor_beside_the_number() -> None:
    floor = FloorView(side="engine", n_tokens=9, n_seqs=1, measures=measures(0.0))
    interval = {"kl_k3_rollout_train": Interval(low=1e-7, high=2e-6)}
    found = list(rows([cell(intervals=interval, floors=[floor])]))
    at = next(n for n, row in enumerate(found) if row[0] == "k3")
    assert found[at][1] == "5.00e-07 [1.00e-07, 2.00e-06]"
    assert found[at + 1][1] == "floor: engine 0"


def test_a_floor_made_in_another_way_says_how() -> None:
    prefill = FloorView(
        side="engine", label="decode_vs_prefill", n_tokens=9, n_seqs=1, measures=measures(0.001)
    )
    found = list(rows([cell(floors=[prefill])]))
    at = next(n for n, row in enumerate(found) if row[0] == "mean |D|")
    assert found[at + 1][1] == "floor: engine decode_vs_prefill 1.00e-03"


def test_the_matrix_says_what_replay_leaves_and_removes() -> None:
    shares = {
        "replay_removes_abs_log_ratio_mean": 0.625,
        "replay_removes_kl_k3_rollout_train": None,
    }
    view = ReplayView(
        n_tokens=50,
        n_seqs=2,
        coverage=1.0,
        shares=Measures(metrics=shares),
        native=measures(0.001),
        measures=measures(0.0005),
    )
    interval = {"replay_removes_abs_log_ratio_mean": Interval(low=0.5, high=0.7)}
    found = {row[0]: row[1] for row in rows([cell(replay=view, intervals=interval)]) if row[1:]}
    assert found["mean |D| under replay"] == "5.00e-04  removes 62.5% [50.0%, 70.0%]"
    assert found["k3 under replay"].endswith("removes –")
    line = plain(render.drift_line(DriftEvent(cursor=9, score=score(replay=view))))
    assert "replay removes 62.5%" in line


def test_a_part_is_not_shown_as_the_whole() -> None:
    found = {row[0]: row[1] for row in rows([cell(partial=True)]) if len(row) == 2}
    assert found["scored of captured"] == "2 of 3  (partial)"


def test_the_matrix_says_how_much_stands_behind_it() -> None:
    found = {row[0]: row[1] for row in rows([cell()]) if len(row) == 2}
    assert found["tokens / responses / runs"] == "50 / 2 / 2 (few)"
    assert found["scored of captured"] == "2 of 3"
    assert found["comparable"] == "yes 2"
    assert found["worst token"] == '"\\n" -1.250'


def test_every_cell_has_a_column_and_every_reason_a_line() -> None:
    reason = ReasonCount(code="wrong_checkpoint", meaning="other weights", scores=2)
    cells = [cell(model=f"m{n}", reasons=[reason]) for n in range(6)]
    text = plain(render.matrix(cells))
    assert all(f"m{n}" in text for n in range(6))
    assert text.count("wrong_checkpoint: other weights (2 of 2 scores of m") == 6


def test_the_matrix_says_what_only_the_merged_numbers_tell() -> None:
    finding = Reason(code="logodds_slope_off", detail="temperature=1.0: slope 0.79", fix="look")
    refuted = cell(verdict="no", findings=[finding], measures=None)
    text = plain(render.matrix([refuted]))
    assert "merged: no" in text
    assert "! merged: logodds_slope_off: temperature=1.0: slope 0.79. look" in text
    assert "merged" not in plain(render.matrix([cell()]))


def test_the_matrix_tells_lags_apart_where_there_are_several() -> None:
    parts = [
        LagView(label=label, n_tokens=25, n_seqs=1, measures=measures(d))
        for label, d in (("0", 0.001), ("3", 0.2))
    ]
    text = plain(render.matrix([cell(by_lag=parts)]))
    assert "mean |D| by lag" in text
    assert "0: 1.00e-03 (25 tokens)" in text
    assert "3: 0.2000 (25 tokens)" in text
    assert "by lag" not in plain(render.matrix([cell(by_lag=parts[:1])]))


def test_an_empty_matrix_says_what_to_do() -> None:
    assert "driftgate teach" in plain(render.matrix([]))

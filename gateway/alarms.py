"""What a person should look at, in words. Pure: sums and counts in, alarms out.

An alarm says what is seen with its number and unit, since when, and what to do. It judges the
newest scores (`driftgate.gateway.live.stretch`), not the average of all time: what has been mended
falls silent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

from driftgate.bands import BANDS, MOE_FP8_SLACK, band
from driftgate.comparable import CODES
from driftgate.gateway.live import CellKey, Sums, stretch
from driftgate.live_views import Alarm
from driftgate.storage import Activity, CellRow

__all__ = ["alarms"]

ZERO_OVERLAP = 0.05
"""Share of (token, layer) pairs without a common expert. Rows that belong together have next to
none; unrelated rows have 27 % (4 of 16) to 59 % (8 of 128)."""

WORKER_LAG_S = 60.0
"""A worker that follows scores within seconds; after a minute it is behind or not there."""

GATED = ("kl_k3_rollout_train", "abs_log_ratio_mean", "extreme_frac_tau2")
"""Bands that sound an alarm, by the headline first. Routes have an alarm of their own."""

UNITS = {"kl_k3_rollout_train": " nats", "abs_log_ratio_mean": " nats", "extreme_frac_tau2": ""}


def alarms(
    cells: Mapping[CellKey, Sequence[Sums]],
    rows: Sequence[CellRow],
    activity: Activity,
    trajectories: int,
    *,
    now_ns: int,
) -> list[Alarm]:
    """All alarms, red before amber. ``rows``: the same cells as storage judges them;
    ``trajectories``: how many there are."""
    found: list[Alarm] = []
    for (engine, trainer, model, kind), sums in cells.items():
        if kind != "drift":
            continue
        at = {"engine_digest": engine, "trainer_digest": trainer, "model": model}
        found += _routes(sums, at)
        found += _drift(sums, at)
        found += _bad_tokens(sums, at)
    found += _not_comparable(rows)
    found += _capture(activity, trajectories)
    found += _worker(activity, now_ns)
    return sorted(found, key=lambda alarm: alarm.severity != "red")


def _routes(sums: Sequence[Sums], at: dict[str, str]) -> Iterator[Alarm]:
    def far(total: Sums) -> bool:
        return total.all_cells > 0 and total.zero_overlap / total.all_cells > ZERO_OVERLAP

    now = stretch(sums, far)
    if now is not None:
        rate = now.zero_overlap / now.all_cells
        yield Alarm(
            severity="red",
            code="routes_misaligned",
            text=f"Routes of {at['model']} misaligned: zero overlap {rate:.0%} of "
            f"{now.all_cells} (token, layer) pairs",
            fix="rows of the two sides do not belong together: check the engine's first route "
            "row and prefix caching, then `driftgate probe`",
            since_ns=now.scored_ns,
            **at,
        )


def _drift(sums: Sequence[Sums], at: dict[str, str]) -> Iterator[Alarm]:
    """One alarm for a cell: its worst colour, of the first metric that has it."""
    colours: tuple[Literal["red", "amber"], ...] = ("red", "amber")
    for colour in colours:
        for name in GATED:
            now = stretch(sums, partial(_has_colour, name=name, colour=colour))
            if now is None:
                continue
            value, limits = now.metrics()[name], BANDS[name]
            limit = limits.red if colour == "red" else limits.green
            limit *= _slack(now) if name == GATED[0] else 1.0
            yield Alarm(
                severity=colour,
                code=f"drift_{colour}",
                text=f"Drift of {at['model']}: {name} {value:.2g}{UNITS[name]}, the band's "
                f"{colour} begins at {limit:.2g}; "
                f"{now.n_tokens} tokens",
                fix="open the cell: compare with its noise floor, then look at the worst token",
                since_ns=now.scored_ns,
                **at,
            )
            return


def _bad_tokens(sums: Sequence[Sums], at: dict[str, str]) -> Iterator[Alarm]:
    now = stretch(sums, lambda total: total.n_bad_tokens > 0)
    if now is not None:
        yield Alarm(
            severity="amber",
            code="bad_tokens",
            text=f"{at['model']}: {now.n_bad_tokens} of {now.n_tokens + now.n_bad_tokens} tokens "
            "have a logprob that is none (not finite, <= -9000 or > 1e-6 nats)",
            fix="they are left out of every number: look at what the engine and the trainer "
            "report for them",
            since_ns=now.scored_ns,
            **at,
        )


def _not_comparable(rows: Sequence[CellRow]) -> Iterator[Alarm]:
    for row in rows:
        if row.kind != "drift" or row.verdict != "no" or not row.scored:
            continue
        code = max(row.reasons, key=lambda code: row.reasons[code], default="")
        why = CODES.get(code, "No score has numbers.")
        yield Alarm(
            severity="amber",
            code="not_comparable",
            text=f"{row.model}: none of {row.scored} scores is comparable. {why}",
            fix="open the cell: each reason says what was seen and what to change",
            engine_digest=row.engine.digest,
            trainer_digest=row.trainer.digest,
            model=row.model,
        )


def _capture(activity: Activity, trajectories: int) -> Iterator[Alarm]:
    if activity.with_gaps:
        yield Alarm(
            severity="amber",
            code="capture_gaps",
            text=f"Capture: {activity.with_gaps} of {trajectories} trajectories have a gap",
            fix="the list of trajectories, filtered by gaps, names each one",
        )
    if activity.stale_calls:
        yield Alarm(
            severity="amber",
            code="stale_calls",
            text=f"Calls begun over an hour ago that never ended: {activity.stale_calls}",
            fix="their gateway was most likely killed; its log says when",
        )


def _worker(activity: Activity, now_ns: int) -> Iterator[Alarm]:
    oldest = activity.oldest_waiting_ns
    if oldest is None or now_ns - oldest < WORKER_LAG_S * 1e9:
        return
    minutes = (now_ns - oldest) / 60e9
    words = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
    yield Alarm(
        severity="amber",
        code="worker_behind",
        text=f"Answers that wait to be scored: {activity.waiting}, the oldest for {words}",
        fix="start a worker: driftgate teach --follow; where one runs, its log says why",
        since_ns=oldest,
    )


def _has_colour(total: Sums, *, name: str, colour: str) -> bool:
    return band(name, total.metrics()[name], slack=_slack(total)) == colour


def _slack(total: Sums) -> float:
    return MOE_FP8_SLACK if total.all_cells else 1.0

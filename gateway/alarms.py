"""What a person should look at, in words. Pure: sums and counts in, alarms out.

An alarm says what is seen with its number and unit, since when, and what to do. It judges the
newest scores (`driftgate.gateway.live.stretch`), not the average of all time: what has been mended
falls silent. Drift sounds from a whole block of tokens on, and never for one token alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

from driftgate.bands import BANDS, GATED, ROUTES, Colour, band, slack_of
from driftgate.codes import CODES, SEVERITY
from driftgate.engine_views import EngineState
from driftgate.gateway.live import BLOCK_TOKENS, CellKey, Sums, stretch
from driftgate.live_views import Alarm
from driftgate.profiles import FEW_HITS
from driftgate.storage import Activity, CellRow

__all__ = ["OF_NOW", "alarms"]

ZERO_OVERLAP = 0.05
"""Share of (token, layer) pairs without a common expert. Rows that belong together have next to
none; unrelated rows have 27 % (4 of 16) to 59 % (8 of 128)."""

WORKER_LAG_S = 60.0
"""A worker that follows scores within seconds; after a minute it is behind or not there."""

PAUSE_S = 60.0
"""New weights take seconds; a trainer that paused for longer may have died meanwhile."""

OF_NOW = frozenset({"engine_away", "engine_paused"})
"""Of a gateway that runs, not of what is stored: no part of a report."""

COLOURS: tuple[tuple[Literal["red", "amber"], tuple[Colour, ...]], ...] = (
    ("red", ("red",)),
    ("amber", ("amber", "red")),
)
"""What an alarm is called, and the bands that its stretch is made of: an amber one was worse at
times."""

UNITS = {"kl_k3_rollout_train": " nats", "abs_log_ratio_mean": " nats"}


def alarms(
    cells: Mapping[CellKey, Sequence[Sums]],
    rows: Sequence[CellRow],
    activity: Activity,
    trajectories: int,
    *,
    now_ns: int,
    engines: Sequence[EngineState] = (),
) -> list[Alarm]:
    """All alarms, red before amber. ``rows``: the same cells as storage judges them;
    ``trajectories``: how many there are; ``engines``: those of a gateway that runs."""
    found = [*_away(engines), *_paused(engines, now_ns)]
    sides = {row.engine.digest: row.engine for row in rows}
    for (engine, trainer, model, kind), sums in cells.items():
        if kind != "drift":
            continue
        at = {"engine_digest": engine, "trainer_digest": trainer, "model": model}
        routed = any(row.all_cells for row in sums)
        found += _routes(sums, at)
        found += _drift(sums, at, slack=slack_of(sides.get(engine), routed=routed))
        found += _bad_tokens(sums, at)
    found += _not_comparable(rows)
    found += _capture(activity, trajectories)
    found += _worker(activity, now_ns)
    return sorted(found, key=lambda alarm: alarm.severity != "red")


def _away(engines: Sequence[EngineState]) -> Iterator[Alarm]:
    """By what `/readyz` goes by."""
    others = any(engine.error is None for engine in engines)
    for engine in engines:
        if engine.error is None:
            continue
        where = "" if engine.upstream in engine.error else f"{engine.upstream}: "
        yield Alarm(
            severity="amber" if others else "red",
            code="engine_away",
            text=f"Engine away: {where}{engine.error}",
            fix="other engines take its calls until it is back"
            if others
            else "agents' calls fail until it is back: its own log says why it is not",
        )


def _paused(engines: Sequence[EngineState], now_ns: int) -> Iterator[Alarm]:
    for engine in engines:
        since = engine.paused_ns
        if engine.paused is None or since is None or now_ns - since < PAUSE_S * 1e9:
            continue
        yield Alarm(
            severity="amber",
            code="engine_paused",
            text=f"Engine paused by the trainer: {engine.upstream} ({engine.paused}), "
            f"calls still there: {engine.in_flight}",
            fix="new calls are answered 429 until it is resumed: POST /api/weights",
            since_ns=since,
        )


def _routes(sums: Sequence[Sums], at: dict[str, str]) -> Iterator[Alarm]:
    def far(total: Sums) -> bool:
        return total.all_cells > 0 and total.zero_overlap / total.all_cells > ZERO_OVERLAP

    now = stretch(sums, far, lambda row: row.all_cells)
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


def _drift(sums: Sequence[Sums], at: dict[str, str], *, slack: float = 1.0) -> Iterator[Alarm]:
    """One alarm for a cell: its worst colour, of the first metric that has it."""
    for colour, bands in COLOURS:
        for name in GATED:
            holds = partial(_holds, name=name, bands=bands, slack=slack)
            now = stretch(sums, holds, _routed_tokens if name == ROUTES else _tokens)
            if now is None or now.n_tokens < BLOCK_TOKENS:
                continue
            value, limits = now.metrics()[name], BANDS[name]
            limit = limits.red if colour == "red" else limits.green
            limit *= slack if name == GATED[0] else 1.0
            yield Alarm(
                severity=colour,
                code=f"drift_{colour}",
                text=f"Drift of {at['model']}: {name} {value:.2g}{UNITS.get(name, '')}, the band's "
                f"{colour} begins at {limit:.2g}; "
                f"{now.n_tokens} tokens",
                fix="open the cell: compare with its noise floor, then look at the worst token",
                since_ns=now.scored_ns,
                **at,
            )
            return


def _tokens(row: Sums) -> int:
    return row.n_tokens


def _routed_tokens(row: Sums) -> int:
    """A token's layers are no chances of their own: routes fill a block by tokens too."""
    return row.n_tokens if row.cells else 0


def _holds(total: Sums, *, name: str, bands: tuple[Colour, ...], slack: float) -> bool:
    """It is in one of the bands, and without its worst token not green: of green data with few
    far tokens one block in ten has a k3 of amber by one token, and none in a hundred by two."""
    if name == "extreme_frac_tau2" and total.over_2 < FEW_HITS:
        return False
    found = band(name, total.metrics()[name], slack=slack)
    if name == ROUTES:  # nothing of one token: a pair counts one at most
        return found in bands
    return found in bands and band(name, total.but_worst().metrics()[name], slack=slack) != "green"


def _bad_tokens(sums: Sequence[Sums], at: dict[str, str]) -> Iterator[Alarm]:
    now = stretch(
        sums,
        lambda total: total.n_bad_tokens > 0,
        lambda row: row.n_tokens + row.n_bad_tokens,
    )
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
        why = CODES.get(_refusal(row), "No score has numbers.")
        yield Alarm(
            severity="amber",
            code="not_comparable",
            text=f"{row.model}: none of {row.scored} scores is comparable. {why}",
            fix="open the cell: each reason says what was seen and what to change",
            engine_digest=row.engine.digest,
            trainer_digest=row.trainer.digest,
            model=row.model,
        )


def _refusal(row: CellRow) -> str:
    """The code that refuses most scores of a cell; notes and conversions refuse none. What a pool
    finds refuses at most those that nothing of their own does."""
    refused = {code: n for code, n in row.reasons.items() if SEVERITY.get(code) == "no"}
    standing = row.scored - row.comparable.get("no", 0)
    for code in {reason.code for found in row.findings.values() for reason in found}:
        if SEVERITY.get(code) == "no":
            refused[code] = refused.get(code, 0) + standing
    return max(refused, key=lambda code: refused[code], default="")


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
    yield Alarm(
        severity="amber",
        code="worker_behind",
        text=f"Answers that wait to be scored: {activity.waiting}, the oldest for "
        f"{_for_s((now_ns - oldest) / 1e9)}",
        fix="start a worker: driftgate teach --follow; where one runs, its log says why",
        since_ns=oldest,
    )


def _for_s(seconds: float) -> str:
    """As the page says durations."""
    for limit_s, unit_s, unit in ((7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"

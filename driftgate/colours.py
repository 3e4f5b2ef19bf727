"""The colour of a score or a cell: its worst band of METRICS 2, where the comparison is valid."""

from __future__ import annotations

from driftgate.bands import GATED, ROUTES, Colour, band, slack_of
from driftgate.views import CellView, ScoreView

__all__ = ["ORDER", "STYLES", "VERDICTS", "colour"]

STYLES: dict[Colour | None, str] = {
    "green": "green",
    "amber": "yellow",
    "red": "bold red",
    None: "bright_black",
}

VERDICTS = {"yes": "green", "converted": "yellow", "no": "red"}

ORDER: tuple[Colour, ...] = ("green", "amber", "red")


def colour(item: ScoreView | CellView) -> Colour | None:
    """The worst band of the gated metrics; None where no valid comparison stands behind them."""
    if isinstance(item, ScoreView) and item.comparable.verdict == "no":
        return None
    if item.measures is None:
        return None
    values = item.measures.metrics
    bad = int(values.get("n_bad_tokens") or 0)
    slack = slack_of(item.engine, routed=item.router is not None)
    found = [
        band(name, values.get(name), n_bad_tokens=bad, slack=slack)
        for name in GATED
        if name != ROUTES
    ]
    if item.router is not None:
        found.append(band(ROUTES, item.router.metrics.get(ROUTES)))
    return max((level for level in found if level), key=ORDER.index, default=None)

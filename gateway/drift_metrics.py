"""What the store says of drift, for Prometheus: coverage, each cell's headline metrics, reasons.

Everything in here is the API's own answer (``Answers``), never a second computation. Folding all
cells costs time, so it is asked for again only when that time is a small share of what has passed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from driftgate.bands import BANDS, Colour, band
from driftgate.errors import DriftgateError
from driftgate.gateway.answers import Answers
from driftgate.storage import Counts
from driftgate.trace import Engine, Trainer
from driftgate.views import CellView

__all__ = ["DriftMetrics", "families"]

MIN_AGE_S = 5.0
"""Scrapes come every 15 s or more; a second scraper does not cost a second reading."""

COST_SHARE = 0.05
"""Of the time, at most, goes into reading for scrapes."""

CELL = ["engine", "trainer", "model", "kind"]
COLOURS = {"green": 0, "amber": 1, "red": 2}

log = logging.getLogger("driftgate.metrics")


class DriftMetrics(Collector):
    """Reads the store when it is scraped. Blocks: scrape on a thread."""

    def __init__(self, answers: Answers, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._answers = answers
        self._clock = clock
        self._lock = threading.Lock()
        self._families: list[Metric] = []
        self._fresh_until = -1.0
        self._errors = 0

    def describe(self) -> Iterable[Metric]:
        """No names ahead of time: registering does not read the store."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The families of the last reading, or of a new one where that is old enough."""
        with self._lock:
            started = self._clock()
            if started >= self._fresh_until:
                try:
                    counts = self._answers.reader.counts()
                    self._families = [*_coverage(counts), *_drift(self._answers.cells().items)]
                except DriftgateError as error:
                    self._errors += 1
                    self._families = []  # old numbers must not pass for new ones
                    log.warning("the store cannot be read for /metrics: %s", error)
                took = self._clock() - started
                self._fresh_until = started + max(MIN_AGE_S, took / COST_SHARE)
            text = "Readings of the store for metrics that failed"
            yield CounterMetricFamily("driftgate_metrics_read_errors", text, value=self._errors)
            yield from self._families


def families() -> list[Metric]:
    """The families as they are without numbers, for the documentation."""
    nothing = dict.fromkeys(Counts.__struct_fields__, 0)
    return [*_coverage(Counts(**nothing)), *_drift([])]


def _coverage(counts: Counts) -> Iterable[Metric]:
    answers = GaugeMetricFamily(
        "driftgate_answers",
        "Answers in the store: captured, scorable (ids and logprobs are there), scored",
        labels=["state"],
    )
    answers.add_metric(["captured"], counts.traces)
    answers.add_metric(["scorable"], counts.scorable)
    answers.add_metric(["scored"], counts.scored)
    yield answers
    runs = GaugeMetricFamily(
        "driftgate_trajectories",
        "Trajectories in the store: all, and complete ones (without a gap)",
        labels=["state"],
    )
    runs.add_metric(["all"], counts.trajectories)
    runs.add_metric(["complete"], counts.complete)
    yield runs


def _drift(cells: list[CellView]) -> Iterable[Metric]:
    value = GaugeMetricFamily(
        "driftgate_drift",
        "A headline metric of a cell over its comparable scores; absent where it is not valid",
        labels=[*CELL, "metric"],
    )
    colour = GaugeMetricFamily(
        "driftgate_drift_band",
        "Its band: 0 green, 1 amber, 2 red; only of drift, a noise floor has none",
        labels=[*CELL, "metric"],
    )
    tokens = GaugeMetricFamily("driftgate_drift_tokens", "Tokens behind a cell", labels=CELL)
    scores = GaugeMetricFamily(
        "driftgate_drift_scores",
        "Scores of a cell by whether they are comparable: yes, converted, no",
        labels=[*CELL, "comparable"],
    )
    reasons = GaugeMetricFamily(
        "driftgate_drift_reasons",
        "Scores of a cell that carry a reason, by its code (driftgate.codes)",
        labels=[*CELL, "code"],
    )
    for cell in cells:
        names = [_side(cell.engine), _side(cell.trainer), cell.model, cell.kind]
        tokens.add_metric(names, cell.n_tokens)
        for verdict, count in cell.comparable.items():
            scores.add_metric([*names, verdict], count)
        for reason in cell.reasons:
            reasons.add_metric([*names, reason.code], reason.scores)
        for metric, number in _headlines(cell).items():
            value.add_metric([*names, metric], number)
            if cell.kind == "drift" and (found := _band(cell, metric, number)):
                colour.add_metric([*names, metric], COLOURS[found])
    return [value, colour, tokens, scores, reasons]


def _headlines(cell: CellView) -> dict[str, float]:
    """The metrics that have bands, where they are valid."""
    metrics = dict(cell.measures.metrics) if cell.measures else {}
    if cell.router is not None:
        metrics |= {name: cell.router.metrics.get(name) for name in BANDS if "router" in name}
    return {name: float(v) for name in BANDS if (v := metrics.get(name)) is not None}


def _band(cell: CellView, metric: str, number: float) -> Colour | None:
    """As the dashboard colours it."""
    bad = (cell.measures.metrics.get("n_bad_tokens") or 0) if cell.measures else 0
    return band(metric, number, n_bad_tokens=int(bad), slack=cell.k3_slack)


def _side(side: Engine | Trainer) -> str:
    """As the matrix names it: ``vllm:…``, with the fingerprint's digest."""
    name = side.name if isinstance(side, Engine) else side.backend
    return f"{name}:{side.digest}"

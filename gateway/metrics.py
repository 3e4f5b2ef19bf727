"""What the gateway counts, in its own Prometheus registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from driftgate.storage import WriterStats

__all__ = ["Metrics"]

LAG_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, float("inf"))
"""A loop that is 20 ms late shows in a stream of 50 tokens a second."""

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, float("inf"))
"""A generation takes from parts of a second to minutes."""

M = TypeVar("M", bound=MetricWrapperBase)


class Metrics:
    """The gateway's counters. Thread-safe, as prometheus_client's are."""

    def __init__(self, stats: Callable[[], WriterStats]) -> None:
        registry = CollectorRegistry()
        registry.register(_Store(stats))
        self._registry = registry
        self._children: dict[tuple[MetricWrapperBase, tuple[str, ...]], MetricWrapperBase] = {}
        self.held_back = Counter(
            "driftgate_calls_held_back",
            "Calls that waited because storage was behind, by how the wait ended: released or "
            "gave_up",
            ["end"],
            registry=registry,
        )
        self.calls = Counter(
            "driftgate_calls",
            "Calls that ended, by outcome: answered, refused by the engine, cancelled, …",
            ["api", "streamed", "outcome"],
            registry=registry,
        )
        self.traces = Counter(
            "driftgate_traces", "Traces handed to storage", ["status"], registry=registry
        )
        self.lost = Counter(
            "driftgate_capture_lost",
            "Records that did not reach storage, by kind; step: a number given without asking it",
            ["record"],
            registry=registry,
        )
        self.refused = Counter(
            "driftgate_refused",
            "Requests that may not be made, by why: no_key, wrong_key, foreign_page; and "
            "connections that were one too many",
            ["why"],
            registry=registry,
        )
        self.ambiguous = Counter(
            "driftgate_ambiguous_calls",
            "Calls that several trajectories could have led to",
            registry=registry,
        )
        self.continued = Counter(
            "driftgate_continued_traces",
            "Traces that go on from an earlier answer, by how: with the ids that were sampled "
            "(exact) or as the engine renders the messages (ordinary)",
            ["way"],
            registry=registry,
        )
        self.in_flight = Gauge("driftgate_calls_in_flight", "Calls under way", registry=registry)
        self.first_byte = Histogram(
            "driftgate_first_byte_seconds",
            "From the call's arrival to the first byte of its answer",
            ["streamed"],
            buckets=SECONDS,
            registry=registry,
        )
        self.loop_lag = Histogram(
            "driftgate_loop_lag_seconds",
            "How late the event loop was, measured by a timer",
            buckets=LAG_SECONDS,
            registry=registry,
        )
        self.tasks = Gauge("driftgate_tasks", "Tasks of the event loop now", registry=registry)
        self.upstream_up = Gauge(
            "driftgate_upstream_up",
            "1 while the engine was found by its last probe and calls can be sent there",
            ["upstream"],
            registry=registry,
        )
        self.upstream_calls = Counter(
            "driftgate_upstream_calls",
            "Calls sent to the engine, by what came first: an answer, or nothing (failed)",
            ["upstream", "first"],
            registry=registry,
        )
        self.upstream_in_flight = Gauge(
            "driftgate_upstream_calls_in_flight",
            "Calls that are at the engine now",
            ["upstream"],
            registry=registry,
        )
        self.paused = Counter(
            "driftgate_calls_paused",
            "Calls answered 429 because a trainer had paused the engines",
            registry=registry,
        )

        # A counter's first event is an increase only where the counter stood at 0 before it.
        for counter, values in (
            (self.held_back, ("released", "gave_up")),
            (self.traces, ("complete", "partial")),
            (self.lost, ("intent", "trace", "outcome", "owed", "step")),
        ):
            for value in values:
                counter.labels(value)

    def child(self, metric: M, *values: str) -> M:
        """``metric.labels(*values)``, which takes a lock and makes its key anew each time."""
        found = self._children.get((metric, values))
        if found is None:
            found = self._children[metric, values] = metric.labels(*values)
        return cast(M, found)

    def count_poll_errors(self, errors: Callable[[], int]) -> None:
        """Show ``errors()`` as the failed looks for new scores."""
        self._registry.register(_PollErrors(errors))

    def add(self, collector: Collector) -> None:
        """Show what ``collector`` reads at each scrape."""
        self._registry.register(collector)

    def render(self) -> bytes:
        """The exposition text. Blocks while the store is read: call it on a thread."""
        return generate_latest(self._registry)


class _Store(Collector):
    """The writer's own counters, read when asked for."""

    def __init__(self, stats: Callable[[], WriterStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, text, value in (
            ("queued_records", "Submissions that wait for storage", stats.queued_records),
            ("queued_bytes", "Memory of the submissions that wait", stats.queued_bytes),
            ("last_fsync_seconds", "How long the last sync took", stats.last_fsync_s),
        ):
            yield GaugeMetricFamily(f"driftgate_store_{name}", text, value=value)
        for name, text, count in (
            ("written_records", "Records on disk", stats.written_records),
            ("written_bytes", "Bytes on disk", stats.written_bytes),
            ("refused_records", "Submissions refused: the queue was full", stats.refused_records),
            ("failed_records", "Submissions that could not be written", stats.failed_records),
            ("duplicate_records", "Records that were there already", stats.duplicate_records),
            ("write_errors", "Batches that could not be written", stats.write_errors),
            ("fsyncs", "Syncs", stats.fsyncs),
        ):
            yield CounterMetricFamily(f"driftgate_store_{name}", text, value=count)


class _PollErrors(Collector):
    """The live feed's own counter, read when asked for."""

    def __init__(self, errors: Callable[[], int]) -> None:
        self._errors = errors

    def collect(self) -> Iterable[Metric]:
        text = "Looks for new scores that failed; the next one comes at once"
        yield CounterMetricFamily("driftgate_drift_poll_errors", text, value=self._errors())

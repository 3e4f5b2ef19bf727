"""The dashboard and the alert rules name what a running gateway's /metrics really has."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from driftgate.bands import BANDS, MOE_FP8_SLACK
from driftgate.codes import CODES, reason
from driftgate.errors import StorageError
from driftgate.gateway.answers import Answers
from driftgate.gateway.drift_metrics import COST_SHARE, DriftMetrics
from driftgate.gateway.ending import Outcome
from driftgate.router import RouterBucket
from driftgate.storage import Reader
from driftgate.testing.stores import write_store
from driftgate.testing.traces import ENGINE, make_score, make_trajectory
from driftgate.trace import Comparable, Score, Trace
from driftgate.views import Kind

DEPLOY = Path(__file__).parents[2] / "deploy"
SCRAPED = {"job", "instance"}
"""Labels that Prometheus itself gives to everything it scrapes."""

CLOSED = {
    "outcome": set(get_args(Outcome)),
    "code": set(CODES),
    "metric": set(BANDS),
    "kind": set(get_args(Kind)),
    "status": {"complete", "partial"},
    "comparable": {"yes", "converted", "no"},
}
"""Labels whose values are known without being seen."""


def dashboard() -> list[str]:
    panels = json.loads((DEPLOY / "grafana" / "driftgate.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def alerts() -> list[str]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def parsed(expression: str) -> promql.Expr:
    """Grafana's own variables stand for durations."""
    return promql.parse(re.sub(r"\$__(rate_interval|range)", "5m", expression))


def selectors(expression: str) -> list[promql.VectorSelector]:
    found: list[promql.VectorSelector] = []

    def visit(node: promql.Expr) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append(node)

    promql.walk(parsed(expression), visit)
    return found


def grouping(expression: str) -> set[str]:
    """Labels that aggregations are ``by``."""
    labels: set[str] = set()

    def visit(node: promql.Expr) -> None:
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            labels.update(node.modifier.labels)

    promql.walk(parsed(expression), visit)
    return labels


def judged(noise: float = 0.5) -> list[Trace | Score]:
    """A run with experts, its scores off by ``noise`` nats, each with a reason."""
    scores = []
    for number, trace in enumerate(traces := list(make_trajectory(steps=3, experts=8))):
        assert trace.routes is not None
        assert trace.response_ids is not None
        mine = trace.routes[-len(trace.response_ids) :]
        scores.append(
            make_score(
                trace,
                noise=noise,
                seed=number,
                router=RouterBucket.of(mine, np.roll(mine, 1, axis=0)),
                comparable=Comparable(
                    verdict="yes", reasons=[reason("low_power", "7 tokens", "more")]
                ),
            )
        )
    return [*traces, *scores]


@pytest.fixture
async def seen(connect: Callable[..., Any], tmp_path: Path) -> dict[str, dict[str, set[str]]]:
    """Label values by label by sample name, of a gateway that has answered, failed and scores."""
    write_store(tmp_path / "store", judged())
    agent = await connect()
    await agent.send({"model": "tiny", "messages": [{"role": "user", "content": "a"}]})
    await agent.flush()
    status, text = await _scrape(agent)
    assert status == 200
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name].setdefault("__name__", set()).add(sample.name)
            for label, value in sample.labels.items():
                found[sample.name][label].add(value)
    # Counters with labels have no sample before the first event.
    labelled = agent.gateway.metrics
    counters = (labelled.held_back, labelled.lost, labelled.calls, labelled.refused)
    for counter in (*counters, labelled.traces):
        for label in counter._labelnames:
            found[f"{counter._name}_total"].setdefault(label, set())
    return found


async def _scrape(agent: Any) -> tuple[int, str]:
    async with agent.http.get(f"{agent.url}/metrics") as answer:
        return answer.status, await answer.text()


async def test_every_name_label_and_value_exists(seen: dict[str, dict[str, set[str]]]) -> None:
    expressions = [*dashboard(), *alerts()]
    assert len(expressions) > 30
    for expression in expressions:
        labels: set[str] = set(SCRAPED)
        for selector in selectors(expression):
            assert selector.name in seen, f"{selector.name} in {expression}"
            known = seen[selector.name]
            labels |= set(known)
            for matcher in selector.matchers.matchers:
                assert matcher.name in {*known, *SCRAPED}, f"{matcher.name} in {expression}"
                if matcher.name in SCRAPED:
                    continue
                values = known[matcher.name] | CLOSED.get(matcher.name, set())
                assert set(matcher.value.split("|")) <= values, expression
        assert grouping(expression) <= labels, expression


def test_a_wrong_name_would_be_found() -> None:
    (selector,) = selectors('sum by (le) (rate(driftgate_nonsense_total{a="b"}[$__range]))')
    assert selector.name == "driftgate_nonsense_total"
    assert grouping("sum by (le) (x)") == {"le"}
    with pytest.raises(ValueError, match="unclosed"):
        parsed("sum by (")


def test_panels_neither_overlap_nor_share_an_id() -> None:
    panels = json.loads((DEPLOY / "grafana" / "driftgate.json").read_text())["panels"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_numbers_are_the_apis_own_and_reading_is_rationed(tmp_path: Path) -> None:
    write_store(tmp_path, judged())
    times = iter([100.0, 101.0, 119.0, 121.0, 122.0])
    reader = Reader(tmp_path)
    answers = Answers(reader)
    metrics = DriftMetrics(answers, clock=lambda: next(times))
    families = {family.name: family for family in metrics.collect()}  # took 1 s
    (cell,) = answers.cells().items
    shown = {s.labels["metric"]: s.value for s in families["driftgate_drift"].samples}
    assert cell.measures is not None
    assert cell.router is not None
    expected = {name: cell.measures.metrics.get(name) for name in BANDS}
    expected["router_set_disagree_rate"] = cell.router.metrics["router_set_disagree_rate"]
    assert shown == expected
    red = {s.labels["metric"]: s.value for s in families["driftgate_drift_band"].samples}
    assert red["abs_log_ratio_mean"] == 2
    (captured, scorable, scored) = families["driftgate_answers"].samples
    assert (captured.value, scorable.value, scored.value) == (3, 3, 3)
    assert 1.0 / COST_SHARE == 20
    before = families["driftgate_drift"]
    assert any(family is before for family in metrics.collect())  # 19 s later: the same
    assert not any(family is before for family in metrics.collect())  # 21 s later: read anew
    reader.close()


def test_the_band_of_a_mixture_of_experts_is_the_dashboards(tmp_path: Path) -> None:
    write_store(tmp_path, judged(noise=0.17))
    reader = Reader(tmp_path)
    families = {family.name: family for family in DriftMetrics(Answers(reader)).collect()}
    reader.close()
    name = "kl_k3_rollout_train"
    drift, colour = (
        {s.labels["metric"]: s.value for s in families[family].samples}[name]
        for family in ("driftgate_drift", "driftgate_drift_band")
    )
    assert BANDS[name].red <= drift < BANDS[name].red * MOE_FP8_SLACK
    assert colour == 1


def test_an_fp8_engine_has_the_wider_band_everywhere(tmp_path: Path) -> None:
    fp8 = msgspec.structs.replace(ENGINE, settings={"quantization": "fp8"})
    (trace,) = make_trajectory(steps=1, routed=False)
    trace.meta.engine = fp8
    write_store(tmp_path, [trace, make_score(trace, noise=0.17, engine=fp8)])
    reader = Reader(tmp_path)
    answers = Answers(reader)
    families = {family.name: family for family in DriftMetrics(answers).collect()}
    (cell,) = answers.cells().items
    reader.close()
    bands = {s.labels["metric"]: s.value for s in families["driftgate_drift_band"].samples}
    assert cell.k3_slack == MOE_FP8_SLACK
    assert bands["kl_k3_rollout_train"] == 1


async def test_what_is_counted_by_kind_stands_at_0_before_its_first_event(
    connect: Callable[..., Any],
) -> None:
    _, text = await _scrape(await connect())
    for sample in (
        'driftgate_capture_lost_total{record="trace"}',
        'driftgate_traces_total{status="partial"}',
        'driftgate_calls_held_back_total{end="gave_up"}',
    ):
        assert f"{sample} 0.0\n" in text


def test_a_store_that_cannot_be_read_gives_no_old_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(tmp_path, judged())
    reader = Reader(tmp_path)
    times = iter([0.0, 0.0, 10.0, 10.0])
    metrics = DriftMetrics(Answers(reader), clock=lambda: next(times))
    assert len(list(metrics.collect())) > 1

    def broken() -> None:
        raise StorageError("the index is damaged")

    monkeypatch.setattr(reader, "counts", broken)
    (only,) = metrics.collect()
    assert (only.name, only.samples[0].value) == ("driftgate_metrics_read_errors", 1)
    reader.close()

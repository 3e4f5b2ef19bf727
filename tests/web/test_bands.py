"""A colour says no more than was judged: the worst band, of what can be compared."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from playwright.sync_api import Page, Route, expect

from driftgate.router import RouterBucket
from driftgate.storage import Record
from driftgate.testing.stores import write_store
from driftgate.testing.traces import make_trajectory
from driftgate.trace import Score, Trace
from tests.web.conftest import Watched, gateway, in_thread
from tests.web.stores import called, routed_score

MakePage = Callable[..., Watched]


def records() -> Iterator[Record]:
    """Two of five tokens go to other experts; logprobs are nearly equal."""
    for made in make_trajectory("moved", steps=2, response=40, layers=1):
        assert made.logprobs is not None
        trace = dataclasses.replace(made, logprobs=made.logprobs - 4)  # none beyond 0 by noise
        yield from called(trace)
        yield with_another_expert(trace, tokens=16)


def with_another_expert(trace: Trace, *, tokens: int) -> Score:
    """The trainer chooses one expert in four otherwise: too little to look misaligned."""
    score = routed_score(trace, flips=0, seed=1, noise=0.005)
    assert score.routes is not None
    train = score.routes.copy()
    for row in train[:tokens, 0]:
        row[0] = min(set(range(16)) - set(row.tolist()))
    router = RouterBucket.of(score.routes, train, train_ordered=True)
    meta = msgspec.structs.replace(score.meta, router=router)
    return dataclasses.replace(score, meta=meta, routes=train)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root: Path = write_store(tmp_path_factory.mktemp("moved"), records())
    with in_thread(lambda: gateway(root)) as url:
        yield f"{url}/"


def without_alarms(page: Page) -> None:
    def answer(route: Route) -> None:
        said = route.fetch()
        route.fulfill(response=said, json=said.json() | {"alarms": []})

    page.route("**/api/overview", answer)


def test_no_alarm_is_not_called_within_band(make_page: MakePage, moved: str) -> None:
    watched = make_page(at=moved)
    without_alarms(watched.page)
    alarms = watched.open().get_by_role("region", name="Alarms")
    expect(alarms).to_contain_text("Over all of their scores: 1 cell out of band.")
    expect(alarms.locator(".calm")).to_have_count(0)


def test_a_step_diverges_by_its_worst_band(make_page: MakePage, moved: str) -> None:
    page = make_page(at=moved).open("t/moved")
    jump = page.get_by_role("link", name=re.compile("^First divergent step"))
    expect(jump).to_have_text("First divergent step step 0, red by routes")
    expect(page.get_by_role("navigation", name="Steps").locator(".band.red")).to_have_count(2)


def test_where_nothing_is_comparable_no_step_is_within_band(make_page: MakePage) -> None:
    page = make_page().open("t/shift")
    jumps = page.get_by_role("navigation", name="Jump to")
    expect(jumps).to_contain_text("First divergent step no comparable step")


@pytest.mark.parametrize("metric", ["k3", "mean |D|"])
def test_what_is_not_comparable_has_no_band(make_page: MakePage, metric: str) -> None:
    page = make_page().open("matrix")
    page.get_by_role("radio", name=metric, exact=True).check()
    refused = page.locator(".cell", has_text="not comparable")
    expect(refused).not_to_have_count(0)
    expect(refused.locator(".value .band")).to_have_count(0)
    expect(page.locator(".cell", has_text="comparable").locator(".value .band")).not_to_have_count(
        0
    )


def test_a_refused_cell_has_no_band_anywhere(make_page: MakePage) -> None:
    watched = make_page()
    whole = watched.open("t/shift").get_by_role("region", name="As a whole")
    expect(whole.locator(".value")).not_to_have_count(0)
    expect(whole.locator(".band")).to_have_count(0)
    whole.get_by_role("rowheader").get_by_role("link").click()
    expect(watched.page.get_by_role("heading", level=1)).to_have_text("tiny-shift")
    expect(watched.page.locator("main .value")).not_to_have_count(0)
    expect(watched.page.locator("main .value .band")).to_have_count(0)

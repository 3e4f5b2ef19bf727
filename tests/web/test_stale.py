"""What a page shows goes on being true: it says when it is old, and follows what is scored."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from driftgate.storage import Record, Writer
from driftgate.testing.traces import make_intent, make_score, make_trajectory
from tests.web.conftest import Watched

MakePage = Callable[..., Watched]

LOST = re.compile(r"The gateway has not answered since \d\d:\d\d:\d\d")
VIEWS = ("", "matrix", "trajectories", "t/moe-3?step=2", "compare", "live", "glossary")


def later(page: Page) -> None:
    """Past every wait of the page."""
    page.clock.run_for(16_000)


@pytest.mark.parametrize("view", VIEWS)
def test_a_gateway_that_stopped_is_said_beside_what_it_had_said(
    make_page: MakePage, view: str
) -> None:
    watched = make_page()
    watched.allowed = ("ERR_FAILED",)
    watched.page.clock.install()
    page = watched.open(view)
    lost = page.locator(".head").get_by_role("status")
    shown = page.locator("main .card").count()
    expect(lost).to_have_text("")
    page.route(re.compile("/api/|/healthz"), lambda route: route.abort())
    later(page)
    expect(lost).to_have_text(LOST)
    assert page.locator("main .card").count() == shown
    page.unroute_all()
    later(page)
    expect(lost).to_have_text("")


def test_an_answer_that_the_gateway_refuses_leaves_the_one_before(make_page: MakePage) -> None:
    watched = make_page()
    watched.allowed = ("503",)
    watched.page.clock.install()
    page = watched.open("matrix")

    def refuse(route: Route) -> None:
        route.fulfill(status=503, json={"error": {"message": "the index is locked", "fix": ""}})

    page.route("**/api/cells", refuse)
    later(page)
    old = page.locator("main").get_by_role("status")
    expect(old).to_contain_text("the index is locked")
    expect(old).to_contain_text(re.compile(r"From \d\d:\d\d:\d\d: the matrix"))
    expect(page.get_by_role("table").first).to_be_visible()


def add(root: Path, *records: Record) -> None:
    writer = Writer(root)
    try:
        for record in records:
            writer.submit(record).result(timeout=30)
    finally:
        writer.close()


def test_a_verdict_follows_what_is_scored(make_page: MakePage, root: Path) -> None:
    (trace,) = make_trajectory("scored-later", steps=1, response=40, routed=False)
    add(root, make_intent(trace), trace)
    watched = make_page()
    watched.page.clock.install()
    page = watched.open("t/scored-later")
    verdict = page.get_by_role("region", name="Train on it?")
    response = page.get_by_role("region", name="Response, 40 tokens")
    expect(verdict).to_contain_text("no verdict")
    expect(response).to_contain_text("Not scored yet")
    add(root, make_score(trace, noise=0.001))
    page.clock.run_for(6_000)
    expect(verdict).to_contain_text("1 of 1 answers scored")
    expect(verdict).to_contain_text("Shares of mean |D|")
    expect(response).to_contain_text("k3")
    expect(page.get_by_role("region", name="As a whole")).to_contain_text("1 of 1")


def test_one_overview_is_asked_for_at_a_time(make_page: MakePage) -> None:
    """Each score aborted the request before: a slow gateway's answer never arrived."""
    watched = make_page()
    page = watched.page
    held: list[Route] = []
    scores = "".join(f'{{"cursor": {n}, "score": {{}}}}\n' for n in range(1, 21))
    page.route("**/api/overview", lambda route: held.append(route))
    page.route("**/api/drift?follow=1*", lambda route: route.fulfill(body=scores))
    with page.expect_request("**/api/overview"):
        page.goto("about:blank")
        page.goto(f"{watched.home}#/")
    for _ in range(2):  # the next one begins when all of one was read
        page.wait_for_event("request", lambda request: "follow=1" in request.url)
    assert len(held) == 1
    with page.expect_request("**/api/overview"):  # what came meanwhile
        held[0].continue_()
    expect(page.get_by_text("Worker lag")).to_be_visible()
    assert len(held) == 2
    page.unroute_all(behavior="ignoreErrors")


def run_rows(first: int, last: int) -> list[dict[str, object]]:
    """Of the list of trajectories, newest first."""
    counts = dict.fromkeys(("steps", "choices", "captured", "scorable", "scored", "missing"), 1)
    more = {"open_calls": 0, "failed_calls": 0, "models": ["tiny"], "complete": True, "gaps": []}
    return [
        {"trajectory": f"run-{n:03}", "started_ns": n, "ended_ns": n, "reward": None, "drift": None}
        | counts
        | more
        for n in range(last, first - 1, -1)
    ]


@pytest.mark.parametrize(("came", "shown"), [(5, 65), (40, 100), (50, 50), (70, 50)])
def test_older_runs_lose_none_when_new_ones_come(
    make_page: MakePage, came: int, shown: int
) -> None:
    """The first page moved, and the rows that it left were on no page."""
    watched = make_page()
    page = watched.page
    page.clock.install()
    newest = [59]

    def answer(route: Route) -> None:
        before = re.search(r"before=run-(\d+)", route.request.url)
        last = int(before[1]) - 1 if before else newest[0]
        first = max(0, last - 49)
        following = f"run-{first:03}" if first else None
        route.fulfill(json={"items": run_rows(first, last), "next": following})

    page.route(re.compile(r"/api/trajectories\?"), answer)
    names = watched.open("trajectories").get_by_role("table").get_by_role("rowheader")
    expect(names).to_have_count(50)
    page.get_by_role("button", name="Older ones").click()
    expect(names).to_have_count(60)
    newest[0] += came
    page.clock.run_for(11_000)
    expect(names.first).to_have_text(f"run-{newest[0]:03}")
    expect(names).to_have_count(shown)
    while page.get_by_role("button", name="Older ones").count():
        before = names.count()
        page.get_by_role("button", name="Older ones").click()
        expect(names).not_to_have_count(before)
    said = names.all_inner_texts()
    assert said == [f"run-{n:03}" for n in range(newest[0], -1, -1)]

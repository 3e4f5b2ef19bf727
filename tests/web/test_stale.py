"""What a page shows goes on being true: it says when it is old, and follows what is scored."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, Route, expect

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

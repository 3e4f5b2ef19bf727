"""Names and tokens of any length and any characters: they are found, and move nothing aside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from playwright.sync_api import ViewportSize, expect

from driftgate.storage import Record
from driftgate.testing.stores import write_store
from driftgate.testing.traces import make_score, make_trajectory
from driftgate.trace import Trace
from tests.web.conftest import READ_KEY, WIDE, Watched, gateway, in_thread
from tests.web.stores import called

MakePage = Callable[..., Watched]

NARROW = ViewportSize(width=380, height=800)
NAME = 100 * "x" + 100 * "y"
"""As long as a name may be, without a place to break it."""
ODD = "100%"
RULE = 128 * "="
"""A token of many vocabularies."""


def worded(trace: Trace, word: str) -> Trace:
    """The same with ``word`` as each token's text."""
    assert trace.response_ids is not None
    count = len(trace.response_ids)
    ends = np.arange(count + 1, dtype=np.int32) * len(word)
    return dataclasses.replace(trace, token_bytes=count * word.encode(), token_offsets=ends)


def records() -> Iterator[Record]:
    for name in (NAME, ODD):
        for made in make_trajectory(name, steps=1, response=12, model=60 * "m" + "/tiny"):
            trace = worded(made, RULE)
            yield from called(trace)
            yield make_score(trace, noise=0.05)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root: Path = write_store(tmp_path_factory.mktemp("long"), records())
    with in_thread(lambda: gateway(root)) as url:
        yield f"{url}/"


VIEWS = ("", "matrix", "trajectories", f"t/{NAME}?token=3", f"compare?a=t:{NAME}&b=t:{ODD}", "live")

TOO_WIDE = """() => [...document.querySelectorAll('main .scroll')]
  .filter(e => e.scrollWidth > e.clientWidth + 1)
  .map(e => `${e.getAttribute('aria-label')}: ${e.scrollWidth} in ${e.clientWidth}`)"""


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_no_name_and_no_token_moves_the_page(
    make_page: MakePage, long: str, viewport: ViewportSize
) -> None:
    watched = make_page(at=long, viewport=viewport)
    watched.open()
    for view in VIEWS:
        page = watched.go(view)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], view
        if viewport is WIDE:  # a phone shows wide tables in a box that scrolls
            assert page.evaluate(TOO_WIDE) == [], view


def test_the_whole_name_is_there_for_who_points_at_it(make_page: MakePage, long: str) -> None:
    page = make_page(at=long).open("trajectories")
    expect(page.get_by_title(NAME)).to_be_visible()
    page.get_by_role("link", name=NAME).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(NAME)


def test_an_address_may_be_no_percent_encoding(make_page: MakePage, long: str) -> None:
    watched = make_page(at=long)
    page = watched.open(f"t/{ODD}")
    expect(page.get_by_role("heading", level=1)).to_have_text(ODD)
    watched.go("matrix/%zz")
    expect(page.get_by_role("heading", level=1)).to_have_text("Matrix")


def test_the_apis_document_is_saved_with_the_key(make_page: MakePage, locked_url: str) -> None:
    """A link cannot carry it: it led to a refusal."""
    watched = make_page(at=f"{locked_url}/")
    watched.allowed = ("401",)
    watched.page.goto(f"{locked_url}/")
    watched.page.evaluate("key => sessionStorage.setItem('driftgate-read-key', key)", READ_KEY)
    with watched.open().expect_download() as download:
        watched.page.get_by_role("link", name="API", exact=True).click()
    saved = msgspec.json.decode(download.value.path().read_bytes())
    assert "/api/overview" in saved["paths"]

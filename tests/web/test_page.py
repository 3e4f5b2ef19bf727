"""The dashboard in a real browser, on live data."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args
from urllib.parse import urlencode

import httpx
import msgspec
import pytest
from playwright.sync_api import ViewportSize, expect

from driftgate.bands import Colour
from driftgate.commands.export import FormatOption
from driftgate.storage import Writer
from driftgate.tailing import Wanted
from driftgate.testing.traces import TRAINER, make_intent, make_trajectory
from driftgate.views import Cells, DriftEvent
from tests.web.axe import COLOURS, RULES, violations
from tests.web.conftest import PHONE, READ_KEY, WIDE, Watched
from tests.web.stores import LONG_TOKENS, OTHER_BUILD, routed_score

VIEWS = (
    "",
    "matrix",
    "trajectories",
    "trajectories?complete=false",
    "t/moe-3?step=2&choice=0&token=1",
    "t/dense-0?step=1",
    "t/gap?step=0",
    "compare",
    "compare?a=t:moe-0&b=t:moe-1",
    "live",
    "glossary",
    "nowhere",
)

MakePage = Callable[..., Watched]


def cell_of(url: str, *, kind: str = "drift") -> str:
    cells = msgspec.json.decode(httpx.get(f"{url}/api/cells").content, type=Cells).items
    cell = next(c for c in cells if (c.kind == kind and c.router is not None) or c.kind != "drift")
    return "/".join([cell.engine_digest, cell.trainer_digest, cell.model, cell.kind])


@pytest.mark.parametrize(
    ("scheme", "viewport"),
    [("light", WIDE), ("dark", WIDE), ("light", PHONE)],
    ids=["light", "dark", "phone"],
)
def test_every_view_is_accessible(
    make_page: MakePage, url: str, scheme: str, viewport: ViewportSize
) -> None:
    watched = make_page(scheme=scheme, viewport=viewport)
    found = {}
    watched.open()
    for view in (*VIEWS, f"cell/{cell_of(url)}", f"cell/{cell_of(url, kind='noise_floor')}"):
        page = watched.go(view)
        if problems := violations(page, COLOURS if scheme == "dark" else RULES):
            found[view] = problems
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], view
    assert found == {}


def test_the_worst_token_is_within_three_clicks(make_page: MakePage, url: str) -> None:
    worst = httpx.get(f"{url}/api/overview").json()["worst"][0]
    page = make_page().open()
    page.evaluate("clicks = 0; addEventListener('click', () => clicks++, true)")
    page.get_by_role("table").last.get_by_role("link").first.click()
    expect(page.get_by_role("heading", level=1)).to_have_text(worst["trajectory"])
    chosen = page.locator("[role=option][aria-selected=true]")
    expect(chosen).to_have_attribute("data-i", str(worst["worst"]["token_index"]))
    shown = page.get_by_role("complementary", name="Token")
    expect(shown).to_contain_text(f"{abs(worst['worst']['log_ratio']):.3g}")
    expect(shown).to_contain_text("experts differ")
    expect(chosen).to_be_in_viewport()
    assert page.evaluate("clicks") <= 3


def test_the_list_leads_to_the_worst_token_in_three_clicks(make_page: MakePage) -> None:
    page = make_page().open()
    page.evaluate("clicks = 0; addEventListener('click', () => clicks++, true)")
    page.get_by_role("link", name="Trajectories", exact=True).click()
    page.get_by_role("link", name="moe-3", exact=True).click()
    page.get_by_role("link", name=re.compile("^Worst token")).click()
    expect(page.locator("[role=option][aria-selected=true]")).to_be_in_viewport()
    assert page.evaluate("clicks") == 3


def test_the_worst_token_is_reached_by_keyboard_alone(make_page: MakePage, url: str) -> None:
    worst = httpx.get(f"{url}/api/overview").json()["worst"][0]
    page = make_page().open()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('a.token-link')"):
            break
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_be_focused()
    chosen = page.locator("[role=option][aria-selected=true]")
    expect(chosen).to_have_attribute("data-i", str(worst["worst"]["token_index"]))
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('[role=listbox]')"):
            break
    page.keyboard.press("n")  # the second by size of D
    expect(chosen).not_to_have_attribute("data-i", str(worst["worst"]["token_index"]))
    expect(page.get_by_role("complementary", name="Token")).to_contain_text("p trainer")


def test_the_json_stands_beside_every_table_and_chart(make_page: MakePage, url: str) -> None:
    watched = make_page()
    watched.open()
    for view in (*VIEWS, f"cell/{cell_of(url)}"):
        page = watched.go(view)
        alone = page.evaluate(
            """() => document.querySelector('.title .raw') ? [] :
              [...document.querySelectorAll('main section')]
                .filter(s => s.querySelector('table, canvas') && !s.querySelector('.raw'))
                .map(s => s.getAttribute('aria-labelledby'))"""
        )
        assert alone == [], view


def test_expert_load_is_shown_by_layer_and_expert(make_page: MakePage) -> None:
    page = make_page().open("matrix")
    section = page.get_by_role("region", name="Expert load", exact=True)
    expect(section.get_by_role("img")).to_be_visible()
    expect(section.get_by_role("table")).to_contain_text("busiest, engine")
    section.get_by_role("radio", name="trainer − engine").check()
    section.get_by_role("img").hover(position={"x": 3, "y": 3})
    expect(section).to_contain_text(re.compile("layer 0, expert 0: engine .+ %, trainer .+ %"))
    drawn = page.evaluate(
        """() => { const c = document.querySelector('canvas');
          const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
          return new Set(Array.from({length: d.length / 4}, (_, i) => d.slice(4*i, 4*i+4).join()))
            .size; }"""
    )
    assert drawn > 2


def test_a_token_shows_what_else_was_likely(make_page: MakePage) -> None:
    page = make_page().open("t/likely?step=0&token=0")
    facts = page.get_by_role("complementary", name="Token")
    expect(facts.get_by_role("listitem")).to_have_text(["<script> 0.607", "↵ 0.135"])
    expect(facts).to_contain_text("step-8")
    page.locator("[data-i='39']").hover()
    expect(facts).to_contain_text("step-9")


def test_overview_says_what_is_wrong_in_words(make_page: MakePage) -> None:
    page = make_page().open()
    alarms = page.get_by_role("region", name="Alarms")
    expect(alarms).to_contain_text("Routes of tiny-shift misaligned: zero overlap")
    expect(alarms).to_contain_text("1 of 12 trajectories have a gap")
    expect(alarms).to_contain_text("Engine away: no engine answers at http://127.0.0.1:9")
    expect(
        page.get_by_role("img", name=re.compile("kl_k3_rollout_train of tiny-moe")).first
    ).to_be_visible()


def test_the_matrix_leads_to_a_cell_and_its_layers(make_page: MakePage) -> None:
    page = make_page().open("matrix")
    expect(page.get_by_role("table").nth(1)).to_contain_text("worst layer")
    page.get_by_role("link", name=re.compile("nats.*not comparable|not comparable")).first.click()
    expect(page.get_by_role("heading", name="Reasons")).to_be_visible()
    expect(page.get_by_text("evidence of what is wrong, not drift")).to_be_visible()


def test_a_response_can_be_read_by_keyboard(make_page: MakePage) -> None:
    page = make_page().open("t/moe-3?step=2")
    tokens = page.get_by_role("listbox")
    tokens.focus()
    page.keyboard.press("n")
    largest = page.get_by_role("table", name=None).filter(has_text="p trainer").last
    index = largest.get_by_role("cell").first.inner_text()
    expect(tokens).to_have_attribute("aria-activedescendant", f"token-{index}")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(tokens).to_have_attribute("aria-activedescendant", "token-1")
    page.keyboard.press("End")
    expect(tokens).to_have_attribute("aria-activedescendant", "token-39")
    for mode in ("|D|", "p", "entropy", "routes"):
        page.get_by_role("radio", name=mode, exact=True).check()
    expect(page.get_by_text("share of the engine's experts").first).to_be_visible()
    expect(page.get_by_role("table").filter(has_text="missed")).to_contain_text("of 4")


def test_the_first_tab_skips_to_the_content(make_page: MakePage) -> None:
    page = make_page().open("matrix")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    assert page.url.endswith("#/matrix")


def test_a_cell_is_told_apart_by_weight_lag(make_page: MakePage, url: str) -> None:
    cells = msgspec.json.decode(httpx.get(f"{url}/api/cells").content, type=Cells).items
    cell = next(c for c in cells if len(c.by_lag) > 1)
    page = make_page().open(f"cell/{cell.engine_digest}/{cell.trainer_digest}/{cell.model}/drift")
    table = page.get_by_role("region", name="By weight lag", exact=True)
    shown = table.locator("tbody tr").evaluate_all(
        "all => all.map(r => [r.cells[0].innerText, r.cells[4].innerText])"
    )
    assert shown == [[part.label, f"{part.n_tokens:,}"] for part in cell.by_lag]
    expect(page.get_by_text(re.compile("^weights 0, 1.* versions apart$"))).to_be_visible()


def test_a_trajectory_says_whether_to_train_on_it_and_why_not(make_page: MakePage) -> None:
    page = make_page().open("t/dense-0")
    verdict = page.get_by_role("region", name="Train on it?")
    expect(verdict.locator("strong").first).to_contain_text("train with correction")
    expect(verdict).to_contain_text("grammar_masked in step 0")
    expect(verdict).to_contain_text("grammar_masked set aside: ")
    expect(verdict.get_by_role("row").filter(has_text="unexplained")).to_contain_text("%")
    verdict.get_by_role("radio", name="observatory").check()
    expect(verdict.get_by_role("link", name="JSON").first).to_have_attribute(
        "href", re.compile("profile=observatory")
    )


def test_a_trajectory_can_be_taken_out(make_page: MakePage) -> None:
    page = make_page().open("t/moe-0")
    section = page.get_by_role("region", name="Take it out")
    files = section.get_by_label("Files for")
    options = files.locator("option").evaluate_all("all => all.map(o => o.value)")
    assert sorted(options) == sorted(get_args(FormatOption))
    files.select_option("verl")
    expect(section).to_contain_text("driftgate export -f verl --trajectory moe-0 -o run")


def test_the_scheme_can_be_chosen_and_stays(make_page: MakePage) -> None:
    watched = make_page(scheme="dark")
    page = watched.open()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.get_by_label("Colour scheme").select_option("light")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


def test_ten_thousand_tokens_stay_smooth(make_page: MakePage) -> None:
    watched = make_page()
    page = watched.open("t/long")
    expect(page.locator("[role=option]")).to_have_count(LONG_TOKENS)
    # From the click to the next frame: the bound is what a person calls stuck, not a figure.
    seconds = cast(
        float,
        page.evaluate(
            """async () => {
              const start = performance.now();
              document.querySelector('input[name=mode][value=entropy]').click();
              await new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)));
              return (performance.now() - start) / 1000;
            }"""
        ),
    )
    assert seconds < 3.0
    expect(page.locator("[data-i='0']")).to_have_class(re.compile(r"t q\d"))


def write(root: Path, name: str) -> None:
    writer = Writer(root)
    try:
        for trace in make_trajectory(name, steps=1, response=40):
            records: list[Any] = [make_intent(trace), trace, routed_score(trace, flips=2, seed=9)]
            for record in records:
                writer.submit(record).result(timeout=30)
    finally:
        writer.close()


def test_the_tail_follows_pauses_and_filters(make_page: MakePage, root: Path) -> None:
    page = make_page().open("live")
    expect(page.locator(".stream")).to_have_attribute("data-state", "live")
    write(root, "arrived-1")
    first = page.get_by_role("table").get_by_role("rowheader").first
    expect(first).to_have_text("arrived-1")
    page.get_by_role("button", name="Pause").click()
    write(root, "arrived-2")
    resume = page.get_by_role("button", name="Go on (1 new)")
    expect(resume).to_be_visible()
    expect(first).to_have_text("arrived-1")
    resume.click()
    expect(first).to_have_text("arrived-2")
    page.get_by_label("Filter").fill("arrived-1 yes")
    expect(page.get_by_role("table").get_by_role("rowheader")).to_have_text(["arrived-1"])
    page.get_by_label("Filter").fill("nothing-like-it")
    expect(page.get_by_text("No event fits the filter.")).to_be_visible()


def test_the_terminals_filter_is_the_pages(make_page: MakePage, url: str) -> None:
    raw = httpx.get(f"{url}/api/drift?after=0").text.splitlines()
    events = [msgspec.json.decode(line, type=DriftEvent) for line in raw]
    watched = make_page()
    watched.open("live")
    rows = watched.page.get_by_role("table").locator("tbody tr")
    counts = []
    for band in get_args(Colour):
        wanted = Wanted(band=band, kind="drift")
        named = [f"{e.score.trajectory} {e.score.step}" for e in events if wanted.fits(e)]
        watched.go(wanted.address("").removeprefix("/#/"))
        expect(watched.page.locator(".stream")).to_contain_text(f"{len(named)} event")
        shown = rows.evaluate_all(
            "all => all.map(r => r.cells[1].innerText + ' ' + r.cells[2].innerText)"
        )
        assert shown == named[::-1]
        counts.append(len(named))
    assert counts == sorted(set(counts), reverse=True)


def test_compare_says_where_two_runs_part(make_page: MakePage) -> None:
    page = make_page().open("compare")
    page.get_by_role("combobox", name=re.compile("^A")).select_option("t:moe-0")
    page.get_by_role("combobox", name=re.compile("^B")).select_option("t:moe-1")
    page.get_by_role("button", name="compare tokens of step 1").click()
    expect(page.get_by_text("other prompt; first other token at 0")).to_be_visible()


def test_two_builds_are_compared_on_the_same_prompts(make_page: MakePage, url: str) -> None:
    cells = msgspec.json.decode(httpx.get(f"{url}/api/cells").content, type=Cells).items
    builds = [
        f"c:{c.engine_digest}/{c.trainer_digest}/{c.model}/drift"
        for c in cells
        if (c.model, c.kind, c.trainer) == ("tiny-moe", "drift", TRAINER)
    ]
    a, b = sorted(builds, key=lambda name: OTHER_BUILD.digest in name)
    page = make_page().open(f"compare?{urlencode({'a': a, 'b': b})}")
    section = page.get_by_role("region", name="On the same prompts", exact=True)
    expect(section).to_contain_text("2 prompts with the same token ids on both sides")
    expect(section.get_by_role("link", name="other-build 1.0")).to_be_visible()
    expect(section).to_contain_text("40 of 40")
    assert violations(page) == []


def test_a_read_key_is_asked_for_and_sent(make_page: MakePage, locked_url: str) -> None:
    watched = make_page(at=f"{locked_url}/")
    watched.allowed = ("401", "403")
    page = watched.page
    page.goto(f"{locked_url}/#/live")
    expect(page.get_by_role("heading", name="Read key")).to_be_visible()
    assert violations(page) == []
    page.get_by_label("Key", exact=True).fill("wrong")
    page.get_by_role("button", name="Read").click()
    expect(page.get_by_text("The gateway refuses this key.")).to_be_visible()
    page.get_by_label("Key", exact=True).fill(READ_KEY)
    page.get_by_role("button", name="Read").click()
    expect(page.locator(".stream")).to_have_attribute("data-state", "live")
    expect(page.get_by_role("table").get_by_role("rowheader").first).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 1
    watched.allowed = ()
    for view in ("", "t/moe-3?step=2&choice=0&token=1", "compare?a=t:moe-0&b=t:moe-1"):
        expect(watched.go(view).get_by_role("alert")).to_have_count(0)
        assert READ_KEY not in page.url
    with page.expect_download() as download:
        watched.go("matrix").get_by_role("link", name="JSON").first.click()
    assert msgspec.json.decode(download.value.path().read_bytes(), type=Cells).items


def test_a_lost_gateway_is_said(make_page: MakePage) -> None:
    watched = make_page()
    watched.allowed = ("ERR_FAILED",)
    page = watched.open("matrix")
    page.route("**/api/**", lambda route: route.abort())
    page.get_by_role("link", name="Trajectories", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("The gateway does not answer.")
    page.unroute("**/api/**")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("table")).to_be_visible()

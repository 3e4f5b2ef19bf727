"""A report opened from a file in a real browser, and what is and is not written into it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from playwright.sync_api import expect
from typer.testing import CliRunner, Result

from driftgate.breaks import Broken, break_reason
from driftgate.cli import app
from driftgate.gateway.pages import page_files
from driftgate.gateway.report_page import one_file
from driftgate.gateway.report_text import without_text
from driftgate.storage import Reader
from driftgate.testing.stores import SLASHED, example_records, write_store
from driftgate.trace import Trace
from tests.web.axe import violations
from tests.web.conftest import PHONE, Watched

MakePage = Callable[..., Watched]

VIEWS = (
    "",
    "matrix",
    "trajectories",
    "t/moe-3?step=2&choice=0&token=1",
    "t/dense-0?step=1",
    "compare?a=t:moe-0&b=t:moe-1",
    "glossary",
)
FULL = 9


def run(folder: Path, *arguments: str | Path) -> Result:
    """``driftgate report``, on a thread of its own: the browser's driver has this one's loop."""
    command = ["report", "-o", str(folder), *map(str, arguments)]
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(CliRunner().invoke, app, command).result()


def written(folder: Path, *arguments: str | Path) -> str:
    """What it says."""
    result = run(folder, *arguments)
    assert result.exit_code == 0, result
    return str(result.stdout)


@pytest.fixture(scope="module")
def report(still: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of a report of the page's store."""
    folder = tmp_path_factory.mktemp("reports") / "of the page"
    said = written(folder, "--store", still, "--top", str(FULL))
    assert f"{FULL} of 12 in full" in said
    return f"{folder.as_uri()}/index.html"


def test_every_view_opens_from_a_file(make_page: MakePage, report: str) -> None:
    watched = make_page(scheme="dark", viewport=PHONE, at=report)
    found = {}
    watched.open()
    for view in VIEWS:
        page = watched.go(view)
        expect(page.get_by_role("alert")).to_have_count(0)
        if problems := violations(page):
            found[view] = problems
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], view
    assert found == {}


def test_it_is_walked_as_the_gateways_page(make_page: MakePage, report: str) -> None:
    page = make_page(at=report).open()
    expect(page.get_by_role("link", name="Live", exact=True)).to_have_count(0)
    expect(page.get_by_label("About this report")).to_contain_text(f"{FULL} of ")
    page.get_by_role("table").last.get_by_role("link").first.click()
    chosen = page.locator("[role=option][aria-selected=true]")
    expect(chosen).to_be_in_viewport()
    expect(page.get_by_role("table").filter(has_text="missed")).to_contain_text("of 4")
    with page.expect_download() as download:
        page.get_by_role("button", name="JSON behind this page").click()
    assert b'"moe-' in download.value.path().read_bytes()
    page.get_by_role("link", name="Trajectories", exact=True).click()
    page.get_by_label("Capture").select_option("false")
    expect(page.get_by_role("table").get_by_role("rowheader")).to_have_text(["gap"])
    page.get_by_role("link", name="Glossary").click()
    page.get_by_label("Find").fill("prime-rl mismatch_kl")
    expect(page.get_by_role("table").get_by_role("rowheader")).to_have_text(["kl_k3_rollout_train"])


def test_what_is_not_in_full_says_so(make_page: MakePage, report: str, still: Path) -> None:
    folder = Path(report.removeprefix("file://").replace("%20", " ")).parent
    in_full = set(
        re.findall(r"/api/trajectories/([\w-]+)\"", (folder / "data/base.js").read_text())
    )
    reader = Reader(still)
    names = {row.trajectory for row in reader.trajectories(limit=100)}
    reader.close()
    absent = min(names - in_full)
    page = make_page(at=report).open(f"t/{absent}")
    expect(page.get_by_role("alert").first).to_contain_text(
        f"This report does not hold that. It holds {FULL} of {len(names)} trajectories in full"
    )


def test_no_text_leaves_no_word_of_the_agents(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", example_records())
    with_text, without = tmp_path / "with", tmp_path / "without"
    written(with_text, "--store", store)
    assert "token ids" in written(without, "--store", store, "--no-text")

    def everything(folder: Path) -> str:
        return "".join(file.read_text() for file in sorted((folder / "data").iterdir()))

    traces = [record for record in example_records() if isinstance(record, Trace)]
    assert any(trace.meta.trajectory == SLASHED for trace in traces)
    for trace in traces[:3]:
        assert trace.response_ids is not None
        ids = ",".join(f'"token_id":{i}' for i in trace.response_ids[:1])
        said = [ids, *re.findall(r'"content":"((?:[^"\\]|\\.)+)"', trace.request.decode())]
        assert len(said) > 1
        for word in said:
            assert word in everything(with_text), word
            assert word not in everything(without), word
    assert '"token_id":null' in everything(without)
    assert not re.search(r'"token_id":\d|"prompt_ids":\[', everything(without))


def test_no_text_leaves_out_what_a_break_quotes() -> None:
    reason = break_reason("system_changed", "a line was `secret` and is `hidden`")
    broken = Broken(position=3, of=9, was="secret", now="hidden", reasons=[reason])
    told = json.dumps(without_text({"nodes": [msgspec.to_builtins(broken)]}))
    assert "system_changed" in told
    assert '"position": 3' in told
    assert "secret" not in told
    assert "hidden" not in told


def test_the_size_is_kept(still: Path, tmp_path: Path) -> None:
    said = written(tmp_path / "small", "--store", still, "--max-mb", "1")
    size = sum(file.stat().st_size for file in (tmp_path / "small").rglob("*.*"))
    assert size <= 1 << 20
    assert "did not fit into 1 MB (--max-mb): " in said


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", example_records())
    folder = tmp_path / "mine"
    for _ in range(2):
        written(folder, "--store", store)
    (folder / "data/base.js").unlink()
    assert "holds something that is no report" in str(run(folder, "--store", store).exception)
    assert {path.name for path in tmp_path.iterdir()} == {"store", "mine"}


def test_a_gateways_report_is_the_stores(url: str, root: Path, tmp_path: Path) -> None:
    written(tmp_path / "a", "--store", root, "--top", "2")
    written(tmp_path / "b", "--url", url, "--top", "2")
    steps = sorted(path.name for path in (tmp_path / "a/data").glob("*-*.js"))
    assert len(steps) == 8
    for folder in "ab":  # the gateway's engine is away, which is nothing of the store's
        said = (tmp_path / folder / "data/base.js").read_text()
        assert "capture_gaps" in said
        assert "engine_away" not in said
    for name in steps:
        assert (tmp_path / "a/data" / name).read_bytes() == (
            tmp_path / "b/data" / name
        ).read_bytes()


def test_every_module_of_the_page_is_in_the_one_file() -> None:
    page = one_file(page_files(), data="d.js")
    assert "/static/" not in page
    modules = dict(re.findall(r'"driftgate/([^"]+)": "data:text/javascript;base64,([^"]+)"', page))
    others = {"theme.js"}  # a classic script
    assert modules.keys() == {n for n in page_files() if n.endswith(".js")} - others
    for source in modules.values():
        text = base64.b64decode(source).decode()
        assert not re.search(r'\bfrom\s*"\.', text)
        imported = re.findall(r'\bfrom\s*"driftgate/([^"\s]+)"', text)
        assert set(imported) <= modules.keys()

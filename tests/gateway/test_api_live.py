"""The dashboard's questions and files, over a real store through the typed client."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from driftgate.client import Client
from driftgate.errors import FormatError, NotFoundError
from driftgate.gateway.api import ApiContext, add_api_routes
from driftgate.gateway.pages import POLICY, add_pages
from driftgate.glossary import METRICS
from driftgate.storage import Reader
from driftgate.testing.stores import SLASHED, example_records, write_store
from driftgate.testing.traces import make_intent, make_trace
from driftgate.trace import Score, Trace
from tests.web.stores import routed_score

Http = TestClient[web.Request, web.Application]


@pytest.fixture(scope="module")
def moved() -> tuple[Trace, Score]:
    """An answer whose first three tokens the trainer sent elsewhere in the last layer."""
    trace = make_trace(trajectory="moved", response=8, started_ns=time.time_ns())
    return trace, routed_score(trace, flips=3, seed=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, moved: tuple[Trace, Score]) -> Path:
    records = [*example_records(), make_intent(moved[0]), *moved]
    return write_store(tmp_path_factory.mktemp("store"), records)


@pytest.fixture
async def http(root: Path) -> AsyncIterator[Http]:
    reader, app = Reader(root), web.Application()
    context = ApiContext(reader=reader, submit=lambda _: None, mint=lambda _: ("", ""))  # type: ignore[arg-type, return-value]
    add_api_routes(app, context)
    add_pages(app)
    async with TestClient(TestServer(app)) as http:
        yield http
    reader.close()


@pytest.fixture
async def client(http: Http) -> AsyncIterator[Client]:
    async with Client(str(http.make_url("/"))) as client:
        yield client


async def test_overview_counts_what_is_there(client: Client) -> None:
    now = await client.overview()
    assert (now.trajectories, now.captured, now.scored, now.incomplete) == (3, 5, 4, 1)
    assert now.running == 1  # "moved", begun a moment ago
    assert now.steps_per_s == pytest.approx(1 / now.window_s)
    assert now.response_tokens_per_s == pytest.approx(8 / now.window_s)
    assert (now.open_calls, now.stale_calls, now.waiting) == (0, 1, 1)
    assert {"capture_gaps", "stale_calls", "worker_behind"} <= {a.code for a in now.alarms}
    assert {w.trajectory for w in now.worst} == {SLASHED, "moved"}
    assert [abs(w.worst.log_ratio or 0) for w in now.worst] == sorted(
        (abs(w.worst.log_ratio or 0) for w in now.worst), reverse=True
    )


async def test_series_hold_every_cell(client: Client) -> None:
    lines = (await client.series(points=10)).items
    cells = (await client.cells()).items
    assert {(x.engine_digest, x.trainer_digest, x.model, x.kind) for x in lines} == {
        (x.engine_digest, x.trainer_digest, x.model, x.kind) for x in cells
    }


async def test_routes_say_token_by_token_what_was_missed(
    client: Client, moved: tuple[Trace, Score]
) -> None:
    trace, score = moved
    assert trace.routes is not None
    assert score.routes is not None
    found = await client.step_routes("moved", 0, token=1)
    rollout, train = trace.routes[-8:], score.routes
    expected = [
        [len(set(a.tolist()) - set(b.tolist())) for a, b in zip(x, y, strict=True)]
        for x, y in zip(rollout, train, strict=True)
    ]
    assert found.missed == expected
    assert np.sum(expected[:3]) > 0
    assert np.sum(expected[3:]) == 0
    assert (found.k, found.layers, found.reason) == (4, [0, 1, 2, 3], None)
    assert found.token is not None
    assert found.token.rollout == rollout[1].tolist()
    assert found.token.train == train[1].tolist()


async def test_routes_that_cannot_be_compared_say_why(client: Client) -> None:
    assert (await client.step_routes("two", 0)).reason == "not scored yet"
    assert "past the last" in ((await client.step_routes("moved", 0, token=8)).reason or "")
    with pytest.raises(NotFoundError, match="choice 7"):
        await client.step_routes("moved", 0, choice=7)


def test_the_text_of_an_answer_is_read_alone(root: Path) -> None:
    reader = Reader(root)
    whole = reader.trace(next(t.meta.trace_id for t in reader.traces(SLASHED, 2)))
    text = reader.answer_text(whole.meta.trace_id)
    assert whole.prompt_ids is not None
    assert (text.meta, text.token_bytes) == (whole.meta, whole.token_bytes)
    assert text.prompt_len == len(whole.prompt_ids)
    np.testing.assert_array_equal(text.token_offsets, whole.token_offsets)
    with pytest.raises(NotFoundError):
        reader.answer_text("nothing")
    reader.close()


def test_the_text_needs_no_record_that_it_is_built_on(tmp_path: Path) -> None:
    base = make_trace(step=0, prompt=400)
    write_store(tmp_path, [base])
    write_store(tmp_path, [make_trace(step=1, base=base)])
    first, second = sorted((tmp_path / "segments").iterdir())
    first.unlink()
    reader = Reader(tmp_path)
    assert second.exists()
    assert reader.answer_text("t1-1.0").token_bytes
    with pytest.raises(FormatError):
        reader.trace("t1-1.0")
    reader.close()


async def test_the_glossary_names_every_metric(http: Http) -> None:
    async with http.get("/api/glossary") as response:
        assert set((await response.json())["metrics"]) == set(METRICS)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/static/app.js", "text/javascript"),
        ("/static/css/base.css", "text/css"),
        ("/static/favicon.svg", "image/svg+xml"),
        ("/static/vendor/preact/LICENSE.txt", "text/plain"),
    ],
)
async def test_files_have_their_type_a_policy_and_a_tag(http: Http, path: str, kind: str) -> None:
    async with http.get(path) as response:
        assert (response.status, response.content_type) == (200, kind)
        assert response.headers["content-security-policy"] == POLICY
        tag = response.headers["etag"]
    async with http.get(path, headers={"if-none-match": tag}) as response:
        assert (response.status, await response.read()) == (304, b"")
        assert response.headers["etag"] == tag


@pytest.mark.parametrize(
    "path", ["/static/", "/static/../app.py", "/static/%2e%2e/app.py", "/static/nothing.js"]
)
async def test_nothing_else_is_served(http: Http, path: str) -> None:
    async with http.get(path) as response:
        assert response.status == 404

"""The API over a real store: each answer against the records it was made from."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from driftgate.errors import StorageError
from driftgate.gateway.answers import Answers
from driftgate.gateway.api import ROUTES, ApiContext, add_api_routes
from driftgate.gateway.spread import Spread
from driftgate.mismatch import Bucket
from driftgate.storage import Reader, Record, Writer
from driftgate.testing.stores import BAD_TRAINER, SLASHED, example_records, write_store
from driftgate.testing.traces import ENGINE, TRAINER, make_score, make_trajectory
from driftgate.trace import Sampling, Score, Trace

Api = TestClient[web.Request, web.Application]
ONE = f"/api/trajectories/{quote(SLASHED, safe='')}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"), example_records())


@pytest.fixture
def reader(root: Path) -> Iterator[Reader]:
    reader = Reader(root)
    yield reader
    reader.close()


def refuse(record: Record) -> Future[None]:
    raise StorageError("the queue is full")


@pytest.fixture
async def api(reader: Reader) -> AsyncIterator[Api]:
    app = web.Application()
    context = ApiContext(
        reader=reader, submit=refuse, mint=lambda name: (name or "t new/1", "dg-key")
    )
    add_api_routes(app, context)
    async with TestClient(TestServer(app)) as client:
        yield client


async def get(api: Api, path: str, status: int = 200) -> Any:
    async with api.get(path) as response:
        assert response.status == status, await response.text()
        assert response.content_type == "application/json"
        return await response.json()


def records(kind: type[Any]) -> list[Any]:
    return [record for record in example_records() if isinstance(record, kind)]


async def test_lists_newest_first_and_pages(api: Api) -> None:
    first = await get(api, "/api/trajectories?limit=1")
    second = await get(api, f"/api/trajectories?limit=1&before={quote(first['next'])}")
    names = [page["items"][0]["trajectory"] for page in (first, second)]
    assert sorted(names) == sorted([SLASHED, "two"])
    assert second["next"] is None


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("complete=true", [SLASHED]),
        ("complete=0", ["two"]),
        ("scored=1", [SLASHED]),
        ("model=tiny-moe&scored=false", ["two"]),
        ("model=other", []),
    ],
)
async def test_filters(api: Api, query: str, names: list[str]) -> None:
    page = await get(api, f"/api/trajectories?{query}")
    assert [item["trajectory"] for item in page["items"]] == names


async def test_a_trajectory_lists_steps_scores_gaps_and_reward(api: Api) -> None:
    detail = await get(api, ONE)
    assert detail["reward"]["value"] == 0.5
    assert [step["step"] for step in detail["steps"]] == [0, 1, 2]
    first = detail["steps"][0]
    assert first["calls"][0]["state"] == "done"
    assert {s["trainer"]["dtype"] for s in first["choices"][0]["scores"]} == {"float32", "bfloat16"}


async def test_gaps_are_named(api: Api) -> None:
    detail = await get(api, "/api/trajectories/two")
    assert not detail["trajectory"]["complete"]
    assert any("routed_experts: not asked for" in gap for gap in detail["trajectory"]["gaps"])
    assert detail["steps"][1]["calls"][0]["state"] == "open"


async def test_a_step_gives_every_token_with_both_sides(api: Api) -> None:
    trace, score = records(Trace)[1], records(Score)[1]
    (choice,) = (await get(api, f"{ONE}/steps/1"))["choices"]
    assert choice["request"] == json.loads(trace.request)
    assert choice["prompt_ids"] == trace.prompt_ids.tolist()
    tokens = choice["tokens"]
    assert [t["rollout_logprob"] for t in tokens] == trace.logprobs.tolist()
    assert [t["train_logprob"] for t in tokens] == score.logprobs.tolist()
    assert [t["position"] for t in tokens] == [len(trace.prompt_ids) + j for j in range(5)]
    assert "".join(t["text"] for t in tokens).encode() == trace.token_bytes
    expected = score.logprobs.astype(np.float64) - trace.logprobs
    assert [t["log_ratio"] for t in tokens] == expected.tolist()


async def test_routes_come_on_request_only(api: Api) -> None:
    brief = (await get(api, f"{ONE}/steps/2"))["choices"][0]["routes"]
    full = (await get(api, f"{ONE}/steps/2?routes=1"))["choices"][0]["routes"]
    routes = records(Trace)[2].routes
    assert brief == {"shape": list(routes.shape), "dtype": "uint8", "npy_base64": None}
    loaded = np.load(io.BytesIO(base64.b64decode(full["npy_base64"])), allow_pickle=False)
    np.testing.assert_array_equal(loaded, routes)


async def test_mismatch_never_mixes_trainers(api: Api) -> None:
    found = await get(api, f"{ONE}/mismatch")
    assert found["capture"] == "COMPLETE"
    assert {cell["whole"]["trainer_digest"]: len(cell["steps"]) for cell in found["cells"]} == {
        TRAINER.digest: 3,
        BAD_TRAINER.digest: 1,
    }
    coverage = {"captured": 3, "scorable": 3, "scored": 3, "missing": 0, "open": 0}
    assert found["coverage"] == coverage


async def test_mismatch_metrics_are_those_of_the_merged_buckets(api: Api) -> None:
    found = await get(api, f"{ONE}/mismatch?trainer={TRAINER.digest}")
    bucket = Bucket()
    for score in records(Score)[:3]:
        bucket = bucket.merge(score.meta.bucket)
    whole = found["cells"][0]["whole"]
    assert whole["measures"] == {"metrics": bucket.metrics(), "undefined": bucket.undefined()}


async def test_numbers_that_are_not_comparable_are_evidence_not_drift(api: Api) -> None:
    found = await get(api, f"{ONE}/mismatch?trainer={BAD_TRAINER.digest}")
    whole = found["cells"][0]["whole"]
    assert whole["measures"] is None
    assert whole["all_measures"]["metrics"]["n_tokens"] == 5
    assert whole["comparable"] == {"no": 1}
    assert [(r["code"], r["scores"]) for r in whole["reasons"]] == [("precision_differs", 1)]
    assert found["coverage"]["scored"] == 1


async def test_the_worst_token_stands_in_its_text(api: Api) -> None:
    found = await get(api, f"{ONE}/mismatch?trainer={TRAINER.digest}&tokens=1")
    worst = found["cells"][0]["whole"]["worst"]
    step = found["cells"][0]["steps"][worst["step"]]
    tokens = step["tokens"]
    biggest = max(
        (t for s in found["cells"][0]["steps"] for t in s["tokens"]),
        key=lambda t: abs(t["log_ratio"]),
    )
    assert worst["log_ratio"] == biggest["log_ratio"]
    assert worst["position"] == biggest["position"]
    whole = worst["before"] + worst["text"] + worst["after"]
    assert whole == "".join(token["text"] for token in tokens)


async def test_the_matrix_has_a_cell_for_each_pair_and_kind(api: Api) -> None:
    cells = (await get(api, "/api/cells"))["items"]
    assert len(cells) == 3
    drift = next(c for c in cells if c["trainer_digest"] == TRAINER.digest)
    assert (drift["scored"], drift["captured"]) == (3, 4)
    assert drift["few"]
    assert [floor["side"] for floor in drift["floors"]] == ["engine"]
    assert drift["floors"][0]["measures"]["metrics"]["abs_log_ratio_max"] == 0.0
    assert drift["engine_digest"] == ENGINE.digest


async def test_a_cell_passes_for_a_whole_only_when_it_is_one(tmp_path: Path) -> None:
    traces = list(make_trajectory(steps=3, response=20))
    for scored in (2, 3):
        scores = (make_score(trace, seed=n) for n, trace in enumerate(traces[:scored]))
        reader = Reader(write_store(tmp_path / str(scored), [*traces, *scores]))
        app = web.Application()
        add_api_routes(
            app, ApiContext(reader=reader, submit=refuse, mint=lambda name: (name or "", ""))
        )
        async with TestClient(TestServer(app)) as api:
            (cell,) = (await get(api, "/api/cells"))["items"]
        reader.close()
        assert (cell["scored"], cell["captured"]) == (scored, 3)
        assert cell["partial"] is (scored < 3)
        assert cell["n_tokens"] == 20 * scored


def short_answers(*, d: float, runs: int = 4, **meta: Any) -> Iterator[Record]:
    """Runs of two short answers each, whose log ratios are all ``d``: too few tokens to test."""
    for run in range(runs):
        for trace in make_trajectory(f"{meta['sampling']}-{run}", steps=2, response=60):
            rollout = np.linspace(-3, -0.1, 60)
            yield trace
            yield make_score(trace, bucket=Bucket.of(rollout + d, rollout), **meta)


async def test_a_cell_that_fails_as_a_whole_says_so_everywhere(tmp_path: Path) -> None:
    good, bad = Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=1.0)
    store = [*short_answers(d=-0.2, sampling=bad), *short_answers(d=0.001, sampling=good)]
    reader = Reader(write_store(tmp_path, store))
    answers = Answers(reader)
    (cell,) = answers.cells().items
    assert (cell.verdict, cell.comparable) == ("yes", {"yes": 16})
    slope, finding = cell.findings
    assert (slope.code, finding.code) == ("logodds_slope_off", "not_sampling_density")
    assert finding.detail.startswith("temperature=1.0, top_p=1.0 @ T = 1: mean e^D - 1 = -0.18")
    assert cell.measures is not None
    assert cell.measures.metrics["log_ratio_mean"] == pytest.approx(0.001)
    interval = cell.intervals["log_ratio_mean"]
    assert [interval.low, interval.high] == pytest.approx([0.001, 0.001])
    whole = answers.mismatch(f"{bad}-0").cells[0].whole  # 120 tokens: only the cell can tell
    assert (whole.verdict, whole.measures) == ("no", None)
    assert any("in the whole cell" in reason.detail for reason in whole.findings)
    assert answers.mismatch(f"{good}-0").cells[0].whole.verdict == "yes"
    reader.close()


def test_an_interval_is_of_all_trajectories_as_its_headline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drift of .01 in the first 40 runs, and of .05 in the 20 after them."""
    monkeypatch.setattr("driftgate.gateway.spread.MAX_GROUPS", 20)
    store: list[Record] = []
    for at in range(60):
        for trace in make_trajectory(f"run-{at}", steps=2, response=20, routed=False):
            store += [trace, make_score(trace, noise=0.01 if at < 40 else 0.05, seed=at)]
    reader = Reader(write_store(tmp_path, store))
    (row,) = reader.cells()
    found = Spread(reader).intervals(row)
    reader.close()
    assert row.comparable_bucket is not None
    for name in ("abs_log_ratio_mean", "kl_k3_rollout_train"):
        value = row.comparable_bucket.metrics()[name]
        assert value is not None
        assert found[name].low < value < found[name].high


async def test_minting_gives_a_base_url_with_the_encoded_name(api: Api) -> None:
    async with api.post("/api/trajectories") as response:
        minted = await response.json()
    assert minted == {
        "trajectory": "t new/1",
        "key": "dg-key",
        "base_url": f"http://127.0.0.1:{api.port}/t/t%20new%2F1/v1",
    }


async def test_a_reward_is_readable_when_its_answer_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(tmp_path, example_records())
    writer, reader, app = Writer(tmp_path), Reader(tmp_path), web.Application()
    context = ApiContext(reader=reader, submit=writer.submit, mint=lambda name: ("", ""))
    add_api_routes(app, context)
    async with TestClient(TestServer(app)) as api:
        body = {"value": -1.5, "source": "me"}
        async with api.post("/api/trajectories/two/reward", json=body) as response:
            assert response.status == 200
        reward = reader.reward("two")
        assert reward is not None
        assert (reward.value, reward.source) == (-1.5, "me")
        monkeypatch.setattr(time, "time_ns", lambda: 1)  # the clock was set back
        async with api.post("/api/trajectories/two/reward", json={"value": 2.0}):
            again = reader.reward("two")
        assert again is not None
        assert (again.value, again.given_ns) == (2.0, reward.given_ns + 1)
    writer.close()
    reader.close()


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/api/trajectories/none", 404, "none"),
        ("/api/trajectories/two/steps/9", 404, "step 9"),
        ("/api/trajectories/two/steps/x", 400, "'x'"),
        ("/api/trajectories?limit=0", 400, "limit"),
        ("/api/trajectories?limit=9999", 400, "limit"),
        ("/api/trajectories?color=red", 400, "color"),
        ("/api/trajectories?model=a&model=b", 400, "model"),
        ("/api/trajectories?limit=1e2", 400, "limit"),
        ("/api/trajectories/two/steps/0/routes?token=null", 400, "token"),
        ("/api/trajectories/two/steps/0/routes?token=1.0", 400, "token"),
        ("/api/drift?after=soon", 400, "after"),
        ("/api/drift?after=99", 400, "99"),
        ("/api/nothing", 404, "openapi"),
    ],
)
async def test_errors_say_what_and_how_to_mend_it(
    api: Api, path: str, status: int, said: str
) -> None:
    error = (await get(api, path, status))["error"]
    assert said in error["message"]
    assert error["fix"]
    assert error["code"] == {400: "bad_request", 404: "not_found"}[status]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b'{"value": "x"}', 400),
        (b'{"value": 1e999}', 400),
        (b'{"value": 1, "extra": 2}', 400),
        (b'{"value": 1}', 503),
    ],
)
async def test_a_reward_that_cannot_be_taken(api: Api, body: bytes, status: int) -> None:
    async with api.post(f"{ONE}/reward", data=body) as response:
        assert response.status == status
        assert (await response.json())["error"]["message"]


async def test_every_route_is_in_the_document(api: Api) -> None:
    document = await get(api, "/api/openapi.json")
    for route in ROUTES:
        operation = document["paths"][route.path][route.method.lower()]
        assert operation["summary"]
        assert len({p["name"] for p in operation["parameters"]}) == len(operation["parameters"])


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ("/api/trajectories", "/api/trajectories"),
        ("/api/trajectories/{trajectory}", ONE),
        ("/api/trajectories/{trajectory}/steps/{step}", f"{ONE}/steps/0?routes=1"),
        ("/api/trajectories/{trajectory}/mismatch", f"{ONE}/mismatch?tokens=1"),
        ("/api/cells", "/api/cells"),
    ],
)
async def test_answers_fit_the_schema(api: Api, template: str, path: str) -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    document = await get(api, "/api/openapi.json")
    answers = document["paths"][template]["get"]["responses"]["200"]["content"]
    schema = answers["application/json"]["schema"] | {"components": document["components"]}
    validator.check_schema(schema)
    validator(schema).validate(await get(api, path))


@pytest.mark.parametrize(
    "path", ["/api/trajectories", ONE, f"{ONE}/steps/0", f"{ONE}/mismatch", "/api/cells"]
)
async def test_answers_decode_strictly_into_their_views(api: Api, path: str) -> None:
    route = next(
        route
        for route in ROUTES
        if route.method == "GET"
        and route.path.count("/") == path.count("/")
        and route.path.rpartition("/")[2] in (path.rpartition("/")[2], "{trajectory}", "{step}")
    )
    body = msgspec.json.encode(await get(api, path))
    view = msgspec.json.decode(body, type=route.answer)
    assert msgspec.json.decode(msgspec.json.encode(view)) == msgspec.json.decode(body)

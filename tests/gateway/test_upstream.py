"""How often an engine is probed, what calls wait for, and what is said where it is not known."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from driftgate.errors import UpstreamError
from driftgate.gateway import checkpoints
from driftgate.gateway import upstream as module
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.metrics import Metrics
from driftgate.gateway.probe import ModelInfo, ProbeReport, probe
from driftgate.gateway.upstream import Upstream
from driftgate.storage import WriterStats

REPORT = ProbeReport(
    url="http://e:1",
    engine="vllm",
    version="1",
    models=[ModelInfo(id="tiny")],
    model="tiny",
    system_fingerprint="A",
    routes=True,
)


class Probes:
    """Stands in for ``probe``."""

    def __init__(self) -> None:
        self.report = REPORT
        self.error: Exception | None = None
        self.hold: asyncio.Event | None = None
        self.made = 0

    async def __call__(self, url: str, **_: object) -> ProbeReport:
        self.made += 1
        if self.hold is not None:
            await self.hold.wait()
        if self.error is not None:
            raise self.error
        return self.report


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> Probes:
    probes = Probes()
    monkeypatch.setattr(module, "probe", probes)
    return probes


@asynccontextmanager
async def watched() -> AsyncIterator[Upstream]:
    config = GatewayConfig(upstream="http://e:1")
    upstream = Upstream(config, Metrics(WriterStats))
    watching = asyncio.create_task(upstream.watch())
    try:
        yield upstream
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def until(true: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if true():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never was")


async def test_each_new_fingerprint_is_probed_once(
    probes: Probes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REPROBE_INTERVAL_S", 0.0)
    async with watched() as upstream:
        await upstream.ready()
        for _ in range(20):  # two replicas behind one address
            upstream.engine("tiny", "A")
            upstream.engine("tiny", "B")
        await until(lambda: probes.made == 2)
        for _ in range(20):
            upstream.engine("tiny", "A")
            upstream.engine("tiny", "B")
        upstream.engine("tiny", "C")
        await until(lambda: probes.made == 3)


async def test_further_probes_keep_their_distance(probes: Probes) -> None:
    async with watched() as upstream:
        await upstream.ready()
        upstream.engine("tiny", "B")
        await until(lambda: probes.made == 2)
        await until(lambda: upstream._wanted.is_set() is False)
        for name in range(20):  # an engine whose fingerprint is another one each time
            upstream.engine("tiny", str(name))
            upstream.lost()
            await asyncio.sleep(0.001)
        assert probes.made == 2


async def test_the_first_calls_share_one_probe(probes: Probes) -> None:
    async with watched() as upstream:
        await asyncio.gather(*(upstream.ready() for _ in range(5)))
        await asyncio.gather(*(upstream.ready() for _ in range(5)))
        assert probes.made == 1


async def test_an_engine_that_is_away_is_probed_by_each_call(probes: Probes) -> None:
    probes.error = UpstreamError("no engine answers")
    async with watched() as upstream:
        await upstream.ready()
        assert upstream.error == "no engine answers"
        probes.error = None
        await upstream.ready()
        assert upstream.error is None


async def test_a_bug_in_the_probe_is_not_the_last_one(
    probes: Probes, caplog: pytest.LogCaptureFixture
) -> None:
    probes.error = TypeError("a bug")
    async with watched() as upstream:
        await upstream.ready()
        assert upstream.error == "probing it failed: TypeError"
        probes.error = None
        await upstream.ready()
        assert upstream.error is None
    assert "probing http://e:1 failed; it is tried again" in caplog.text


async def test_a_connection_that_broke_makes_no_call_wait(probes: Probes) -> None:
    async with watched() as upstream:
        await upstream.ready()
        probes.hold = asyncio.Event()
        upstream._returned(False)
        await until(lambda: probes.made == 2)
        await upstream.ready()  # the probe is under way
        assert (upstream.available, upstream.engine("tiny", None).version) == (True, "1")
        probes.report = msgspec.structs.replace(REPORT, version="2")
        probes.hold.set()
        await until(lambda: upstream.engine("tiny", None).version == "2")


async def test_an_engine_that_was_away_is_waited_for(probes: Probes) -> None:
    async with watched() as upstream:
        await upstream.ready()
        upstream.lost()  # so that the next probe would have to keep its distance
        await until(lambda: probes.made == 2)
        upstream.lost()
        await until(upstream._wanted.is_set)
        probes.report = msgspec.structs.replace(REPORT, version="2")
        upstream._returned(True)
        await upstream.ready()
        assert upstream.engine("tiny", None).version == "2"


async def test_an_engine_that_is_well_and_cannot_be_probed_stays_known(probes: Probes) -> None:
    async with watched() as upstream:
        await upstream.ready()
        probes.error = UpstreamError("no answer within a minute")
        upstream.lost()
        await until(lambda: probes.made == 2)
        await upstream.ready()
        assert upstream.available
        upstream.health.failed("its /health did not answer")
        upstream._returned(True)
        await until(lambda: upstream.error == "no answer within a minute")


async def test_an_engine_that_tells_nothing_now_stays_known(
    probes: Probes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REPROBE_INTERVAL_S", 0.0)
    async with watched() as upstream:
        await upstream.ready()
        probes.report = msgspec.structs.replace(REPORT, answered=False, routes=False)
        upstream.lost()
        await until(lambda: probes.made >= 3)  # it is asked again by itself
        assert (upstream.available, upstream.has_routes) == (True, True)


# The digest of the weights.


@pytest.fixture
def weights(probes: Probes, tmp_path: Path) -> Path:
    """A served model whose directory is readable here."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    models = [ModelInfo(id="tiny", root=str(tmp_path))]
    probes.report = msgspec.structs.replace(REPORT, models=models)
    return tmp_path


class Digest:
    """Stands in for ``checkpoint_digest``; takes until it is allowed to end."""

    def __init__(self) -> None:
        self.made = 0
        self.may_end = threading.Event()

    def __call__(self, root: str) -> str:
        self.made += 1
        assert self.may_end.wait(10)
        return f"digest {self.made}"


@pytest.fixture
def digest(monkeypatch: pytest.MonkeyPatch) -> Digest:
    digest = Digest()
    monkeypatch.setattr(checkpoints, "checkpoint_digest", digest)
    return digest


async def test_a_slow_digest_never_costs_the_rest_of_the_report(
    weights: Path, digest: Digest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_PROBE_WAIT_S", 0.05)
    async with watched() as upstream:
        await upstream.ready()
        before = upstream.engine("tiny", None)
        assert (before.name, before.version, before.checkpoint) == ("vllm", "1", None)
        loop = asyncio.get_running_loop()
        started = loop.time()
        for _ in range(20):  # the wait is over: further calls do not wait again
            await upstream.ready()
        assert loop.time() - started < 0.9  # waiting again would take 20 x 0.05 s
        digest.may_end.set()
        await until(upstream._digested.is_set)
        assert upstream.engine("tiny", None).checkpoint == "digest 1"
        assert upstream.report is not None
        assert upstream.report.checkpoint == "digest 1"


async def test_the_first_calls_wait_for_a_quick_digest(weights: Path, digest: Digest) -> None:
    async with watched() as upstream:
        waiting = asyncio.create_task(upstream.ready())
        await until(lambda: digest.made == 1)
        assert not waiting.done()
        digest.may_end.set()
        await waiting
        assert upstream.engine("tiny", None).checkpoint == "digest 1"


async def test_weights_are_read_again_only_where_their_files_changed(
    weights: Path, digest: Digest, probes: Probes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REPROBE_INTERVAL_S", 0.0)
    digest.may_end.set()
    async with watched() as upstream:
        await upstream.ready()
        upstream.engine("tiny", "B")
        await until(lambda: probes.made == 2)
        await until(upstream._digested.is_set)
        assert (digest.made, upstream.engine("tiny", "B").checkpoint) == (1, "digest 1")
        os.utime(weights / "model.safetensors", ns=(1, 1))
        upstream.engine("tiny", "C")
        await until(lambda: upstream.engine("tiny", "C").checkpoint == "digest 2")


# What is not known.


async def test_whether_there_are_routes_is_not_known_before_an_answer(probes: Probes) -> None:
    config = GatewayConfig(upstream="http://e:1")
    assert Upstream(config, Metrics(WriterStats)).has_routes is None
    for answered, routes, expected in (
        (True, True, True),
        (True, False, False),
        (False, False, None),
    ):
        probes.report = msgspec.structs.replace(REPORT, answered=answered, routes=routes)
        async with watched() as upstream:
            await upstream.ready()
            assert upstream.has_routes is expected


@asynccontextmanager
async def serving(chat: Callable[[dict[str, Any]], web.Response]) -> AsyncIterator[str]:
    """An engine with this chat endpoint."""

    async def models(_request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})

    async def answer(request: web.Request) -> web.Response:
        return chat(await request.json())

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", answer)
    async with TestServer(app) as server:
        yield str(server.make_url("/"))


async def test_an_engine_that_refuses_what_capture_needs_says_so() -> None:
    def chat(body: dict[str, Any]) -> web.Response:
        if "logprobs" in body or "return_token_ids" in body:
            return web.json_response({"error": "logprobs are not supported"}, status=400)
        return web.json_response({"choices": []})

    async with serving(chat) as url:
        report = await probe(url)
    assert report.refusal is not None
    assert "logprobs are not supported" in report.refusal
    assert not report.answered


@pytest.mark.parametrize("status", [401, 500])
async def test_an_engine_that_refuses_everything_refuses_not_just_capture(status: int) -> None:
    async with serving(lambda _: web.json_response({"error": "no"}, status=status)) as url:
        report = await probe(url)
    assert report.refusal is None
    assert not report.answered

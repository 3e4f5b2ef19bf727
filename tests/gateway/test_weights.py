"""Which policy each token was sampled under: told, looked up, changed in the middle, paused."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from driftgate.adapters.export_select import Selection
from driftgate.client import Client
from driftgate.errors import RequestError
from driftgate.gateway import health
from driftgate.gateway.weights import CUT_INTERVAL_NS, Mark, Weights
from driftgate.trace import Trace, WeightSpan
from driftgate.weights import changed, joined, merged
from tests.gateway.conftest import Agent, StandIn
from tests.gateway.test_upstream import until

Connect = Callable[..., Any]

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
STREAM = CHAT | {"stream": True}


def started(trace: Trace) -> int:
    return trace.meta.started_ns


def spans(weights: Weights, *marks: Mark, start: int, end: int, tokens: int = 10) -> list[Any]:
    found = weights.spans(list(marks), choice=0, tokens=tokens, start_ns=start, end_ns=end)
    return [(span.first, span.version) for span in found]


# The log by itself.


def test_a_told_version_holds_until_the_next() -> None:
    weights = Weights("unknown")
    assert spans(weights, start=1, end=9) == [(0, "unknown")]
    weights.tell("41", 10, 10)
    weights.tell("42", 20, 20)
    assert spans(weights, start=10, end=19) == [(0, "41")]
    assert spans(weights, start=20, end=10**18) == [(0, "42")]
    assert spans(weights, start=5, end=25) == [(0, changed(["unknown", "41", "42"]))]


def test_a_stream_is_cut_where_the_change_was_seen() -> None:
    weights = Weights("41")
    weights.tell("42", 20, 20)
    assert spans(weights, Mark(18, 20, {0: 4}), start=10, end=30) == [(0, "41"), (4, "42")]
    late = Weights("41")
    late.tell("42", 15, 20)  # told 5 ns late: of what came meanwhile nobody knows
    assert spans(late, Mark(18, 20, {0: 4}), start=10, end=30) == [
        (0, changed(["41", "42"])),
        (4, "42"),
    ]
    assert spans(late, Mark(18, 20, {0: 4}), start=16, end=30) == [(0, "42")]


def test_between_two_looks_that_differ_the_version_is_unknown() -> None:
    weights = Weights("unknown")
    weights.look("1", 10, 11)
    weights.look("1", 20, 21)
    assert spans(weights, start=12, end=20) == [(0, "1")]
    assert spans(weights, start=12, end=25) == [(0, changed(["1", "unknown"]))]
    weights.look("2", 30, 31)
    weights.look("2", 40, 41)
    assert spans(weights, start=12, end=19) == [(0, "1")]
    assert spans(weights, start=22, end=29) == [(0, "unknown")]
    assert spans(weights, start=31, end=40) == [(0, "2")]


def test_a_look_that_was_overtaken_says_nothing() -> None:
    weights = Weights("unknown")
    weights.look("2", 20, 25)
    weights.look("1", 10, 30)
    assert weights.version == "2"


def test_looks_that_agree_cut_a_stream_now_and_then() -> None:
    weights = Weights("1")
    weights.look("1", 0, 0)
    before = weights.serial
    weights.look("1", 1, 1)
    assert weights.serial == before
    weights.look("1", 1, CUT_INTERVAL_NS + 1)
    assert weights.serial == before + 1


def test_what_was_told_is_not_unsaid() -> None:
    weights = Weights("unknown")
    weights.tell("41", 10, 10)
    with pytest.raises(RequestError, match="before version 41"):
        weights.check("42", 9, 20)
    with pytest.raises(RequestError, match="ahead"):
        weights.check("42", 21, 20)
    weights.look("7", 30, 30)
    assert weights.version == "41"


def test_nothing_is_told_of_answers_that_carry_another_version() -> None:
    weights = Weights("unknown")
    weights.gave(9)
    weights.check("41", 5, 20)  # they say that nobody knows
    weights.tell("41", 10, 10)
    weights.gave(30)
    with pytest.raises(RequestError, match=r"before 30, when the last answer .* and 41 was"):
        weights.check("42", 29, 40)
    weights.check("41", 29, 40)
    weights.check("42", 30, 40)


def test_what_was_told_of_an_engine_that_was_away_is_lost() -> None:
    weights = Weights("0")
    assert not weights.lose(5, 6, "it was away")
    assert weights.version == "0"  # of a fresh engine, as configured
    weights.tell("42", 10, 10)
    assert weights.lose(20, 30, "it was away")
    assert (weights.version, weights.lost) == ("unknown", "it was away")
    assert spans(weights, start=11, end=19) == [(0, "42")]
    assert spans(weights, start=21, end=99) == [(0, "unknown")]
    weights.look(weights.unset, 40, 41)
    assert spans(weights, start=42, end=43) == [(0, "unknown")]
    weights.look("7", 50, 51)
    assert (weights.version, weights.lost) == ("7", None)
    weights.tell("43", 60, 60)
    assert (spans(weights, start=61, end=99), weights.lost) == ([(0, "43")], None)


@pytest.mark.parametrize(
    ("given", "tokens", "expected"),
    [
        ([(0, "1"), (3, "1")], 9, [(0, "1")]),
        ([(0, "1"), (0, "2")], 9, [(0, "2")]),
        ([(0, "1"), (9, "2")], 9, [(0, "1")]),
        ([(0, "1"), (3, "2"), (3, "3"), (4, "2")], 9, [(0, "1"), (3, "3"), (4, "2")]),
        ([(0, "1")], 0, [(0, "1")]),
    ],
)
def test_spans_are_as_few_as_can_be(
    given: list[tuple[int, str]], tokens: int, expected: list[tuple[int, str]]
) -> None:
    found = merged([WeightSpan(*span) for span in given], tokens)
    assert [(span.first, span.version) for span in found] == expected


# Through the gateway.


async def tell(agent: Agent, **said: Any) -> Any:
    async with agent.http.post(agent.url + "/api/weights", json=said) as answer:
        return answer.status, await answer.json()


async def test_a_version_is_told_and_stands_in_every_trace(agent: Agent) -> None:
    await agent.send(CHAT)
    status, body = await tell(agent, version="42")
    assert (status, body["engines"][0]["weight_version"]) == (200, "42")
    await agent.send(CHAT)
    await agent.send(STREAM)
    versions = [(t.meta.weight_version, t.meta.weight_spans) for t in await agent.traces()]
    assert sorted(versions) == [
        ("42", [WeightSpan(0, "42")]),
        ("42", [WeightSpan(0, "42")]),
        ("unknown", [WeightSpan(0, "unknown")]),
    ]


async def test_a_change_in_the_middle_of_a_stream_is_placed(
    connect: Connect, engine: StandIn
) -> None:
    agent: Agent = await connect(weight_version="41")
    engine.hold, engine.hold_at = asyncio.Event(), 3
    url = agent.url + "/v1/chat/completions"
    async with agent.http.post(url, json=STREAM) as answer:
        for _ in range(3):  # the role, and two tokens
            await answer.content.readuntil(b"\n\n")
        await tell(agent, version="42")
        engine.hold.set()
        await answer.read()
    (trace,) = await agent.traces()
    assert trace.response_ids is not None
    assert len(trace.response_ids) == 5
    assert trace.meta.weight_spans == [WeightSpan(0, "41"), WeightSpan(2, "42")]
    assert trace.meta.weight_version == "41+42"


async def test_of_an_answer_in_one_piece_only_the_change_is_known(
    connect: Connect, engine: StandIn
) -> None:
    agent: Agent = await connect(weight_version="41")
    engine.hold = asyncio.Event()
    calling = asyncio.create_task(agent.send(CHAT))
    await engine.came.wait()
    await tell(agent, version="42")
    engine.hold.set()
    assert (await calling)[0] == 200
    (trace,) = await agent.traces()
    assert trace.meta.weight_spans == [WeightSpan(0, changed(["41", "42"]))]
    assert trace.meta.weight_version == joined(trace.meta.weight_spans)


async def test_the_engine_tells_its_version(
    connect: Connect, engine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "INTERVAL_S", 0.01)
    engine.weight_version = "7"
    agent: Agent = await connect()
    upstream = agent.gateway.upstreams.all[0]
    await until(lambda: upstream.weights.version == "7")
    await agent.send(CHAT)
    engine.weight_version = "8"
    await agent.send(CHAT)  # the last look before it found 7: it may not say so
    await agent.send(CHAT)
    traces = sorted(await agent.traces(), key=lambda trace: trace.meta.started_ns)
    first, second, third = (trace.meta.weight_version for trace in traces)
    assert (first, third) == ("7", "8")
    assert second == "8" or "unknown" in second
    await tell(agent, version="9")
    assert upstream.weights.version == "9"  # a trainer's word counts more


async def test_a_version_that_comes_too_late_is_refused(agent: Agent) -> None:
    await tell(agent, version="41")
    in_place_ns = time.time_ns()
    await agent.send(CHAT)
    status, body = await tell(agent, version="42", from_ns=in_place_ns)
    assert (status, "leave from_ns out" in json.dumps(body)) == (400, True)
    await tell(agent, pause=True)
    in_place_ns = time.time_ns()
    status, body = await tell(agent, version="42", from_ns=in_place_ns, resume=True)
    assert (status, body["engines"][0]["weights_from_ns"]) == (200, in_place_ns)


@pytest.mark.parametrize("same_build", [True, False])
async def test_an_engine_that_comes_back_has_no_version_until_one_is_told(
    connect: Connect, engine: StandIn, monkeypatch: pytest.MonkeyPatch, same_build: bool
) -> None:
    monkeypatch.setattr(health, "INTERVAL_S", 0.01)
    monkeypatch.setattr(health, "FIRST_BACKOFF_S", 0.01)
    agent: Agent = await connect(weight_version="0")
    upstream = agent.gateway.upstreams.all[0]
    await agent.send(CHAT)
    await tell(agent, version="42")
    await agent.send(CHAT)
    await agent.flush()
    if same_build:
        engine.status = 503
        await until(lambda: not upstream.available)
        engine.status = None
        await until(lambda: upstream.available)
    else:
        engine.fingerprint = "vllm-0.29.0-restarted"
    await agent.send(CHAT)
    await agent.flush()
    async with agent.http.get(agent.url + "/api/weights") as answer:
        said = (await answer.json())["engines"][0]
    assert said["weight_version"] == "unknown"
    assert ("/health answered 503" if same_build else "is new") in said["weights_lost"]
    _, body = await tell(agent, version="43")
    assert body["engines"][0]["weights_lost"] is None
    await agent.send(CHAT)
    versions = [t.meta.weight_version for t in sorted(await agent.traces(), key=started)]
    assert (versions[:2], versions[3]) == (["0", "42"], "43")
    assert "unknown" in versions[2]


async def test_what_is_told_of_an_engine_that_is_away_is_looked_at(
    connect: Connect, engine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "INTERVAL_S", 0.01)
    monkeypatch.setattr(health, "FIRST_BACKOFF_S", 1000.0)
    agent: Agent = await connect()
    upstream = agent.gateway.upstreams.all[0]
    await until(lambda: upstream.health.well_ns is not None)
    engine.status = 503
    await until(lambda: not upstream.available)
    _, body = await tell(agent, version="42")
    assert body["engines"][0]["weight_version"] == "42"
    await until(lambda: upstream.weights.version == "unknown")  # it was still away
    engine.status = None
    await tell(agent, version="43")
    await until(lambda: upstream.available)
    assert upstream.weights.version == "43"


@pytest.mark.parametrize(("looks", "version"), [(1, "42"), (2, "unknown")])
async def test_a_busy_engine_that_misses_one_look_is_still_itself(
    connect: Connect, engine: StandIn, monkeypatch: pytest.MonkeyPatch, looks: int, version: str
) -> None:
    for name in ("INTERVAL_S", "FIRST_BACKOFF_S", "TIMEOUT_S"):
        monkeypatch.setattr(health, name, 0.05)
    agent: Agent = await connect()
    upstream = agent.gateway.upstreams.all[0]
    await until(lambda: upstream.health.well_ns is not None and upstream.available)
    await tell(agent, version="42")
    engine.silent_looks = looks
    await until(lambda: not upstream.available)
    await until(lambda: upstream.available)
    assert (engine.silent_looks, upstream.weights.version) == (0, version)


async def test_while_paused_new_calls_are_answered_429(connect: Connect, engine: StandIn) -> None:
    agent: Agent = await connect()
    engine.hold = asyncio.Event()
    running = asyncio.create_task(agent.send(CHAT))
    await engine.came.wait()
    status, body = await tell(agent, pause=True, reason="step 42")
    assert (status, body["engines"][0]["in_flight"]) == (200, 1)
    async with agent.http.post(agent.url + "/v1/chat/completions", json=CHAT) as answer:
        error = (await answer.json())["error"]
    assert (answer.status, int(answer.headers["Retry-After"]) > 0) == (429, True)
    assert error["type"] == "rate_limit_error"
    assert "paused: step 42" in error["message"]
    engine.hold.set()
    assert (await running)[0] == 200  # what was under way goes on
    status, body = await tell(agent, version="42", resume=True)
    assert (body["engines"][0]["in_flight"], body["engines"][0]["paused"]) == (0, None)
    assert (await agent.send(CHAT))[0] == 200
    assert b"driftgate_calls_paused_total 1.0" in agent.gateway.metrics.render()


async def test_what_is_asked_again_after_a_pause_is_no_retry_of_an_equal_call(
    agent: Agent,
) -> None:
    ask = partial(agent.send, CHAT, path="/t/best-of-3/v1/chat/completions")
    assert [(await ask())[0] for _ in range(2)] == [200, 200]
    await tell(agent, pause=True)
    assert (await ask())[0] == 429
    await tell(agent, resume=True)
    assert (await ask(headers={"x-stainless-retry-count": "1"}))[0] == 200
    traces = await agent.traces()
    assert [(t.meta.step, t.meta.retry) for t in traces] == [(0, 0), (1, 0), (2, 1)]
    assert agent.gateway.reader is not None
    selection = Selection(agent.gateway.reader)
    assert (len(list(selection.samples())), selection.left_out["retried"]) == (3, 0)


async def test_a_call_that_was_let_in_before_a_pause_is_counted(
    connect: Connect, engine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent: Agent = await connect()
    await agent.send(CHAT)
    engine.came.clear()
    opening, opened = asyncio.Event(), asyncio.Event()

    async def open_(intent: Any) -> None:
        opening.set()
        await opened.wait()  # as a slow disk in strict

    monkeypatch.setattr(agent.gateway.recorder, "open", open_)
    calling = asyncio.create_task(agent.send(CHAT))
    await opening.wait()
    _, body = await tell(agent, pause=True)
    assert (body["engines"][0]["in_flight"], engine.came.is_set()) == (1, False)
    opened.set()
    assert (await calling)[0] == 200
    assert agent.gateway.upstreams.all[0].in_flight == 0


async def test_the_client_speaks_for_a_trainer(agent: Agent) -> None:
    await agent.gateway.upstreams.all[0].ready()
    async with Client(agent.url) as client:
        paused = await client.tell_weights(pause=True, upstream=agent.engine.url)
        assert [engine.paused for engine in paused.engines] == ["new weights"]
        again = await client.tell_weights(pause=True)
        assert again.engines[0].paused_ns == paused.engines[0].paused_ns
        await client.tell_weights("42", resume=True)
        (engine,) = (await client.engines()).engines
    assert (engine.upstream, engine.weight_version) == (agent.engine.url, "42")
    assert (engine.paused, engine.in_flight, engine.models) == (None, 0, ["tiny"])
    assert engine.paused_ns is None


@pytest.mark.parametrize(
    ("said", "status", "message"),
    [
        ({}, 400, "nothing is told"),
        ({"pause": True, "resume": True}, 400, "contradict"),
        ({"version": ""}, 400, "version"),
        ({"version": "x" * 201}, 400, "version"),
        ({"version": 42}, 400, "version"),
        ({"version": "1", "from_ns": 10**19}, 400, "ahead"),
        ({"pause": True, "from_ns": 1}, 400, "from_ns"),
        ({"resume": True, "upstream": "http://nowhere:1"}, 404, "no upstream"),
        ({"verson": "1"}, 400, "verson"),
    ],
)
async def test_what_cannot_be_told(
    agent: Agent, said: dict[str, Any], status: int, message: str
) -> None:
    before = agent.gateway.upstreams.all[0].weights.version
    got, body = await tell(agent, **said)
    assert got == status
    assert message in json.dumps(body)
    assert agent.gateway.upstreams.all[0].weights.version == before
    assert agent.gateway.upstreams.all[0].paused is None

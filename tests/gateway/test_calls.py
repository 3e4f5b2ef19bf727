"""Calls that do not go well, storage that does not, and what must not be forwarded."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from driftgate.errors import StorageError
from driftgate.gateway import exchange, written
from driftgate.gateway.ending import UNDELIVERED
from driftgate.gateway.recorder import CLIENT_LEFT
from driftgate.storage import Record, WriterStats
from driftgate.trace import CallIntent, CallOutcome, Trace

if TYPE_CHECKING:
    from tests.gateway.conftest import Agent, StandIn

Connect = Callable[..., Any]

CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "seed": 3,
}
STREAM = CHAT | {"stream": True}


class Sink:
    """A storage that does as the test says."""

    def __init__(self) -> None:
        self.stats = WriterStats()
        self.full = False
        self.broken = False
        self.held: asyncio.Queue[tuple[Future[None], Callable[[], Sequence[Record]]]] | None = None
        self.records: list[Record] = []

    def submit(self, record: Record) -> Future[None]:
        return self.submit_lazy(lambda: (record,), size_hint=0)

    def submit_lazy(
        self,
        make: Callable[[], Sequence[Record]],
        *,
        size_hint: int,
        handed_over: Callable[[], None] | None = None,
    ) -> Future[None]:
        if self.full:
            raise StorageError("write queue is full")
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # as the writer does
        if handed_over is not None:
            handed_over()
        if self.held is None:
            self.settle(future, make)
        else:
            self.held.put_nowait((future, make))
        return future

    def settle(self, future: Future[None], make: Callable[[], Sequence[Record]]) -> None:
        if self.broken:
            future.set_exception(StorageError("the disk is gone"))
        else:
            self.records += make()
            future.set_result(None)

    def of(self, kind: type[Any]) -> list[Any]:
        return [record for record in self.records if isinstance(record, kind)]


async def test_a_cut_stream_reaches_the_agent_cut(agent: Agent, engine: StandIn) -> None:
    engine.cut_after = 3
    with pytest.raises(aiohttp.ClientPayloadError):
        await agent.send(STREAM)
    (trace,) = await agent.traces()
    assert trace.meta.status == "partial"
    assert trace.meta.missing[0].startswith("end: the engine broke off its answer")
    assert trace.meta.proof.terminal is False
    assert trace.response_ids is not None
    assert trace.response_ids.tolist() == engine.sample(STREAM, 0)[0][:2]
    assert [outcome.status for outcome in await agent.outcomes()] == ["failed"]


@pytest.mark.parametrize("after", [0, 3])
async def test_an_error_inside_a_stream_is_passed_and_its_call_can_be_retried(
    agent: Agent, engine: StandIn, after: int
) -> None:
    engine.error_after = after
    direct, proxied = await agent.both(STREAM)
    assert proxied == direct
    engine.error_after = None
    await agent.send(STREAM)
    *partial, whole = await agent.traces()
    assert [t.meta.status for t in partial] == ["partial"] * (after > 0)
    assert all("boom" in t.meta.missing[0] for t in partial)
    assert (whole.meta.status, whole.meta.step, whole.meta.retry) == ("complete", 0, 1)
    assert [outcome.status for outcome in await agent.outcomes()] == ["failed"]
    reader = agent.gateway.reader
    assert reader is not None
    assert [row.complete for row in reader.trajectories()] == [True]


async def test_an_agent_that_leaves_a_written_stream_is_not_the_engines_fault(
    connect: Connect, engine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def write(*_: Any) -> None:
        raise ConnectionResetError("Cannot write to closing transport")

    engine.routes = True
    agent = await connect(streaming_routes="synthesise")
    await agent.send(CHAT)
    blamed = list[bool]()
    monkeypatch.setattr(agent.gateway.upstreams.all[0], "lost", lambda: blamed.append(True))
    monkeypatch.setattr(written, "KEEP_ALIVE_S", 0.01)
    monkeypatch.setattr(web.StreamResponse, "write", write)
    engine.hold = asyncio.Event()
    await agent.send(STREAM)
    (outcome,) = await agent.outcomes()
    assert (outcome.status, outcome.reason, blamed) == ("cancelled", CLIENT_LEFT, [])


async def test_a_bug_of_ours_leaves_no_call_open(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: Any) -> None:
        raise ValueError("of ours")

    monkeypatch.setattr(exchange, "turns_of_answer", bug)
    assert (await agent.send(CHAT))[0] == 500
    (outcome,) = await agent.outcomes()
    assert (outcome.status, outcome.reason) == ("failed", "ValueError inside the gateway")
    assert b'outcome="not_recorded",streamed="false"} 1.0' in agent.gateway.metrics.render()


async def test_a_call_that_was_refused_is_not_counted_as_answered(connect: Connect) -> None:
    sink = Sink()
    sink.full = True
    agent = await connect(sink=sink, on_capture_failure="refuse")
    assert (await agent.send(CHAT))[0] == 503
    assert b'outcome="not_recorded",streamed="false"} 1.0' in agent.gateway.metrics.render()


@pytest.mark.parametrize("durability", ["group", "strict"])
async def test_an_agent_that_leaves_at_done_has_its_answer(
    connect: Connect, engine: StandIn, monkeypatch: pytest.MonkeyPatch, durability: str
) -> None:
    agent = await connect(durability=durability)
    await agent.gateway.upstreams.ready()
    plain = engine.stream

    async def stream(request: web.Request, events: list[bytes], hold: Any) -> web.StreamResponse:
        await plain(request, events, hold)
        await asyncio.Event().wait()  # the body's end is yet to come
        raise AssertionError

    monkeypatch.setattr(engine, "stream", stream)
    async with agent.http.post(agent.url + "/v1/chat/completions", json=STREAM) as answer:
        async for line in answer.content:
            if line.startswith(b"data: [DONE]"):
                break
        answer.close()
    await engine.left.wait()
    (trace,) = await agent.traces()
    assert (trace.meta.delivery, trace.meta.missing) == ("delivered", [])
    assert await agent.outcomes() == []
    assert b'outcome="answered"' in agent.gateway.metrics.render()
    assert b'outcome="cancelled"' not in agent.gateway.metrics.render()


async def test_a_kept_connection_keeps_no_answer(
    agent: Agent, engine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stream(request: web.Request, events: list[bytes], _: Any) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            await response.write(event)
            await asyncio.sleep(0)  # the head comes before the body
        return response

    def alive() -> int:
        gc.collect()
        return sum(type(thing) is aiohttp.StreamReader for thing in gc.get_objects())

    monkeypatch.setattr(engine, "stream", stream)
    await agent.send(STREAM)
    before = alive()
    for _ in range(10):
        await agent.send(STREAM)
    assert alive() < before + 10


async def test_an_engine_that_dies_in_a_json_answer_is_a_502(
    connect: Connect, engine: StandIn
) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
        )
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(die, "127.0.0.1", 0)
    engine.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    agent = await connect()
    status, body = await agent.send(CHAT)
    assert status == 502
    assert "broke off" in json.loads(body)["error"]["message"]
    assert [o.status for o in await agent.outcomes()] == ["failed"]
    server.close()


async def test_an_unreachable_engine_is_a_502_that_says_what_to_do(
    connect: Connect, engine: StandIn
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        engine.url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        agent = await connect()
        status, body = await agent.send(CHAT)
        async with agent.http.get(agent.url + "/readyz") as ready:
            assert ready.status == 503
            assert engine.url in (await ready.json())["error"]
    assert status == 502
    assert "upstream" in json.loads(body)["error"]["message"]
    assert [o.status for o in await agent.outcomes()] == ["failed"]


async def test_a_client_that_leaves_ends_the_engines_work(agent: Agent, engine: StandIn) -> None:
    engine.hold = asyncio.Event()
    async with agent.http.post(agent.url + "/v1/chat/completions", json=STREAM) as answer:
        await answer.content.readuntil(b"\n\n")
    await asyncio.wait_for(engine.left.wait(), 10)
    (trace,) = await poll(agent)
    assert trace.meta.delivery == "uncertain"
    assert trace.meta.missing[0] == "end: the client left before the end of the answer"
    assert trace.prompt_ids is not None
    assert [outcome.status for outcome in await agent.outcomes()] == ["cancelled"]


async def test_a_client_that_leaves_a_json_call_is_an_outcome(
    agent: Agent, engine: StandIn
) -> None:
    engine.hold = asyncio.Event()
    call = asyncio.create_task(agent.send(CHAT))
    await engine.came.wait()
    call.cancel()
    await asyncio.wait_for(engine.left.wait(), 10)
    while not (outcomes := await agent.outcomes()):
        continue
    assert [outcome.status for outcome in outcomes] == ["cancelled"]


async def poll(agent: Agent) -> list[Trace]:
    """The traces, once there are any: a client that has left cannot wait for them."""
    while not (traces := await agent.traces()):
        continue
    return traces


async def test_events_are_forwarded_as_they_come(agent: Agent, engine: StandIn) -> None:
    engine.hold = asyncio.Event()
    async with agent.http.post(agent.url + "/v1/chat/completions", json=STREAM) as answer:
        first = await answer.content.readuntil(b"\n\n")
        assert b'"role":"assistant"' in first
        engine.hold.set()
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["json", "stream"])
async def test_strict_withholds_the_end_until_the_trace_is_durable(
    connect: Connect, body: dict[str, Any]
) -> None:
    sink = Sink()
    agent = await connect(sink=sink, durability="strict")
    await agent.send(body)  # the engine is known from here on
    sink.held = asyncio.Queue()
    call = asyncio.create_task(agent.send(body))
    for _ in range(2):  # the intent, then the answer
        held = await sink.held.get()
        assert not call.done()
        sink.settle(*held)
    status, answer = await call
    assert status == 200
    assert answer.rstrip().endswith(b"}" if body is CHAT else b"[DONE]")
    assert len(sink.of(Trace)) == 2


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["json", "stream"])
async def test_group_waits_for_no_sync(connect: Connect, body: dict[str, Any]) -> None:
    sink = Sink()
    agent = await connect(sink=sink)
    sink.held = asyncio.Queue()
    assert (await agent.send(body))[0] == 200
    for _ in range(2):
        sink.settle(*await sink.held.get())
    assert [trace.meta.delivery for trace in sink.of(Trace)] == ["delivered"]


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["json", "stream"])
async def test_strict_says_of_an_answer_that_its_agent_left_before_it_was_sent(
    connect: Connect, body: dict[str, Any]
) -> None:
    sink = Sink()
    agent = await connect(sink=sink, durability="strict")
    await agent.send(body)
    sink.held = asyncio.Queue()
    call = asyncio.create_task(agent.send(body))
    sink.settle(*await sink.held.get())
    answer = await sink.held.get()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    taken_back = await sink.held.get()
    sink.settle(*answer)
    sink.settle(*taken_back)
    trace = sink.of(Trace)[-1]
    (outcome,) = sink.of(CallOutcome)
    assert (outcome.call_id, outcome.status) == (trace.meta.call_id, "cancelled")
    assert outcome.reason == UNDELIVERED


async def test_a_full_store_serves_and_marks_the_call_later(connect: Connect) -> None:
    sink = Sink()
    agent = await connect(sink=sink)
    sink.full = True
    assert (await agent.send(CHAT))[0] == 200
    sink.full = False
    assert (await agent.send(CHAT))[0] == 200
    first, second = sink.of(CallIntent)
    (outcome,) = sink.of(CallOutcome)
    assert outcome.status == "capture_failed"
    assert outcome.call_id == first.call_id
    assert [trace.meta.call_id for trace in sink.of(Trace)] == [second.call_id]
    text = agent.gateway.metrics.render().decode()
    assert 'driftgate_capture_lost_total{record="intent"} 1.0' in text
    assert 'driftgate_capture_lost_total{record="trace"} 1.0' in text


async def test_a_full_store_refuses_where_told_so(connect: Connect, engine: StandIn) -> None:
    sink = Sink()
    agent = await connect(sink=sink, on_capture_failure="refuse")
    sink.full = True
    status, body = await agent.send(CHAT)
    assert status == 503
    assert "refuse" in json.loads(body)["error"]["message"]
    assert engine.bodies == []
    sink.full = False
    assert (await agent.send(CHAT))[0] == 200


async def test_a_broken_store_refuses_from_the_next_call_on(connect: Connect) -> None:
    sink = Sink()
    agent = await connect(sink=sink, on_capture_failure="refuse")
    sink.broken = True
    await agent.send(CHAT)
    assert (await agent.send(CHAT))[0] == 503
    sink.broken = False
    assert (await agent.send(CHAT))[0] == 200


@pytest.mark.parametrize(("body", "cut"), [(CHAT, False), (STREAM, True)], ids=["json", "stream"])
async def test_strict_and_refuse_never_show_an_answer_that_is_not_on_disk(
    connect: Connect, body: dict[str, Any], cut: bool
) -> None:
    sink = Sink()
    agent = await connect(sink=sink, durability="strict", on_capture_failure="refuse")
    sink.held = asyncio.Queue()
    call = asyncio.create_task(agent.send(body))
    sink.settle(*await sink.held.get())
    answer = await sink.held.get()
    sink.broken = True
    sink.settle(*answer)
    if cut:
        with pytest.raises(aiohttp.ClientPayloadError):
            await call
    else:
        assert (await call)[0] == 503


@pytest.mark.parametrize("n", [1, 2])
async def test_the_plugins_chunk_is_taken_out_and_kept(
    connect: Connect, engine: StandIn, n: int
) -> None:
    engine.routes = engine.plugin = True
    agent = await connect()
    direct, proxied = await agent.both(STREAM | {"n": n})
    assert proxied == direct
    for trace in await agent.traces():
        assert trace.meta.status == "complete"
        assert trace.meta.routes_via == "plugin"
        assert trace.prompt_ids is not None
        rows = len(trace.prompt_ids) + engine.tokens - 1
        assert trace.routes is not None
        assert trace.routes.tolist() == engine.route(rows).tolist()


async def test_a_stream_is_written_where_the_engine_streams_no_routes(
    connect: Connect, engine: StandIn
) -> None:
    engine.routes = True
    agent = await connect()
    options = {"stream_options": {"include_usage": True}, "n": 2}
    direct, proxied = await agent.both(STREAM | options)
    assert engine.asked["stream"] is False
    assert "stream_options" not in engine.asked
    assert joined(proxied) == joined(direct)
    assert proxied.endswith(b"data: [DONE]\n\n")
    for trace in await agent.traces():
        assert (trace.meta.routes_via, trace.meta.streamed) == ("synthesised", True)
        assert trace.meta.status == "complete"
        assert trace.routes is not None


@pytest.mark.parametrize(
    "extra", [{}, {"tools": [{"type": "function", "function": {"name": "echo"}}]}]
)
async def test_written_chunks_have_the_engines_keys(
    connect: Connect, engine: StandIn, extra: dict[str, Any]
) -> None:
    engine.routes = True
    agent = await connect()
    direct, proxied = await agent.both(
        STREAM | extra | {"logprobs": True, "return_token_ids": True}
    )
    assert shapes(proxied) == shapes(direct)


def chunks(stream: bytes) -> list[dict[str, Any]]:
    data = [event[6:] for event in stream.split(b"\n\n") if event.startswith(b"data: {")]
    return [json.loads(d) for d in data]


def joined(stream: bytes) -> dict[int, Any]:
    """What a client adds up to."""
    out: dict[int, Any] = {}
    for chunk in chunks(stream):
        out[-1] = chunk.get("usage") or out.get(-1)
        for choice in chunk["choices"]:
            text, reason = out.get(choice["index"], ("", None))
            delta = choice["delta"].get("content") or ""
            out[choice["index"]] = (text + delta, choice["finish_reason"] or reason)
    return out


def shapes(stream: bytes) -> set[tuple[str, ...]]:
    """Key sets of chunks, first and last ones included."""
    return {tuple(sorted(chunk)) for chunk in chunks(stream)} | {
        tuple(sorted(choice)) for chunk in chunks(stream) for choice in chunk["choices"]
    }


async def test_keep_alives_bridge_the_wait_and_a_late_error_is_an_event(
    connect: Connect, engine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "KEEP_ALIVE_S", 0.02)
    engine.routes = True
    agent = await connect()
    await agent.gateway.upstreams.all[0].ready()
    engine.hold = asyncio.Event()
    async with agent.http.post(agent.url + "/v1/chat/completions", json=STREAM) as answer:
        assert await answer.content.readuntil(b"\n\n") == b": keep-alive\n\n"
        engine.hold.set()
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")


async def test_an_early_error_of_a_written_stream_keeps_its_status(
    connect: Connect, engine: StandIn
) -> None:
    engine.routes = True
    agent = await connect()
    await agent.gateway.upstreams.all[0].ready()
    engine.status = 422
    direct, proxied = await agent.both(STREAM)
    assert proxied == direct


async def test_routes_that_are_not_streamed_are_named(connect: Connect, engine: StandIn) -> None:
    engine.routes = True
    agent = await connect(streaming_routes="off")
    await agent.send(STREAM)
    (trace,) = await agent.traces()
    assert trace.meta.missing == ["routed_experts: the engine does not stream them"]
    assert trace.meta.status == "partial"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/update_weights"),
        ("POST", "/t/x/update_weights"),
        ("POST", "/v1/embeddings"),
        ("GET", "/v1/chat/completions"),
        ("POST", "/v1/chat/completions/../../update_weights"),
        ("POST", "/v1/models/..%2F..%2Fupdate_weights"),
        ("POST", "/"),
    ],
)
async def test_other_paths_are_not_forwarded(agent: Agent, method: str, path: str) -> None:
    async with agent.http.request(method, agent.url + path) as answer:
        assert answer.status in (404, 405)
        assert "POST /v1/chat/completions" in (await answer.json())["error"]["message"]


async def test_a_models_name_is_no_path(agent: Agent) -> None:
    path = "/v1/models/..%2F..%2Fupdate_weights"
    async with agent.http.get(URL(agent.url + path, encoded=True)) as answer:
        assert answer.status == 404


@pytest.mark.parametrize("prefix", ["", "/t/some%2Fname"])
async def test_models_are_the_engines(agent: Agent, engine: StandIn, prefix: str) -> None:
    answers = []
    for base in (agent.url + prefix, engine.url):
        async with agent.http.get(base + "/v1/models") as answer:
            answers.append(await answer.read())
    assert answers[0] == answers[1]


async def test_a_body_over_the_limit_is_refused(connect: Connect) -> None:
    agent = await connect(max_request_bytes=1000)
    status, body = await agent.send(CHAT | {"user": "x" * 2000})
    assert status == 413
    assert "error" in json.loads(body)


async def test_an_answer_over_the_limit(connect: Connect) -> None:
    agent = await connect(max_answer_bytes=600)
    assert (await agent.send(CHAT))[0] == 502
    status, stream = await agent.send(STREAM)  # forwarded, not kept
    assert status == 200
    assert stream.endswith(b"data: [DONE]\n\n")
    assert [o.status for o in await agent.outcomes()] == ["failed", "capture_failed"]


async def test_the_injected_key_replaces_the_agents(connect: Connect, engine: StandIn) -> None:
    agent = await connect(upstream_key="secret")
    await agent.send(CHAT, headers={"Authorization": "Bearer mine"})
    assert engine.headers[-1]["Authorization"] == "Bearer secret"
    assert "secret" not in repr(agent.gateway.config)


async def test_metrics_count_calls_and_traces(agent: Agent) -> None:
    await agent.send(CHAT)
    await agent.send(STREAM)
    await agent.send(b"{")
    await agent.flush()
    async with agent.http.get(agent.url + "/metrics") as answer:
        text = await answer.text()
    assert 'driftgate_calls_total{api="chat",outcome="answered",streamed="false"} 1.0' in text
    assert 'driftgate_calls_total{api="chat",outcome="answered",streamed="true"} 1.0' in text
    assert 'driftgate_calls_total{api="chat",outcome="engine_error",streamed="false"} 1.0' in text
    assert 'driftgate_traces_total{status="complete"} 2.0' in text
    assert f'driftgate_upstream_up{{upstream="{agent.engine.url}"}} 1.0' in text

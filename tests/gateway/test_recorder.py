"""Records that storage takes late, badly or not at all, and calls held back meanwhile."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal

import pytest

from driftgate.errors import StorageError
from driftgate.gateway import app as app_module
from driftgate.gateway import handover, pressure
from driftgate.gateway.capture import Folded
from driftgate.gateway.config import GatewayConfig
from driftgate.gateway.metrics import Metrics
from driftgate.gateway.openai import Plan
from driftgate.gateway.recorder import CLIENT_LEFT, MAX_TRIES, Answer, Recorder
from driftgate.gateway.served import Served
from driftgate.gateway.sessions import Call, Place
from driftgate.gateway.upstream import Upstream
from driftgate.storage import Record, WriterStats
from driftgate.trace import CallIntent, CallOutcome

if TYPE_CHECKING:
    from tests.gateway.conftest import Agent, StandIn

Connect = Callable[..., Any]

QUEUE_BYTES = 1000
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


class Sink:
    """Takes records; they are settled when the test says how."""

    def __init__(self) -> None:
        self.stats = WriterStats()
        self.writes = True
        """What is submitted is with the operating system at once."""
        self.waiting: list[tuple[Future[None], Callable[[], Sequence[Record]]]] = []
        self.unwritten: list[Callable[[], None]] = []
        self.full = False
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
        future.set_running_or_notify_cancel()
        if handed_over is not None:
            self.unwritten.append(handed_over)
        if self.writes:
            self.write()
        self.waiting.append((future, make))
        return future

    def write(self) -> None:
        """What was submitted is with the operating system."""
        unwritten, self.unwritten = self.unwritten, []
        for tell in unwritten:
            tell()

    def settle(self, error: Exception | None = None) -> None:
        """As the writer does: on a thread of its own."""
        thread = threading.Thread(target=self._settle, args=(error,))
        thread.start()
        thread.join()

    def _settle(self, error: Exception | None) -> None:
        waiting, self.waiting = self.waiting, []
        for future, make in waiting:
            try:
                if error is not None:
                    raise error
                self.records += make()
                future.set_result(None)
            except Exception as problem:
                future.set_exception(problem)


class Recording:
    """A recorder over a sink."""

    def __init__(
        self,
        durability: Literal["group", "strict"] = "group",
        on_capture_failure: Literal["serve", "refuse"] = "serve",
    ) -> None:
        self.sink = Sink()
        self.metrics = Metrics(lambda: self.sink.stats)
        self.recorder = Recorder(
            self.sink,
            None,
            self.metrics,
            durability=durability,
            on_capture_failure=on_capture_failure,
            queue_bytes=QUEUE_BYTES,
        )

    async def open(self, name: str) -> None:
        """With what is submitted settled as written."""
        await self.recorder.open(intent(name))
        self.sink.settle()

    def count(self, line: str) -> float:
        found = [text for text in self.metrics.render().decode().splitlines() if line in text]
        return float(found[0].split()[-1]) if found else 0.0


CONFIG = GatewayConfig(upstream="http://e:1")
DISK = StorageError("the disk is gone")


def intent(name: str) -> CallIntent:
    return CallIntent(
        call_id=name,
        trajectory="t",
        step=0,
        attribution="url",
        api="chat",
        model="tiny",
        body_sha256="",
        started_ns=1,
    )


def call(name: str) -> Call:
    return Call(
        call_id=name,
        place=Place(trajectory="t", attribution="url"),
        step=0,
        retry=0,
        body_sha256="",
    )


def answer(fold: Callable[[], Folded]) -> Answer:
    return Answer(
        fold=fold,
        size_bytes=1,
        request=b"{}",
        started_ns=1,
        first_byte_ns=2,
        ended_ns=3,
        delivered=True,
        streamed=False,
        served=Served(Upstream(CONFIG, Metrics(WriterStats))),
    )


def broken() -> Folded:
    raise ValueError("routes of another shape")


async def settle_down() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


# Back pressure.


async def test_a_call_waits_until_the_queue_has_fallen_below_half() -> None:
    recording = Recording()
    await recording.recorder.open(intent("first"))
    recording.sink.stats.queued_bytes = QUEUE_BYTES // 2 + 1
    held = [asyncio.create_task(recording.recorder.open(intent(name))) for name in "ab"]
    await settle_down()
    recording.sink.settle()  # something is written, but not enough
    await settle_down()
    assert not any(task.done() for task in held)
    assert recording.sink.waiting == []
    recording.recorder.failed(call("other"), "failed", "")
    recording.sink.stats.queued_bytes = QUEUE_BYTES // 2
    recording.sink.settle()
    await asyncio.gather(*held)
    assert len(recording.sink.waiting) == 2
    assert recording.count('driftgate_calls_held_back_total{end="released"}') == 2


async def test_the_wait_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "PRESSURE_WAIT_S", 0.01)
    serving, refusing = Recording(), Recording(on_capture_failure="refuse")
    for recording in (serving, refusing):
        recording.sink.stats.queued_bytes = QUEUE_BYTES
    await serving.recorder.open(intent("a"))
    with pytest.raises(StorageError, match="below half"):
        await refusing.recorder.open(intent("a"))
    assert (len(serving.sink.waiting), len(refusing.sink.waiting)) == (1, 0)
    assert serving.count('driftgate_calls_held_back_total{end="gave_up"}') == 1


async def test_nobody_waits_for_a_disk_that_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "PRESSURE_WAIT_S", 0.01)
    recording = Recording()
    recording.sink.stats.queued_bytes = QUEUE_BYTES
    await recording.recorder.open(intent("a"))
    monkeypatch.setattr(pressure, "PRESSURE_WAIT_S", 1e9)
    await recording.recorder.open(intent("b"))
    assert await recording.recorder.claim(10) == 10
    recording.sink.settle()  # it moves again
    held = asyncio.create_task(recording.recorder.open(intent("c")))
    await settle_down()
    assert not held.done()
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)


async def test_an_answer_waits_with_its_end_until_it_has_room() -> None:
    recording = Recording()
    recorder, stats = recording.recorder, recording.sink.stats
    await recorder.open(intent("first"))
    size = QUEUE_BYTES // 4
    assert [await recorder.claim(size) for _ in range(3)] == [size] * 3
    stats.queued_bytes = 1
    late = asyncio.create_task(recorder.claim(size))
    await settle_down()
    assert not late.done()  # three are claimed, and a part is spared for intents
    recorder.release(size)
    recording.sink.settle()
    assert await late == size
    waiting = asyncio.create_task(recorder.open(intent("next")))
    await settle_down()
    assert not waiting.done()  # what is claimed counts for new calls too
    for _ in range(3):
        recorder.release(size)
    recording.sink.settle()
    recorder.failed(call("other"), "failed", "")
    recording.sink.settle()
    await waiting


async def test_an_answer_larger_than_the_queue_waits_for_an_empty_one() -> None:
    recording = Recording()
    await recording.recorder.open(intent("first"))
    recording.sink.stats.queued_bytes = 1
    late = asyncio.create_task(recording.recorder.claim(2 * QUEUE_BYTES))
    await settle_down()
    assert not late.done()
    recording.sink.stats.queued_bytes = 0
    recording.sink.settle()
    await late


async def test_an_end_waits_until_its_record_is_with_the_operating_system() -> None:
    recording = Recording()
    recording.sink.writes = False
    plan = Plan(api="chat", model="tiny")
    recorded = recording.recorder.close(call("a"), plan, answer(broken))
    ending = asyncio.create_task(recording.recorder.closed(recorded))
    await settle_down()
    assert not ending.done()
    recording.sink.write()
    await ending
    assert recording.sink.waiting  # it is not durable yet


async def test_no_end_waits_for_a_writer_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording()
    recording.sink.writes = False
    plan = Plan(api="chat", model="tiny")

    async def ended(name: str) -> None:
        await recording.recorder.closed(recording.recorder.close(call(name), plan, answer(broken)))

    monkeypatch.setattr(handover, "HAND_OVER_WAIT_S", 0.01)
    await ended("a")
    assert recording.count('driftgate_calls_held_back_total{end="gave_up"}') == 1
    monkeypatch.setattr(handover, "HAND_OVER_WAIT_S", 1e9)
    await ended("b")
    recording.sink.write()  # it moves again
    await settle_down()
    waiting = asyncio.create_task(ended("c"))
    await settle_down()
    assert not waiting.done()
    recording.sink.write()
    await waiting


async def test_a_client_that_leaves_the_wait_leaves_an_outcome() -> None:
    recording = Recording()
    recording.sink.stats.queued_bytes = QUEUE_BYTES
    held = asyncio.create_task(recording.recorder.open(intent("a")))
    await settle_down()
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)
    recording.sink.settle()
    asked, ended = recording.sink.records
    assert isinstance(asked, CallIntent)
    assert isinstance(ended, CallOutcome)
    assert (asked.call_id, ended.call_id, ended.status) == ("a", "a", "cancelled")


async def test_a_busy_gateway_slows_down_and_loses_nothing(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "QUEUE_BYTES", 1 << 20)
    agent: Agent = await connect()
    await agent.send(CHAT)
    pad = "x" * 30_000

    async def many(worker: int) -> None:
        for turn in range(15):
            assert (await agent.send(CHAT | {"user": f"{worker} {turn} {pad}"}))[0] == 200

    await asyncio.gather(*map(many, range(10)))
    await agent.flush()
    text = agent.gateway.metrics.render().decode()
    assert 'driftgate_traces_total{status="complete"} 151.0' in text
    lost = [line for line in text.splitlines() if line.startswith("driftgate_capture_lost_total{")]
    assert lost
    assert all(line.endswith(" 0.0") for line in lost), lost
    assert 'driftgate_calls_held_back_total{end="released"}' in text


# What is owed.


async def test_a_record_that_could_not_be_written_is_tried_again() -> None:
    recording = Recording()
    recording.recorder.failed(call("a"), "failed", "no engine")
    recording.sink.settle(DISK)
    await recording.open("b")  # shows that storage works again
    await recording.open("c")
    (outcome,) = [r for r in recording.sink.records if isinstance(r, CallOutcome)]
    assert (outcome.call_id, outcome.reason) == ("a", "no engine")
    assert recording.recorder.finish(recording.sink.settle) == 0


async def test_nothing_is_tried_again_while_writes_fail() -> None:
    recording = Recording()
    recording.recorder.failed(call("a"), "failed", "")
    recording.sink.settle(DISK)
    for name in "bcde":
        await recording.recorder.open(intent(name))
        assert len(recording.sink.waiting) == 1
        recording.sink.settle(DISK)
    assert recording.recorder.finish(recording.sink.settle) == 0
    assert len(recording.sink.records) == 5


async def test_a_record_that_fails_each_time_is_given_up_and_counted() -> None:
    recording = Recording()
    recording.recorder.failed(call("a"), "failed", "")
    recording.sink.settle(DISK)
    assert recording.recorder.finish(lambda: recording.sink.settle(DISK)) == 1
    assert recording.count('driftgate_capture_lost_total{record="outcome"}') == MAX_TRIES
    assert recording.count('driftgate_capture_lost_total{record="owed"}') == 1
    assert recording.recorder.finish(recording.sink.settle) == 1
    assert recording.sink.records == []


async def test_what_the_last_flush_loses_is_still_recorded() -> None:
    recording = Recording()
    recording.recorder.close(call("a"), Plan(api="chat", model="tiny"), answer(broken))
    assert recording.recorder.finish(recording.sink.settle) == 0
    (outcome,) = recording.sink.records
    assert isinstance(outcome, CallOutcome)
    assert (outcome.call_id, outcome.status) == ("a", "capture_failed")
    assert outcome.reason == "ValueError: routes of another shape"


async def test_an_answer_that_cannot_be_folded_has_its_outcome_at_once() -> None:
    recording = Recording()
    recording.recorder.close(call("a"), Plan(api="chat", model="tiny"), answer(broken))
    recording.sink.settle()
    recording.sink.settle()
    assert [type(record) for record in recording.sink.records] == [CallOutcome]


async def test_a_refused_call_is_not_owed() -> None:
    recording = Recording(on_capture_failure="refuse")
    recording.sink.full = True
    with pytest.raises(StorageError):
        await recording.recorder.open(intent("a"))
    recording.sink.full = False
    assert recording.recorder.finish(recording.sink.settle) == 0
    assert recording.sink.records == []


# Strict.


@pytest.mark.parametrize("on_capture_failure", ["serve", "refuse"])
async def test_an_answer_that_cannot_be_folded_is_a_failure_of_storage(
    connect: Connect,
    engine: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    on_capture_failure: Literal["serve", "refuse"],
) -> None:
    agent: Agent = await connect(durability="strict", on_capture_failure=on_capture_failure)

    def fail(*_: object) -> list[Record]:
        raise ValueError("routes of another shape")

    monkeypatch.setattr(agent.gateway.recorder, "_make", fail)
    status, body = await agent.send(CHAT)
    assert status == (200 if on_capture_failure == "serve" else 503)
    if status == 503:
        assert "routes of another shape" in json.loads(body)["error"]["message"]
    await agent.send(CHAT)
    (first, *_) = await agent.outcomes()
    assert (first.status, first.reason) == (
        "capture_failed",
        "ValueError: routes of another shape",
    )


async def test_a_call_that_is_cancelled_while_its_intent_is_written_has_an_outcome() -> None:
    recording = Recording(durability="strict")
    opening = asyncio.create_task(recording.recorder.open(intent("a")))
    await settle_down()
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    recording.sink.settle()
    opened, outcome = recording.sink.records
    assert isinstance(opened, CallIntent)
    assert isinstance(outcome, CallOutcome)
    assert (outcome.call_id, outcome.status, outcome.reason) == ("a", "cancelled", CLIENT_LEFT)

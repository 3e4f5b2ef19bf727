"""Bad input is answered clearly, named in storage, and takes nothing else with it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest

from driftgate.gateway.app import serve
from driftgate.gateway.config import GatewayConfig
from driftgate.storage import CallRow, Reader, TrajectoryRow
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.launch import launch
from driftgate.testing.engine import EngineProcess, free_port
from tests.e2e.rollouts import question
from tests.e2e.support import (
    CHAT,
    COMPLETIONS,
    WEIGHT_VERSION,
    codes,
    driftgate,
    proxy,
    reference,
    stored_scores,
    stored_traces,
    teach,
    without_identity,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

JSON = {"Content-Type": "application/json"}


def calls_of(store: Path, trajectory: str) -> tuple[TrajectoryRow, list[CallRow]]:
    with closing(Reader(store)) as reader:
        return reader.trajectory(trajectory), reader.calls(trajectory)


# Requests that the engine refuses.

ONE = [{"role": "user", "content": "one"}]
REFUSED: dict[str, tuple[str, bytes | dict[str, Any]]] = {
    "cut JSON": (CHAT, b'{"model": "dense", "messages": ['),
    "no object": (CHAT, b"[1, 2]"),
    "nothing": (CHAT, b""),
    "no UTF-8": (CHAT, b'{"model": "\xff", "messages": []}'),
    "no number": (CHAT, b'{"model": "dense", "messages": [], "temperature": NaN}'),
    "no messages": (CHAT, {"model": "dense"}),
    "messages are text": (CHAT, {"model": "dense", "messages": "hello"}),
    "messages are empty": (CHAT, {"model": "dense", "messages": []}),
    "a message without role": (CHAT, {"model": "dense", "messages": [{"content": "x"}]}),
    "temperature is text": (CHAT, {"model": "dense", "messages": ONE, "temperature": "hot"}),
    "negative max_tokens": (CHAT, {"model": "dense", "messages": ONE, "max_tokens": -1}),
    "n is text": (CHAT, {"model": "dense", "messages": ONE, "n": "two"}),
    "n is 0": (CHAT, {"model": "dense", "messages": ONE, "n": 0}),
    "logprobs are text": (CHAT, {"model": "dense", "messages": ONE, "logprobs": "perhaps"}),
    "stream is text": (CHAT, {"model": "dense", "messages": ONE, "stream": "perhaps"}),
    "top_logprobs alone": (CHAT, {"model": "dense", "messages": ONE, "top_logprobs": 2}),
    "too many top_logprobs": (
        CHAT,
        {"model": "dense", "messages": ONE, "logprobs": True, "top_logprobs": 50},
    ),
    "a tool without tools": (CHAT, {"model": "dense", "messages": ONE, "tool_choice": "required"}),
    "unknown model": (CHAT, {"model": "another", "messages": ONE}),
    "unknown model, streamed": (CHAT, {"model": "another", "messages": ONE, "stream": True}),
    "no prompt": (COMPLETIONS, {"model": "dense"}),
    "a prompt of mixed types": (COMPLETIONS, {"model": "dense", "prompt": ["a", 1]}),
    "an id beyond the vocabulary": (COMPLETIONS, {"model": "dense", "prompt": [999_999]}),
    "logprobs of a completion are text": (
        COMPLETIONS,
        {"model": "dense", "prompt": "a", "logprobs": "many"},
    ),
}


async def test_what_the_engine_refuses_is_refused_alike_and_nothing_else_is_lost(
    engines: dict[str, EngineProcess], tmp_path: Path
) -> None:
    engine = engines["dense"]
    async with proxy(engine, tmp_path) as proxied:
        await proxied.call("bad", question(engine, seed=1, max_tokens=8))
        for name, (path, body) in REFUSED.items():
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            urls = (f"{engine.url}/v1/{path}", f"{proxied.url}/t/bad/v1/{path}")
            direct, through = [await send(proxied.http, url, raw) for url in urls]
            assert direct[0] in (400, 404), name
            assert through == direct, name
        await proxied.call("bad", question(engine, seed=2, max_tokens=8))
        async with proxied.http.get(f"{proxied.url}/metrics") as answer:
            told = (await answer.text()).splitlines()
        lost = [line for line in told if line.startswith("driftgate_capture_lost_total{")]
        assert lost
        assert all(line.endswith(" 0.0") for line in lost)
    row, calls = calls_of(tmp_path, "bad")
    assert (row.captured, row.failed_calls, row.open_calls) == (2, len(REFUSED), 0)
    assert [call.state for call in calls] == ["done", *["failed"] * len(REFUSED), "done"]
    for call, name in zip(calls[1:-1], REFUSED, strict=True):
        assert call.outcome is not None
        assert call.outcome.http_status in (400, 404), name
        assert call.outcome.reason.startswith("the engine answered: {"), name
    assert all(trace.meta.missing == [] for trace in stored_traces(tmp_path, "bad"))


async def send(http: aiohttp.ClientSession, url: str, body: bytes) -> tuple[int, str, Any]:
    async with http.post(url, data=body, headers=JSON) as answer:
        return answer.status, answer.content_type, without_identity(await answer.json())


# Engines that are not there, or die.


@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
async def test_an_unreachable_engine_is_named(tmp_path: Path, stream: bool) -> None:
    upstream = f"http://127.0.0.1:{free_port()}"
    config = GatewayConfig(upstream=upstream, port=0, store=tmp_path)
    body = json.dumps({"model": "dense", "messages": ONE, "stream": stream}).encode()
    async with serve(config) as url, aiohttp.ClientSession() as http:
        status, kind, answer = await send(http, f"{url}/t/nobody/v1/{CHAT}", body)
        async with http.get(f"{url}/readyz") as ready:
            assert ready.status == 503
            assert upstream in (await ready.json())["error"]
    assert (status, kind) == (502, "application/json")
    assert answer["error"]["type"] == "upstream_error"
    assert upstream.removeprefix("http://") in answer["error"]["message"]
    row, (call,) = calls_of(tmp_path, "nobody")
    assert call.state == "failed"
    assert row.missing == 1
    assert upstream.removeprefix("http://") in row.gaps[0]


@asynccontextmanager
async def dying(answer: bytes) -> AsyncIterator[str]:
    """A server that sends ``answer`` to every completion request and drops dead."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"completions" in head:
            writer.write(answer)
            await writer.drain()
        writer.transport.abort()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


CUT_AFTER = 9
"""Events of the real engine's stream that still come: the role, and 8 tokens."""


async def real_stream(engine: EngineProcess, payload: dict[str, Any]) -> list[bytes]:
    """The events that the engine sends when it is asked as the gateway asks."""
    asked = payload | {"logprobs": True, "top_logprobs": 0, "return_token_ids": True}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{engine.url}/v1/{CHAT}", json=asked) as answer,
    ):
        raw = await answer.read()
    return [event + b"\n\n" for event in raw.split(b"\n\n") if event]


async def test_an_engine_that_dies_in_its_stream_leaves_a_marked_part(
    engines: dict[str, EngineProcess], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    payload = question(engines["dense"], seed=3, stream=True)
    events = await real_stream(engines["dense"], payload)
    assert len(events) > 2 * CUT_AFTER
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in events[:CUT_AFTER]]
    got = bytearray()
    async with dying(head + b"".join(chunks)) as upstream:
        config = GatewayConfig(
            upstream=upstream, port=0, store=tmp_path, weight_version=WEIGHT_VERSION
        )
        async with (
            serve(config) as url,
            aiohttp.ClientSession() as http,
            http.post(f"{url}/t/cut/v1/{CHAT}", json=payload) as answer,
        ):
            with pytest.raises(aiohttp.ClientPayloadError):
                await read_into(got, answer)
    assert got.count(b"\n\n") == CUT_AFTER
    assert b"[DONE]" not in got
    (trace,) = stored_traces(tmp_path, "cut")
    assert trace.meta.status == "partial"
    assert any(
        text.startswith("end: the engine broke off its answer") for text in trace.meta.missing
    )
    assert not trace.meta.proof.terminal
    assert trace.response_ids is not None
    assert trace.response_ids.tolist() == tokens_of(events[:CUT_AFTER])
    row, _ = calls_of(tmp_path, "cut")
    assert not row.complete
    assert any("the engine broke off its answer" in gap for gap in row.gaps)
    # What came is scored, and right.
    teach(tmp_path, reference(checkpoints["dense"]), checkpoints["dense"])
    (score,) = stored_scores(tmp_path)
    assert "capture_partial" in codes(score)
    assert trace.logprobs is not None
    assert np.abs(score.logprobs - trace.logprobs).max() < 1e-4


async def read_into(got: bytearray, answer: aiohttp.ClientResponse) -> None:
    async for chunk in answer.content.iter_any():
        got += chunk


def tokens_of(events: list[bytes]) -> list[int]:
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return [token for choice in choices for token in choice.get("token_ids") or []]


async def test_an_engine_that_dies_in_its_json_answer_is_a_502(tmp_path: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
    body = json.dumps({"model": "dense", "messages": ONE}).encode()
    async with dying(head + b'{"choices": [') as upstream:
        config = GatewayConfig(upstream=upstream, port=0, store=tmp_path)
        async with serve(config) as url, aiohttp.ClientSession() as http:
            status, _, answer = await send(http, f"{url}/t/cut/v1/{CHAT}", body)
    assert status == 502
    assert "the engine broke off its answer" in answer["error"]["message"]
    row, (call,) = calls_of(tmp_path, "cut")
    assert call.state == "failed"
    assert "the engine broke off its answer" in row.gaps[0]


# Checkpoints that do not fit.


def test_a_tokenizer_that_does_not_match_is_named_and_not_tried_again(
    captured: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    store = Path(shutil.copytree(captured["dense"], tmp_path / "store"))
    other = Path(shutil.copytree(checkpoints["dense"], tmp_path / "other"))
    renumber(other / "tokenizer.json")
    done = driftgate("teach", "--model", other, "--store", store)
    assert done.returncode == 0, done.stderr
    again = teach(store, reference(other), other)
    assert (again.trajectories, again.refused) == (0, 0), "they are not tried again"
    scores = stored_scores(store)
    assert len(scores) == 19
    for score in scores:
        assert score.meta.bucket is None
        assert score.meta.comparable.verdict == "no"
        (reason,) = score.meta.comparable.reasons
        assert reason.code == "tokenizer_mismatch"
        assert "response tokens are spelt differently" in reason.detail
    assert "tokenizer_mismatch" in driftgate("show", "chat", "--store", store).stdout
    # The right trainer is another one: the refusals do not stand in its way.
    report = teach(store, reference(checkpoints["dense"]), checkpoints["dense"])
    assert (report.scored, report.refused) == (19, 0)


def renumber(tokenizer: Path) -> None:
    """Give every token of the vocabulary another's id."""
    described = msgspec.json.decode(tokenizer.read_bytes())
    vocabulary: dict[str, int] = described["model"]["vocab"]
    ids = list(vocabulary.values())
    described["model"]["vocab"] = dict(zip(vocabulary, ids[7:] + ids[:7], strict=True))
    tokenizer.write_bytes(msgspec.json.encode(described))


@pytest.fixture
def broken(request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A folder that is no whole checkpoint, in the way that the parameter says."""
    path = tmp_path / "model"
    if request.param == "empty":
        path.mkdir()
        return path
    shutil.copytree(checkpoints["dense"], path)
    if request.param == "no weights":
        (path / "model.safetensors").unlink()
    elif request.param == "cut weights":
        os.truncate(path / "model.safetensors", 5000)
    elif request.param == "no config":
        (path / "config.json").write_text('{"model_type": ')
    else:
        described = json.loads((path / "config.json").read_text())
        described |= {"other shapes": {"hidden_size": 256}, "fewer weights": MORE_LAYERS}[
            request.param
        ]
        (path / "config.json").write_text(json.dumps(described))
    return path


MORE_LAYERS = {"num_hidden_layers": 6, "layer_types": ["full_attention"] * 6}


@pytest.mark.parametrize(
    ("broken", "status", "said"),
    [
        ("empty", 2, "is no checkpoint directory (no config.json)"),
        ("cut weights", 1, "incomplete metadata, file not fully covered"),
    ],
    indirect=["broken"],
)
def test_a_folder_that_is_no_checkpoint_is_one_clear_line(
    broken: Path, status: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    done = driftgate("teach", "--model", broken, "--store", tmp_path / "store")
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if str(broken) in line]
    assert said in line


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("no weights", "no file named model.safetensors"),
        ("no config", "is not a valid JSON file"),
        ("other shapes", "39 weights have other shapes than its config.json says"),
        ("fewer weights", "22 weights of its config.json are not in its files"),
    ],
    indirect=["broken"],
)
def test_a_checkpoint_that_is_not_whole_scores_nothing(
    broken: Path, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = TeacherConfig(store=str(tmp_path / "store"), model=str(broken))
    with caplog.at_level(logging.ERROR, logger="driftgate.teacher"):
        assert launch(config) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"the teacher stopped: cannot load the checkpoint {broken}"
    )
    assert said in record.getMessage()

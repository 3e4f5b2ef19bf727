"""An engine run again over what it answered, told by an engine whose two kernels differ by a known
amount."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pybase64
import pytest

from driftgate.errors import UpstreamError
from driftgate.storage import Reader
from driftgate.teacher.config import TeacherConfig
from driftgate.teacher.engine_floor import EngineFloors
from driftgate.teacher.floors import choose
from driftgate.teacher.reference import ReferenceBackend
from driftgate.trace import Engine, Score, Trace
from tests.teacher.support import MakeTrace, Say, store, teach, tokens

PREFILL_D = 0.003
"""Nats that the stand-in's prompt logprobs are above those that it decodes."""

ENGINE = Engine(
    name="vllm", version="0.29.0", model="tiny", system_fingerprint="fp",
    logprobs_mode="raw_logprobs",
)  # fmt: skip


def npy(array: npt.NDArray[Any]) -> str:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return pybase64.b64encode(file.getvalue()).decode()


def routes_of(rows: int) -> npt.NDArray[np.uint8]:
    return np.stack([np.roll(np.arange(16), row)[:4] for row in range(rows)])[:, None].astype(
        np.uint8
    )


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Of a deterministic engine: token ``i`` of an answer is 300 + i, of -(i + 1) / 10 nats."""
    prompt = asked["prompt"]
    if "prompt_logprobs" in asked:
        start = prompt.index(300)
        rows = [None] + [
            {str(token): {"logprob": PREFILL_D - (at - start + 1) / 10}}
            for at, token in list(enumerate(prompt))[1:]
        ]
        routed = npy(routes_of(len(prompt)))
        return {"choices": [{"prompt_logprobs": rows, "routed_experts": routed}]}
    count = asked["max_tokens"]
    return {
        "choices": [
            {
                "token_ids": [300 + i for i in range(count)],
                "logprobs": {"token_logprobs": [-(i + 1) / 10 for i in range(count)]},
                "routed_experts": npy(routes_of(len(prompt) + count - 1)),
            }
        ]
    }


@contextmanager
def engine(
    fingerprint: str = "fp", status: int = 200
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its URL, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append(body)
            said = json.dumps({**answer(body), "system_fingerprint": fingerprint}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def said(make_trace: MakeTrace, name: str = "a", count: int = 8, **more: Any) -> Trace:
    """An answer of the stand-in."""
    given: dict[str, Any] = {
        "logprobs": [-(i + 1) / 10 for i in range(count)],
        "routes": routes_of(5 + count - 1),
        "engine": ENGINE,
        **more,
    }
    return make_trace(name, [1, 2, 3, 4, 5], [300 + i for i in range(count)], **given)


def by_kind(scores: list[Score]) -> dict[str, Score]:
    return {score.meta.trainer.settings.get("floor", "repeat"): score for score in scores}


@pytest.mark.parametrize("seed", [7, None])
def test_both_kinds_of_floor_by_value(make_trace: MakeTrace, seed: int | None) -> None:
    trace = said(make_trace, seed=seed, temperature=0.7, top_p=0.9)
    floors = None
    with engine() as (url, asked):
        floors = EngineFloors(url)
        found = by_kind(floors.measure([trace], set()))
    assert floors.skipped == {}
    assert set(found) == {"repeat", "decode_vs_prefill"}
    for score in found.values():
        assert score.meta.kind == "noise_floor"
        assert score.meta.engine == ENGINE
        assert score.meta.bucket is not None
        assert score.meta.bucket.n_tokens == 8
        assert score.meta.router is not None
        assert score.meta.router.metrics()["router_set_disagree_rate"] == 0.0
    repeat, prefill = found["repeat"].meta, found["decode_vs_prefill"].meta
    assert repeat.trainer == ENGINE
    assert prefill.trainer == msgspec.structs.replace(
        ENGINE, settings={"floor": "decode_vs_prefill"}
    )
    assert repeat.bucket is not None
    assert repeat.bucket.metrics()["abs_log_ratio_max"] == 0.0
    assert (repeat.worst is None) == (seed is None), "tokens of other answers are not named"
    assert prefill.bucket is not None
    assert prefill.bucket.metrics()["log_ratio_mean"] == pytest.approx(PREFILL_D, rel=1e-4)
    again = [body for body in asked if "prompt_logprobs" not in body]
    assert len(again) == (2 if seed is None else 1)
    for body in again:
        assert (body["seed"], body["temperature"], body["top_p"]) == (seed or 0, 0.7, 0.9)
        assert body["prompt"] == [1, 2, 3, 4, 5]


def test_answers_that_part_are_compared_up_to_there(make_trace: MakeTrace) -> None:
    trace = said(make_trace, seed=7)
    assert trace.response_ids is not None
    trace.response_ids[5] = 900
    with engine() as (url, _):
        found = by_kind(EngineFloors(url).measure([trace], set()))
    assert found["repeat"].meta.bucket is not None
    assert found["repeat"].meta.bucket.n_tokens == 5


@pytest.mark.parametrize(
    ("more", "fingerprint", "status", "reasons"),
    [
        ({"structured": "json"}, "fp", 200, ["a grammar masked", "a grammar or banned"]),
        ({"logit_bias": True}, "fp", 200, ["a grammar or banned"]),
        ({}, "other", 200, ["the engine is other, the trace is of fp"]),
        ({}, "fp", 400, ["the engine answered 400"]),
        (
            {
                "engine": msgspec.structs.replace(ENGINE, logprobs_mode="processed_logprobs"),
                "temperature": 0.5,
            },
            "fp",
            200,
            ["logprobs of a prompt are raw, those of the answer processed_logprobs"],
        ),
    ],
)
def test_what_cannot_be_run_again_is_counted_by_reason(
    make_trace: MakeTrace, more: dict[str, Any], fingerprint: str, status: int, reasons: list[str]
) -> None:
    with engine(fingerprint, status) as (url, _):
        floors = EngineFloors(url)
        floors.measure([said(make_trace, seed=7, **more)], set())
    assert sorted(floors.skipped)[: len(reasons)] != []
    for reason in reasons:
        assert any(text.startswith(reason) for text in floors.skipped), floors.skipped


def test_no_engine_is_an_error_that_says_so(make_trace: MakeTrace) -> None:
    with pytest.raises(UpstreamError, match=r"no engine answers at http://127\.0\.0\.1:9"):
        EngineFloors("http://127.0.0.1:9").measure([said(make_trace)], set())


def test_traces_are_taken_from_as_many_trajectories_as_there_are(
    config: TeacherConfig, make_trace: MakeTrace, reader: Reader
) -> None:
    traces = [
        said(make_trace, f"{run}{step}", trajectory=run, step=step)
        for run in "abc"
        for step in range(3)
    ]
    foreign = said(
        make_trace, "old", trajectory="0", engine=Engine(name="e", version="1", model="tiny")
    )
    store(config, foreign, *traces)
    assert {t.meta.trajectory for t in choose(reader, model=None, limit=3)} <= set("abc0")
    chosen = choose(reader, model="tiny", limit=9)
    assert len({t.meta.engine.digest for t in chosen}) == 1
    assert choose(reader, model="another", limit=9) == []


def test_a_trainer_is_run_twice_over_stored_traces_and_once_only(
    config: TeacherConfig, backend: ReferenceBackend, say: Say, reader: Reader
) -> None:
    store(config, *(say(str(n), tokens(n, 9), tokens(-~n, 5), trajectory=str(n)) for n in range(4)))
    only = msgspec.structs.replace(config, floor_traces=3)
    assert teach(only, backend).noise_floor == 3
    assert reader.scores(kind="drift") == []
    for row in reader.scores(kind="noise_floor"):
        assert row.meta.engine == row.meta.trainer == backend.trainer
        assert row.meta.bucket is not None
        assert row.meta.bucket.metrics()["abs_log_ratio_max"] == 0.0
    assert teach(only, backend).noise_floor == 0
    assert Path(config.store).is_dir()

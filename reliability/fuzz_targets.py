"""What is fuzzed: each function that reads bytes which somebody else wrote.

A target takes any bytes and returns, or raises what it may not: every other outcome than the errors
that are listed for it is a find. Besides not crashing, most hold an invariant or are compared with
a slower way to the same result.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import google_crc32c
import msgspec
import numpy as np

from driftgate.adapters.vllm import Vllm
from driftgate.errors import UNREADABLE, FormatError, RequestError, UpstreamError
from driftgate.gateway import sse
from driftgate.gateway.capture import Folded, fold_answer, fold_stream
from driftgate.gateway.conversation import read_conversation
from driftgate.gateway.digits import read_ids
from driftgate.gateway.history import read_history
from driftgate.gateway.openai import (
    Api,
    Plan,
    StreamMode,
    read_request,
    rewrite,
    strip_answer,
    strip_event,
)
from driftgate.gateway.pieces import Pieces, take_apart
from driftgate.gateway.prompts import read_prompt
from driftgate.gateway.synthesis import error_event, stream_of
from driftgate.gateway.tape import Tape
from driftgate.storage.codec import (
    HEADER_BYTES,
    MARKER,
    Payload,
    parse_header,
    unpack_frame,
    unpack_payload,
)
from driftgate.storage.delta import resolve
from driftgate.storage.records import decode_score, decode_small, decode_trace
from driftgate.storage.segments import Entry, header_bytes, scan
from driftgate.testing.traces import make_trace
from driftgate.trace import Trace

__all__ = ["CANARY", "TARGETS", "Target"]

ADAPTER = Vllm()
LIMIT_BYTES = 1 << 20
GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"

ANSWER: dict[str, object] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "tiny",
    "system_fingerprint": "vllm-0.29.0-tp1-abc",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hé", "tool_calls": []},
            "logprobs": {
                "content": [
                    {"token": "h", "logprob": -0.5, "bytes": [104], "top_logprobs": []},
                    {"token": "é", "logprob": -1.25, "bytes": [195, 169], "top_logprobs": []},
                ]
            },
            "finish_reason": "stop",
            "token_ids": [7, 8],
            "routed_experts": None,
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    "prompt_token_ids": [1, 2, 3],
}

REQUEST: dict[str, object] = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "4"},
    ],
    "temperature": 0.7,
    "n": 2,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "stream_options": {"include_usage": True},
    "seed": 1,
}


@dataclass(frozen=True, slots=True)
class Target:
    """One fuzzed function."""

    name: str
    what: str
    check: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]


def _npy(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _routes() -> str:
    return base64.b64encode(_npy(np.arange(16, dtype=np.uint8).reshape(4, 2, 2))).decode()


def _answers() -> list[bytes]:
    moe = msgspec.json.decode(msgspec.json.encode(ANSWER), type=dict[str, object])
    moe["choices"][0]["routed_experts"] = _routes()  # type: ignore[index]
    text = {
        "object": "text_completion",
        "choices": [
            {
                "index": 0,
                "text": "ab",
                "prompt_token_ids": [1, 2],
                "token_ids": [3, 4],
                "logprobs": {
                    "tokens": ["a", "b"],
                    "token_logprobs": [-1.0, -2.0],
                    "text_offset": [0, 1],
                    "top_logprobs": [None, None],
                },
                "finish_reason": "length",
            }
        ],
    }
    return [msgspec.json.encode(one) for one in (ANSWER, moe, text, {"error": {"message": "no"}})]


def _stream() -> bytes:
    """A stream in vLLM's usual form, with what may come between and after."""
    rows = [{"token": "h", "logprob": -0.5, "bytes": [104], "top_logprobs": []}]
    start: dict[str, object] = {"id": "c", "object": "chat.completion.chunk", "model": "tiny"}
    deltas: list[dict[str, object]] = [{"content": "h"}, {"reasoning": "h"}, {"content": "h"}]
    usual = [
        {
            "index": 0,
            "delta": delta,
            "logprobs": {"content": rows},
            "finish_reason": None,
            "token_ids": [7],
        }
        for delta in deltas
    ]
    chunks = [
        start | {"prompt_token_ids": [1, 2, 3], "choices": []},
        *(start | {"choices": [choice]} for choice in usual),
        start | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": ANSWER["usage"]},
        {"driftgate": 1, "choices": [{"index": 0, "routed_experts": _routes()}]},
    ]
    events = [b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks]
    return b"".join([b": ping\r\n\r\n", *events, b"data: [DONE]\n\n"])


_ASKED: list[tuple[Api, dict[str, object], StreamMode]] = [
    ("chat", {"messages": [], "stream": True}, "plugin"),
    ("chat", {"messages": [], "logprobs": True, "return_token_ids": True, "n": 2}, "plain"),
    ("completions", {"prompt": "x"}, "plain"),
]

PLANS = tuple(
    rewrite(api, read_request(msgspec.json.encode(body)), ADAPTER, mode)[1]
    for api, body, mode in _ASKED
)


def _plan(data: bytes) -> Plan:
    """One of the plans, chosen by the data, so that a find is repeatable."""
    return PLANS[len(data) % len(PLANS)]


def _whole(folded: Folded) -> None:
    """What a trace that calls itself whole must be."""
    for sample in folded.samples:
        if sample.logprobs is not None and sample.response_ids is not None:
            assert sample.logprobs.shape == sample.response_ids.shape
            assert not np.isnan(sample.logprobs).any() or sample.missing
        if sample.missing:
            continue
        assert sample.prompt_ids is not None
        assert sample.response_ids is not None
        assert sample.logprobs is not None
        if sample.routes is not None:
            rows = len(sample.prompt_ids) + len(sample.response_ids) - 1
            assert sample.routes.shape[0] == rows


def splitter(data: bytes) -> None:
    """Events are the same however the bytes are cut, and no byte is lost or made up."""
    cuts = sorted({1 + byte % (len(data) or 1) for byte in data[:8]})
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    whole, cut = sse.Splitter(), sse.Splitter()
    events = whole.feed(data)
    assert [event for piece in pieces for event in cut.feed(piece)] == events
    assert cut.rest() == whole.rest()
    assert b"".join(events) + whole.rest() == data
    for event in events:
        sse.event_data(event)


def events(data: bytes) -> None:
    """A stream is stripped and folded; the pattern and the parser give the agent the same."""
    plan = _plan(data)
    tape = Tape(plan, limit_bytes=LIMIT_BYTES)
    for event in sse.Splitter().feed(data):
        passed = tape.take(event)
        if passed != strip_event(event, plan):
            assert not _is_json(sse.event_data(event))
    _whole(fold_stream(tape, ADAPTER, expect_routes=None, end=None))


def _is_json(data: bytes | None) -> bool:
    try:
        json.loads(data or b"-")
    except (ValueError, RecursionError):
        return False
    return True


def answer(data: bytes) -> None:
    """A JSON answer is stripped and folded, by the fast way and by the slow one to the same."""
    plan = _plan(data)
    stripped = strip_answer(data, plan)
    assert isinstance(stripped.body, bytes)
    try:
        slow = fold_answer(data, plan, ADAPTER, expect_routes=None)
    except UpstreamError:
        if stripped.pieces is not None:  # what is no JSON as a whole is at least not whole
            _unreadable(stripped.pieces, plan)
        return
    _whole(slow)
    if stripped.pieces is not None:
        fast = fold_answer(stripped.pieces, plan, ADAPTER, expect_routes=None)
        if not any(said.startswith("answer:") for one in slow.samples for said in one.missing):
            assert _said(fast) == _said(slow)
    if plan.api == "chat":
        with suppress(UpstreamError):
            stream_of(stripped.body, plan)


def _unreadable(pieces: Pieces, plan: Plan) -> None:
    with suppress(UpstreamError):
        folded = fold_answer(pieces, plan, ADAPTER, expect_routes=None)
        assert all(sample.missing for sample in folded.samples)


def _said(folded: Folded) -> list[object]:
    """What a fold found, but for the tokens' texts: the fast way takes them from the tokens and
    passes the lists of their bytes over, also where these are nonsense."""
    return [
        [
            sample.choice,
            None if sample.prompt_ids is None else sample.prompt_ids.tolist(),
            None if sample.response_ids is None else sample.response_ids.tolist(),
            None if sample.logprobs is None else sample.logprobs.tobytes(),
            None if sample.routes is None else sample.routes.tobytes(),
            sample.finish_reason,
            [said for said in sample.missing if "text" not in said],
        ]
        for sample in folded.samples
    ]


def request(data: bytes) -> None:
    """An agent's request is read, rewritten and placed in its conversation."""
    try:
        fields = read_request(data)
    except RequestError:
        return
    for api in ("chat", "completions"):
        try:
            body, plan = rewrite(api, fields, ADAPTER, "plugin")
        except RequestError:
            continue
        if body is not None:
            msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        read_history(fields, plan)
    if "messages" in fields:
        read_conversation(fields["messages"])
    if "prompt" in fields:
        read_prompt(bytes(fields["prompt"]))


def error_body(data: bytes) -> None:
    """Any body of an engine's error becomes one event."""
    assert error_event(data).endswith(b"\n\n")


def ids(data: bytes) -> None:
    """Ids read from digits are those that a JSON parser reads, or none."""
    try:
        array = msgspec.json.decode(data, type=list[msgspec.Raw])
    except UNREADABLE:
        return  # it is only asked for arrays
    found = read_ids(msgspec.json.encode(array))
    if found is not None:
        assert found.tolist() == msgspec.json.decode(data, type=list[int])


def pieces(data: bytes) -> None:
    """What is taken apart is JSON, and nothing else of it is."""
    taken = take_apart(data)
    if taken is not None:
        msgspec.json.decode(taken.rest())


def npy(data: bytes) -> None:
    """Routes in a ``.npy``: never pickle, never more memory than came."""
    for encoded in (data, base64.b64encode(data)):
        try:
            routes = ADAPTER.decode_routes(encoded, prompt_len=3, response_len=2)
        except ValueError:
            continue
        assert routes.shape[0] == 4
        assert routes.dtype in (np.uint8, np.uint16)


def payload(data: bytes) -> None:
    """A payload whose CRC is right and whose content is anybody's."""
    try:
        unpacked = unpack_payload(data)
    except FormatError:
        return
    _decode(unpacked)


def _decode(unpacked: Payload) -> None:
    for read in (_trace, lambda one: _delta(one, BASE), decode_score, _small):
        try:
            read(unpacked)
        except FormatError:
            continue


def _trace(unpacked: Payload) -> Trace:
    return resolve([decode_trace(unpacked)])


def _delta(unpacked: Payload, base: Trace) -> Trace:
    return resolve([decode_trace(unpacked)], base)


def _small(unpacked: Payload) -> None:
    for kind in range(8):
        try:
            decode_small(kind, unpacked)
        except FormatError:
            continue


def record(data: bytes) -> None:
    """One record, its CRC made right, so that what lies behind it is reached."""
    header = parse_header(_mended(data))
    if header is None:
        return
    try:
        _decode(unpack_payload(unpack_frame(header, data[HEADER_BYTES:][: header.frame_bytes])))
    except FormatError:
        return


def _mended(data: bytes) -> bytes:
    """The bytes with the CRC that they should have in the place where it stands."""
    if len(data) < HEADER_BYTES:
        return data
    fields, frame = data[: HEADER_BYTES - 4], data[HEADER_BYTES:]
    crc = google_crc32c.extend(google_crc32c.value(fields), frame)
    return fields + int(crc).to_bytes(4, "little") + frame


BASE = make_trace()
"""What a delta is read against."""

_FILE = os.memfd_create("driftgate-fuzz")
_PATH = Path(f"/proc/self/fd/{_FILE}")
"""A file in memory: emptying one on a disk takes longer than all the rest of a case."""


def _as_file(data: bytes) -> Path:
    os.ftruncate(_FILE, 0)
    os.pwrite(_FILE, data, 0)
    return _PATH


def segment(data: bytes) -> None:
    """A segment file with any content behind its header: damage is named, the rest is read.

    What a payload holds is another target's."""
    at = 0
    for item in scan(_as_file(header_bytes("fuzz", 1) + data)):
        start = item.offset if isinstance(item, Entry) else item.start
        assert start >= at
        at = item.end
        if isinstance(item, Entry):
            with suppress(FormatError):
                item.payload()
    try:
        list(scan(_as_file(data)))
    except FormatError:
        return


def _golden() -> bytes:
    (path,) = sorted(GOLDEN.glob("format-v*.dgs"))[-1:]
    return path.read_bytes()


def _records() -> list[bytes]:
    """The records of the golden file."""
    data = _golden()
    starts = [at for at in range(len(data)) if data.startswith(MARKER, at)]
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


def _payloads() -> list[bytes]:
    found = []
    for one in _records():
        header = parse_header(one)
        assert header is not None
        found.append(unpack_frame(header, one[HEADER_BYTES:]))
    return found


def _segments() -> list[bytes]:
    parts = _records()
    return [b"".join(parts[:count]) for count in accumulate([1, 1, 2])]


TARGETS: tuple[Target, ...] = (
    Target("splitter", "SSE cut into events", splitter, lambda: [_stream()]),
    Target("events", "SSE stripped and folded", events, lambda: [_stream()]),
    Target("answer", "JSON answer stripped and folded", answer, _answers),
    Target("pieces", "JSON answer taken apart", pieces, _answers),
    Target("ids", "token ids from digits", ids, lambda: [b"[1, 2,3]", b"[]", b"[2147483648]"]),
    Target("error", "error body as an event", error_body, _answers),
    Target(
        "request",
        "request rewritten and placed",
        request,
        lambda: [
            msgspec.json.encode(REQUEST),
            msgspec.json.encode({"prompt": [[1, 2], [3]], "logprobs": 1}),
        ],
    ),
    Target(
        "npy",
        "routes in a .npy",
        npy,
        lambda: [
            _npy(np.zeros((4, 2, 2), np.uint8)),
            _routes().encode(),
        ],
    ),
    Target("payload", "payload of a record", payload, _payloads),
    Target("record", "record behind a right CRC", record, _records),
    Target("segment", "segment file", segment, _segments),
)


def _canary(data: bytes) -> None:
    assert not sse.Splitter().feed(data), "found"


CANARY = Target("canary", "SSE in which no event ever ends", _canary, lambda: [b"data: x\n"])
"""Shows that a run finds what there is to find."""

"""What is fuzzed: each function that reads bytes which somebody else wrote.

A target takes any bytes and returns, or raises what it may not: every other outcome than the errors
that are listed for it is a find. Besides not crashing, most hold an invariant or are compared with
a slower way to the same result.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
    Translated,
    read_request,
    rewrite,
    strip_answer,
    strip_event,
)
from driftgate.gateway.pieces import Pieces, take_apart
from driftgate.gateway.prompts import read_prompt
from driftgate.gateway.reading import translate
from driftgate.gateway.synthesis import error_event, stream_of
from driftgate.gateway.tape import Tape
from driftgate.storage.codec import (
    HEADER_BYTES,
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
from reliability import fuzz_corpus as corpus

__all__ = ["CANARY", "TARGETS", "Target"]

ADAPTER = Vllm()
LIMIT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """One fuzzed function."""

    name: str
    what: str
    check: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]


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
    """As a strict parser sees it: half of a surrogate pair is no character."""
    try:
        text = (data or b"-").decode()
        json.dumps(json.loads(text), ensure_ascii=False).encode()
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


def translated(data: bytes) -> None:
    """A request of another API becomes a chat request, or is refused in words."""
    try:
        fields = read_request(data)
    except RequestError:
        return
    foreign: tuple[Translated, ...] = ("responses", "messages")
    for api in foreign:
        with suppress(RequestError):
            translate(api, data, fields, [], None)


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


TARGETS: tuple[Target, ...] = (
    Target("splitter", "SSE cut into events", splitter, lambda: [corpus.stream()]),
    Target("events", "SSE stripped and folded", events, lambda: [corpus.stream()]),
    Target("answer", "JSON answer stripped and folded", answer, corpus.answers),
    Target("pieces", "JSON answer taken apart", pieces, corpus.answers),
    Target("ids", "token ids from digits", ids, lambda: [b"[1, 2,3]", b"[]", b"[2147483648]"]),
    Target("error", "error body as an event", error_body, corpus.answers),
    Target(
        "request",
        "request rewritten and placed",
        request,
        lambda: [
            msgspec.json.encode(corpus.REQUEST),
            msgspec.json.encode({"prompt": [[1, 2], [3]], "logprobs": 1}),
        ],
    ),
    Target(
        "translated",
        "request of another API",
        translated,
        lambda: [msgspec.json.encode(one) for one in (corpus.RESPONSES, corpus.MESSAGES)],
    ),
    Target(
        "npy",
        "routes in a .npy",
        npy,
        lambda: [
            corpus.npy(np.zeros((4, 2, 2), np.uint8)),
            corpus.routes().encode(),
        ],
    ),
    Target("payload", "payload of a record", payload, corpus.payloads),
    Target("record", "record behind a right CRC", record, corpus.records),
    Target("segment", "segment file", segment, corpus.segments),
)


def _canary(data: bytes) -> None:
    assert not sse.Splitter().feed(data), "found"


CANARY = Target("canary", "SSE in which no event ever ends", _canary, lambda: [b"data: x\n"])
"""Shows that a run finds what there is to find."""

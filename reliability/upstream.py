"""The engine breaks: each way as a script, and what must be stored and seen then."""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from driftgate.storage import Reader
from reliability.agent import Seen, ask, path_of
from reliability.answers import Said, request, say
from reliability.engine import SSE_HEAD, End, Engine, Script, chunked, json_head, serve_engine, well
from reliability.gateway import Gateway, running, until
from reliability.verdict import Call, Row, read_call

__all__ = ["FAULTS", "Fault", "drip", "run"]

Parts = Iterator[bytes | float | End]

PATIENCE_S, SILENT_PATIENCE_S = 30.0, 0.7
"""Of the agent; the second where the engine stays silent anyway."""

BIG_BYTES = 10 << 20


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to break."""

    title: str
    stream: bool
    script: Script
    reason: str | None
    """Pattern of what the store must say is missing; None: the record must be whole."""
    garbled: bool = False
    """The agent gets a body that is no JSON, directly and through the gateway."""
    unframed: bool = False
    """The answer breaks HTTP itself, for which a proxy's word is 502 (RFC 9112, 6.3)."""
    changed: Callable[[Said], Said] = lambda said: said
    """What the engine says instead of the usual answer."""


def reset_at_once(_said: Said, _stream: bool) -> Parts:
    yield End.RESET


def in_the_head(_said: Said, _stream: bool) -> Parts:
    yield json_head(9)[:30]
    yield End.RESET


def in_the_body(said: Said, _stream: bool) -> Parts:
    body = said.chat()
    yield json_head(len(body)) + body[: len(body) // 2]
    yield 0.05
    yield End.RESET


def in_an_event(said: Said, _stream: bool) -> Parts:
    events = said.events()
    yield SSE_HEAD + chunked(*events[:4], events[4][:20], end=False)
    yield 0.05
    yield End.RESET


def after_the_end(said: Said, _stream: bool) -> Parts:
    yield SSE_HEAD + chunked(*said.events(), end=False)
    yield 0.05
    yield End.RESET


def never(_said: Said, _stream: bool) -> Parts:
    yield End.HANG


def drip(said: Said, stream: bool, *, pause_s: float, count: int) -> Parts:
    """The first ``count`` bytes one by one."""
    (whole,) = well(said, stream)
    assert isinstance(whole, bytes)
    for i in range(count):
        yield whole[i : i + 1]
        yield pause_s
    yield whole[count:]


def short_length(said: Said, _stream: bool) -> Parts:
    body = said.chat()
    yield json_head(len(body) - 20) + body


def long_length(said: Said, _stream: bool) -> Parts:
    body = said.chat()
    yield json_head(len(body) + 20) + body
    yield 0.05
    yield End.CLOSE


def bad_chunk(said: Said, _stream: bool) -> Parts:
    yield SSE_HEAD + chunked(*said.events()[:4], end=False)
    yield 0.05
    yield b"zz\r\n"
    yield End.CLOSE


def zipped(said: Said, _stream: bool, *, cut: int) -> Parts:
    body = gzip.compress(said.chat(), mtime=0)
    yield json_head(len(body) - cut, b"content-encoding: gzip\r\n") + body[: len(body) - cut]


def error_event(said: Said, _stream: bool) -> Parts:
    error = b'data: {"error":{"message":"out of memory","type":"e","code":500}}\n\n'
    yield SSE_HEAD + chunked(*said.events()[:4], error, b"data: [DONE]\n\n")


def no_end(said: Said, _stream: bool) -> Parts:
    yield SSE_HEAD + chunked(*said.events()[:-1])


def two_ends(said: Said, _stream: bool) -> Parts:
    events = said.events()
    yield SSE_HEAD + chunked(*events, events[-1])


def split_characters(said: Said, _stream: bool) -> Parts:
    """Every byte of every event is a chunk of its own."""
    stream = b"".join(said.events())
    yield SSE_HEAD
    for i in range(0, len(stream), 64):
        yield chunked(*(bytes([byte]) for byte in stream[i : i + 64]), end=False)
    yield chunked()


def accented(said: Said) -> Said:
    return replace(said, texts=[f"é{text}…🦊" for text in said.texts])


def big(said: Said) -> Said:
    return replace(said, texts=[*said.texts[:-1], "x" * BIG_BYTES])


def with_logprob(value: float) -> Callable[[Said], Said]:
    return lambda said: replace(said, logprobs=[*said.logprobs[:-1], value])


def fewer_logprobs(said: Said, _stream: bool) -> Parts:
    answer = json.loads(said.chat())
    if said.asked:
        del answer["choices"][0]["logprobs"]["content"][-1]
    body = json.dumps(answer, separators=(",", ":")).encode()
    yield json_head(len(body)) + body


def null_top_logprobs(said: Said, _stream: bool) -> Parts:
    body = said.chat().replace(b'"top_logprobs":[]', b'"top_logprobs":null')
    yield json_head(len(body)) + body


def routes(make: Callable[[int], bytes], said: Said, _stream: bool) -> Parts:
    rows = len(said.prompt_ids) + len(said.ids) - 1
    encoded = base64.b64encode(make(rows)).decode()
    body = said.chat(routed_experts=encoded)
    yield json_head(len(body)) + body


def npy(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], **how: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **how)
    return file.getvalue()


def lying(rows: int) -> bytes:
    """A header that promises a thousand times what comes."""
    honest = npy(np.zeros((rows, 2, 2), np.uint8))
    return honest.replace(b"(%d, 2, 2), }   " % rows, b"(%d000, 2, 2), }" % rows)


def pickled(rows: int) -> bytes:
    array = np.empty((rows, 2, 2), object)
    array[:] = 1
    return npy(array, allow_pickle=True)


BROKEN = "the engine broke off its answer"
CLOSED = "the engine closed the connection|the connection to the engine broke"
NO_HTTP = "the engine's answer is no valid HTTP"
NO_JSON = "not a completion"
ROUTED = "^routed_experts: "


def zeros(rows: int, *rest: int, dtype: type = np.uint8) -> bytes:
    return npy(np.zeros((rows, *rest), dtype))


def npy_of(make: Callable[[int], bytes]) -> Script:
    return partial(routes, make)


FAULTS = {
    # First: a gateway looks at an engine that broke before it asks it again.
    "never": Fault("never answers", False, never, "the client left"),
    "never-s": Fault("never answers a stream", True, never, "the client left"),
    "reset-before": Fault("resets before the headers", False, reset_at_once, CLOSED),
    "reset-before-s": Fault("resets before a stream's headers", True, reset_at_once, CLOSED),
    "reset-head": Fault("resets in the middle of the headers", False, in_the_head, CLOSED),
    "reset-body": Fault("resets in the middle of a JSON body", False, in_the_body, BROKEN),
    "reset-event": Fault("resets in the middle of an event", True, in_an_event, "^end: .*broke"),
    "reset-end": Fault("resets after the terminal event", True, after_the_end, None),
    "drip": Fault("one byte at a time, JSON", False, partial(drip, pause_s=0.002, count=150), None),
    "drip-s": Fault("one byte at a time", True, partial(drip, pause_s=0.002, count=150), None),
    "length-short": Fault(
        "content-length too short",
        False,
        short_length,
        f"{NO_JSON}|{NO_HTTP}",
        garbled=True,
        unframed=True,
    ),
    "length-long": Fault("content-length too long", False, long_length, BROKEN),
    "bad-chunk": Fault("bad chunk size", True, bad_chunk, "^end: .*broke"),
    "gzip": Fault("gzip", False, partial(zipped, cut=0), "compressed", garbled=True),
    "gzip-cut": Fault(
        "gzip, truncated", False, partial(zipped, cut=30), "compressed", garbled=True
    ),
    "error-event": Fault("200 with an error event", True, error_event, "out of memory"),
    "no-end": Fault("no terminal event", True, no_end, r"without data: \[DONE\]"),
    "two-ends": Fault("two terminal events", True, two_ends, None),
    "utf8": Fault("UTF-8 split over chunks", True, split_characters, None, changed=accented),
    "big": Fault("10 MB in one event", True, well, None, changed=big),
    "nan": Fault("NaN logprob", False, well, NO_JSON, changed=with_logprob(math.nan)),
    "nan-s": Fault(
        "NaN logprob in a stream",
        True,
        well,
        "events: 1 cannot be read",
        changed=with_logprob(math.nan),
    ),
    "floor": Fault("logprob -9999", False, well, None, changed=with_logprob(-9999.0)),
    "null-top": Fault("null top_logprobs", False, null_top_logprobs, None),
    "fewer": Fault("fewer logprobs than ids", False, fewer_logprobs, r"\d rows came for \d ids"),
    "routes-rows": Fault(
        "routes: a row too few", False, npy_of(lambda n: zeros(n - 1, 2, 2)), ROUTED
    ),
    "routes-dim": Fault("routes: two dimensions", False, npy_of(lambda n: zeros(n, 2)), ROUTED),
    "routes-dtype": Fault(
        "routes: floats", False, npy_of(lambda n: zeros(n, 2, 2, dtype=float)), ROUTED
    ),
    "routes-pickle": Fault("routes: a pickle in .npy", False, npy_of(pickled), ROUTED),
    "routes-raw": Fault(
        "routes: a bare pickle", False, npy_of(lambda n: pickle.dumps([n])), ROUTED
    ),
    "routes-lying": Fault("routes: a lying header", False, npy_of(lying), ROUTED),
}


def scripts() -> dict[str, Script]:
    """For the engine; the answers are changed before they are sent."""

    def script(fault: Fault, said: Said, stream: bool) -> Parts:
        return fault.script(fault.changed(said), stream)

    return {name: partial(script, fault) for name, fault in FAULTS.items()}


def same(fault: Fault, direct: Seen, proxied: Seen) -> bool:
    """The agent is told what it would have been told without us.

    A transport that broke before the first byte of the answer is a 502 through any proxy; a JSON
    answer is read as a whole before its first byte is passed on.
    """
    if fault.unframed and proxied.status == 502:
        return True
    if direct.ended == "whole":
        alike = proxied.body == direct.body or (fault.garbled and not _decodes(proxied.body))
        return proxied.ended == "whole" and proxied.status == direct.status and alike
    if direct.ended == "cut" and fault.stream and direct.status is not None:
        shown = proxied.body
        return proxied.ended == "cut" and shown.rpartition(b"\n\n")[0] in direct.body
    return proxied.ended == "silent" if direct.ended == "silent" else proxied.status == 502


def _decodes(body: bytes) -> bool:
    try:
        json.loads(body)
    except ValueError:
        return False
    return True


async def one(name: str, number: int, engine: Engine, gateway: Gateway, row: Row) -> None:
    """One fault, directly and through the gateway, and the next call."""
    fault, call = FAULTS[name], f"{name}.{number}"
    body = request(name, call, stream=fault.stream)
    patience_s = SILENT_PATIENCE_S if fault.script is never else PATIENCE_S
    direct = await ask(engine.url, body, patience_s=patience_s)
    proxied = await ask(gateway.url, body, path=path_of(call), patience_s=patience_s)
    after = await _call(gateway, f"{call}-next", stream=fault.stream)
    row.tries += 1
    row.saw = f"{proxied.words} (direct: {direct.words})"
    row.check(same(fault, direct, proxied), f"{call}: saw {proxied.words}, not {direct.words}")
    row.check(after.seen.answered, f"{call}: the next call saw {after.seen.words}")
    await gateway.drained()
    said = fault.changed(say(call, asked=True))
    asked = Call(said, call, body, proxied)
    if fault.reason is None:
        row.judge(gateway.store, [asked, after])
        return
    row.judge(gateway.store, [after])
    reader = Reader(gateway.store)
    # The outcome of what cannot be kept comes when the writer has given it up.
    await until(lambda: not read_call(reader, asked).still_open)
    stored = read_call(reader, asked)
    reader.close()
    row.says(stored.reasons, fault.reason)
    row.check(not stored.has(asked), f"{call}: a part counts as whole")
    row.check(stored.wrong(asked) == 0, f"{call}: a trace differs from what was sent")
    if stored.known == 0 or stored.still_open:
        row.lose(f"{call}: {stored.known} calls known, {stored.still_open} open")


async def _call(gateway: Gateway, name: str, *, stream: bool) -> Call:
    body = request("well", name, stream=stream)
    seen = await ask(gateway.url, body, path=path_of(name))
    return Call(say(name, asked=True), name, body, seen)


async def refuses(folder: Path, tries: int) -> Row:
    """The engine's port is closed."""
    row = Row("refuses the connection")
    with _closed_port() as url:
        async with running(url, folder / "refused", ready="/healthz") as gateway:
            for number in range(tries):
                name = f"refuse.{number}"
                body = request("well", name, stream=bool(number % 2))
                seen = await ask(gateway.url, body, path=path_of(name))
                row.tries, row.saw = row.tries + 1, f"{seen.words} (direct: refused)"
                row.check(seen.status == 502, f"{name}: saw {seen.words}")
                await gateway.drained()
                reader = Reader(gateway.store)
                call = Call(say(name, asked=True), name, body, seen)
                row.says(read_call(reader, call).reasons, "the engine could not be reached")
                reader.close()
    return row


@contextmanager
def _closed_port() -> Iterator[str]:
    """A port that nothing listens at and that nobody else gets."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


async def run(folder: Path, *, full: bool) -> list[Row]:
    """Every fault; ``full``: ten times."""
    rows = [await refuses(folder, 10 if full else 2)]
    async with serve_engine(scripts()) as engine, running(engine.url, folder / "store") as gateway:
        for name, fault in FAULTS.items():
            row = Row(fault.title)
            for number in range(10 if full else 1):
                await one(name, number, engine, gateway, row)
            rows.append(row)
    return rows

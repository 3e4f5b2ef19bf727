"""Splitting server-sent events: the result does not depend on how the bytes were cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftgate.errors import UpstreamError
from driftgate.gateway.sse import Splitter, event_data, replace_data

LINE = st.sampled_from(["data: a", "data:b", ": c", "event: é", "id: 1", "data", 'data: {"x":1}'])
EVENT = st.builds(
    lambda lines, end: (end.join(lines) + end + end).encode(),
    st.lists(LINE, min_size=1, max_size=3),
    st.sampled_from(["\n", "\r\n", "\r"]),
)


def split(chunks: list[bytes]) -> tuple[list[bytes], bytes]:
    splitter = Splitter()
    events = [event for chunk in chunks for event in splitter.feed(chunk)]
    return events, splitter.rest()


@given(st.lists(EVENT, max_size=5), st.sampled_from([b"", b"data: open"]), st.data())
def test_any_chunking_gives_the_same_events(
    events: list[bytes], rest: bytes, data: st.DataObject
) -> None:
    stream = b"".join(events) + rest
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12).map(sorted))
    bounds = [0, *cuts, len(stream)]
    chunks = [stream[a:b] for a, b in itertools.pairwise(bounds)]
    assert split(chunks) == split([stream])
    found, left = split(chunks)
    assert b"".join(found) + left == stream
    if rest:
        assert found == events


@given(st.lists(st.sampled_from([b"\r", b"\n", b"a"]), max_size=12).map(b"".join))
def test_line_ends_of_every_kind_bytewise(stream: bytes) -> None:
    bytewise = [stream[i : i + 1] for i in range(len(stream))]
    assert split(bytewise) == split([stream])


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\r\n\r\n", b"{}"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"event: x\ndata:  a\n\n", b" a"),
        (b": keep-alive\n\n", None),
        (b"event: ping\n\n", None),
        (b"data: [DONE]\n\n", b"[DONE]"),
    ],
)
def test_data(event: bytes, data: bytes | None) -> None:
    assert event_data(event) == data


def test_other_fields_survive_a_change_of_data() -> None:
    assert replace_data(b"id: 7\r\ndata: a\r\ndata: b\r\n\r\n", b"c") == b"id: 7\ndata: c\n\n"
    assert replace_data(b"data: a\n\n", b"c") == b"data: c\n\n"


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_an_event_without_its_end_gets_none(end: bytes) -> None:
    assert replace_data(b"data: a" + end, b"c") == b"data: c" + end
    assert event_data(b"data: a" + end) == b"a"


def test_an_event_over_the_limit_is_an_error() -> None:
    splitter = Splitter(max_event_bytes=10)
    assert splitter.feed(b"data: 1\n\ndata: 2") == [b"data: 1\n\n"]
    with pytest.raises(UpstreamError, match="more than 10 bytes"):
        splitter.feed(b"xxxxx")

"""Framing and payloads: what goes in comes out, and nothing that lies is believed."""

from __future__ import annotations

import struct

import google_crc32c
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from driftgate.errors import FormatError
from driftgate.storage import codec
from driftgate.storage.codec import Array

DTYPES = st.sampled_from(["<i4", "<f4", "u1", "<u2"]).map(np.dtype)
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5))
COLUMNS = st.dictionaries(st.text(min_size=1, max_size=8), ARRAYS, max_size=codec.MAX_COLUMNS)


def record_of(payload: bytes, *, kind: int = 1, time_ns: int = 9) -> bytes:
    return codec.pack_record(kind, payload, time_ns=time_ns)


def parsed(record: bytes) -> tuple[codec.Header, bytes]:
    header = codec.parse_header(record)
    assert header is not None
    return header, record[codec.HEADER_BYTES :]


@given(COLUMNS)
def test_payload_round_trip(columns: dict[str, Array]) -> None:
    got = codec.unpack_payload(codec.pack_payload(b'{"x":1.50}', columns))
    assert got.head == b'{"x":1.50}'
    assert list(got.columns) == list(columns)
    for name, array in columns.items():
        assert got.columns[name].tobytes() == array.tobytes()
        assert got.columns[name].shape == array.shape
        assert got.columns[name].dtype == array.dtype


def test_columns_are_aligned_and_little_endian() -> None:
    payload = codec.pack_payload(b"{}", {"a": b"xyz", "b": np.array([1, 258], ">i4").astype("i4")})
    (json_bytes,) = struct.unpack_from("<I", payload)
    start = -(-(4 + json_bytes) // 8) * 8
    assert payload[start:] == b"xyz" + bytes(5) + b"\x01\0\0\0\x02\x01\0\0"


def test_record_bytes_are_as_specified() -> None:
    payload = codec.pack_payload(b"{}", {})
    record = record_of(payload, kind=3, time_ns=77)
    frame = record[28:]
    fields = struct.pack("<4sBBHIIQ", b"\xd9REC", 3, 0, 0, len(frame), len(payload), 77)
    assert record[:24] == fields
    assert struct.unpack_from("<I", record, 24) == (google_crc32c.value(fields + frame),)
    assert zstandard.ZstdDecompressor().decompress(frame) == payload


def test_crc_is_castagnoli() -> None:
    assert google_crc32c.value(b"123456789") == 0xE3069283


def test_every_flipped_bit_is_detected() -> None:
    record = record_of(codec.pack_payload(b'{"k":"v"}', {"a": b"abc"}))
    for bit in range(8 * len(record)):
        bad = bytearray(record)
        bad[bit // 8] ^= 1 << bit % 8
        header = codec.parse_header(bytes(bad))
        if header is not None:
            assert not codec.whole(header, bytes(bad[:28]), bytes(bad[28:]))


@pytest.mark.parametrize("field", [8, 12])
def test_a_length_over_the_limit_is_no_header(field: int) -> None:
    record = bytearray(record_of(codec.pack_payload(b"{}", {})))
    struct.pack_into("<I", record, field, codec.MAX_FRAME_BYTES + 1)
    assert codec.parse_header(bytes(record)) is None


def test_a_frame_that_claims_another_size_is_refused_before_decompression() -> None:
    frame = zstandard.ZstdCompressor().compress(bytes(1 << 20))
    header = codec.Header(1, len(frame), 1000, 0, 0)
    with pytest.raises(FormatError, match="frame holds 1048576 bytes, header says 1000"):
        codec.unpack_frame(header, frame)


def test_a_frame_without_content_size_is_refused() -> None:
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 100)
    with pytest.raises(FormatError):
        codec.unpack_frame(codec.Header(1, len(frame), 100, 0, 0), frame)


def test_bytes_after_the_frame_are_refused() -> None:
    header, frame = parsed(record_of(codec.pack_payload(b"{}", {})))
    with pytest.raises(FormatError):
        codec.unpack_frame(header, frame + frame)


def directory(**change: object) -> bytes:
    column = {"name": "a", "dtype": "int32", "shape": [2], "offset": 0, "length": 8} | change
    import msgspec

    json = msgspec.json.encode({"head": {}, "columns": [column]})
    front = struct.pack("<I", len(json)) + json
    return front + bytes(-len(front) % 8) + bytes(8)


def test_the_unchanged_directory_is_right() -> None:
    assert codec.unpack_payload(directory()).columns["a"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float64"},
        {"dtype": "object"},
        {"shape": []},
        {"shape": [1, 1, 1, 2]},
        {"shape": [-2]},
        {"shape": [2**40, 2**40]},
        {"shape": [3]},
        {"shape": [2**31], "length": 2**33},
        {"shape": [0, 2**62, 2**62], "length": 0},
        {"offset": 8},
        {"offset": 4},
        {"offset": -8},
        {"name": 1},
    ],
)
def test_a_lying_directory_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        codec.unpack_payload(directory(**change))


@pytest.mark.parametrize(
    "payload", [b"", b"\0", b"\xff\xff\xff\xff{}", b"\x02\0\0\0{}", b"\x01\0\0\0{"]
)
def test_a_broken_payload_is_refused(payload: bytes) -> None:
    with pytest.raises(FormatError):
        codec.unpack_payload(payload)


def test_deeply_nested_json_is_refused() -> None:
    json = b'{"head":' + b"[" * 200_000 + b"]" * 200_000 + b',"columns":[]}'
    with pytest.raises(FormatError):
        codec.unpack_payload(struct.pack("<I", len(json)) + json + bytes(8))


@given(st.binary(max_size=200))
def test_any_bytes_give_a_payload_or_a_format_error(data: bytes) -> None:
    try:
        codec.unpack_payload(data)
    except FormatError:
        return


def test_arrays_the_format_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        codec.pack_payload(b"{}", {"a": np.zeros(2)})
    with pytest.raises(ValueError, match="dimensions"):
        codec.pack_payload(b"{}", {"a": np.zeros((1, 1, 1, 1), np.uint8)})

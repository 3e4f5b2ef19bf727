"""Bytes of records and payloads, as FORMAT.md specifies them: pure, no files, no clocks.

Refuses every length, count and shape that is over a limit before it allocates for it. Knows nothing
of traces and scores (``driftgate.storage.records``) or of files (``driftgate.storage.segments``).
"""

from __future__ import annotations

import functools
import math
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import msgspec
import numpy as np
import numpy.typing as npt
import zstandard

from driftgate.errors import UNREADABLE, FormatError, StorageError

__all__ = [
    "HEADER_BYTES",
    "MARKER",
    "Array",
    "Header",
    "Payload",
    "dtype_name",
    "pack_payload",
    "pack_record",
    "parse_header",
    "unpack_frame",
    "unpack_payload",
    "whole",
]

Array = npt.NDArray[Any]

MARKER = b"\xd9REC"
"""Starts every record. Not ASCII at its head, so it is rare in text and JSON and a search for it is
cheap."""

MAX_FRAME_BYTES = 1 << 30
"""256k tokens of 94 layers x 8 experts in uint16 are 385 MB; twice that fits, a length gone wild
does not."""

MAX_PAYLOAD_BYTES = 1 << 30
"""The same, before compression: bounds what one bad record can make a reader allocate."""

MAX_JSON_BYTES = 16 << 20
"""Metadata is about 1 kB, the sums of a score about 10 kB; bodies are columns."""

MAX_COLUMNS = 16
"""A trace has nine."""

MAX_DIMS = 3
"""Routes are [rows, L, K]."""

LEVEL = 1
"""zstd level: routes hardly compress at any level, level 1 runs at about 1 GB/s."""

ALIGN = 8

_HEADER = struct.Struct("<4sBBHIIQ")
_U32 = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _U32.size
"""28: header fields and their CRC."""

_DTYPES: dict[str, np.dtype[Any]] = {
    "int32": np.dtype("<i4"),
    "float32": np.dtype("<f4"),
    "uint8": np.dtype("u1"),
    "uint16": np.dtype("<u2"),
}


class _Compressor(threading.local):
    """One for each thread: it must not be shared, and making one costs more than a small record."""

    def __init__(self) -> None:
        self.compress = zstandard.ZstdCompressor(level=LEVEL).compress


_compressor = _Compressor()


@dataclass(frozen=True, slots=True)
class Header:
    """Fixed part of a record, checked against the limits but not yet against the CRC."""

    kind: int
    frame_bytes: int
    payload_bytes: int
    time_ns: int
    crc: int

    @property
    def record_bytes(self) -> int:
        """Header and frame."""
        return HEADER_BYTES + self.frame_bytes


class _Column(msgspec.Struct, frozen=True):
    name: str
    dtype: str
    shape: list[int]
    offset: int
    length: int


class _Envelope(msgspec.Struct, frozen=True):
    head: msgspec.Raw
    columns: list[_Column] = []


@dataclass(frozen=True, slots=True)
class Payload:
    """JSON head and named arrays (read-only views of one buffer) of a record."""

    head: bytes
    columns: Mapping[str, Array]

    def bytes_of(self, name: str) -> bytes:
        """A uint8 column as bytes; FormatError where it is missing."""
        return self.required(name).tobytes()

    def required(self, name: str) -> Array:
        """A column that the record kind always has; FormatError where it is missing."""
        column = self.columns.get(name)
        if column is None:
            raise FormatError(f"record has no column {name!r}, only {sorted(self.columns)}")
        return column


def pack_payload(head: bytes, columns: Mapping[str, Array | bytes | None]) -> bytes:
    """JSON ``head`` and ``columns`` (None: no column) as one payload.

    ValueError for an array whose dtype or number of dimensions the format does not have;
    StorageError over a size limit.
    """
    directory: list[_Column] = []
    chunks: list[Any] = []
    offset = 0
    for name, value in columns.items():
        if value is None:
            continue
        column, data = _column(name, value, offset)
        directory.append(column)
        padding = -column.length % ALIGN
        chunks += [data, bytes(padding)]
        offset += column.length + padding
    json = msgspec.json.encode(_Envelope(msgspec.Raw(head), directory))
    if len(json) > MAX_JSON_BYTES:
        raise StorageError(f"record JSON of {len(json)} bytes is over {MAX_JSON_BYTES}")
    start = _aligned(_U32.size + len(json))
    if start + offset > MAX_PAYLOAD_BYTES:
        raise StorageError(f"record of {start + offset} bytes is over {MAX_PAYLOAD_BYTES}")
    front = (_U32.pack(len(json)) + json).ljust(start, b"\0")
    return b"".join([front, *chunks])


def unpack_payload(payload: bytes) -> Payload:
    """Inverse of ``pack_payload``; FormatError for anything FORMAT.md does not allow."""
    if len(payload) < _U32.size:
        raise FormatError(f"payload of {len(payload)} bytes has no JSON length")
    (json_bytes,) = _U32.unpack_from(payload)
    if json_bytes > min(MAX_JSON_BYTES, len(payload) - _U32.size):
        raise FormatError(f"JSON of {json_bytes} bytes in a payload of {len(payload)}")
    end = _U32.size + json_bytes
    try:
        envelope = msgspec.json.decode(memoryview(payload)[_U32.size : end], type=_Envelope)
    except UNREADABLE as error:
        raise FormatError(f"record JSON: {error}") from error
    columns = _read_columns(payload, envelope.columns, _aligned(end))
    return Payload(bytes(envelope.head), columns)


def pack_record(kind: int, payload: bytes, *, time_ns: int) -> bytes:
    """One whole record: header, CRC and frame."""
    frame = _compressor.compress(payload)
    if len(frame) > MAX_FRAME_BYTES:
        raise StorageError(f"frame of {len(frame)} bytes is over {MAX_FRAME_BYTES}")
    fields = _HEADER.pack(MARKER, kind, 0, 0, len(frame), len(payload), time_ns)
    crc = google_crc32c.extend(google_crc32c.value(fields), frame)
    return b"".join([fields, _U32.pack(crc), frame])


def parse_header(data: bytes | memoryview) -> Header | None:
    """The header at the start of ``data``; None where no record can start."""
    if len(data) < HEADER_BYTES:
        return None
    marker, kind, flags, reserved, frame, payload, time_ns = _HEADER.unpack_from(data)
    if marker != MARKER or flags or reserved:
        return None
    if frame > MAX_FRAME_BYTES or payload > MAX_PAYLOAD_BYTES:
        return None
    (crc,) = _U32.unpack_from(data, _HEADER.size)
    return Header(kind, frame, payload, time_ns, crc)


def whole(header: Header, head: bytes, frame: bytes) -> bool:
    """Whether ``frame`` has all its bytes and, with ``head``, the CRC that ``header`` says."""
    if len(frame) != header.frame_bytes:
        return False
    crc = google_crc32c.extend(google_crc32c.value(head[: _HEADER.size]), frame)
    return bool(crc == header.crc)


def unpack_frame(header: Header, frame: bytes | memoryview) -> bytes:
    """Payload of a whole record; FormatError where the frame is not what the header says."""
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        if size != header.payload_bytes:
            raise FormatError(f"frame holds {size} bytes, header says {header.payload_bytes}")
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"record frame: {error}") from error


def _aligned(offset: int) -> int:
    return offset + -offset % ALIGN


@functools.lru_cache(maxsize=64)
def dtype_name(dtype: np.dtype[Any]) -> str:
    """``dtype.name``, which numpy makes anew each time, at the cost of copying a column."""
    return dtype.name


def _column(name: str, value: Array | bytes, offset: int) -> tuple[_Column, Any]:
    """Directory entry and contiguous little-endian data of one column."""
    if isinstance(value, bytes):
        return _Column(name, "uint8", [len(value)], offset, len(value)), value
    dtype = _DTYPES.get(dtype_name(value.dtype))
    if dtype is None or not 1 <= value.ndim <= MAX_DIMS:
        raise ValueError(
            f"column {name!r} is {value.dtype.name}{list(value.shape)}; "
            f"the format has {sorted(_DTYPES)} of 1 to {MAX_DIMS} dimensions"
        )
    data = np.ascontiguousarray(value, dtype=dtype)
    column = _Column(name, dtype_name(dtype), list(value.shape), offset, data.nbytes)
    return column, data


def _read_columns(payload: bytes, directory: Sequence[_Column], start: int) -> dict[str, Array]:
    if len(directory) > MAX_COLUMNS:
        raise FormatError(f"{len(directory)} columns, at most {MAX_COLUMNS}")
    columns: dict[str, Array] = {}
    free = 0
    for column in directory:
        dtype = _DTYPES.get(column.dtype)
        if dtype is None or not 1 <= len(column.shape) <= MAX_DIMS or min(column.shape) < 0:
            raise FormatError(f"column {column}: dtype or shape the format does not have")
        if column.name in columns or column.offset < free or column.offset % ALIGN:
            raise FormatError(f"column {column}: doubled, overlapping or not aligned")
        if max(column.shape) > MAX_PAYLOAD_BYTES:  # also where another dimension is 0
            raise FormatError(f"column {column}: a dimension over {MAX_PAYLOAD_BYTES}")
        if math.prod(column.shape) * dtype.itemsize != column.length:
            raise FormatError(f"column {column}: length is not shape x item size")
        free = column.offset + column.length
        if start + free > len(payload):
            raise FormatError(f"column {column}: ends after the payload of {len(payload)} bytes")
        data = np.frombuffer(payload, np.uint8)[start + column.offset : start + free]
        try:
            columns[column.name] = data.view(dtype).reshape(column.shape)
        except ValueError as error:  # numpy bounds the product of the other dimensions too
            raise FormatError(f"column {column}: {error}") from error
    return columns

"""Segments on disk: torn tails, damage, and lies about lengths never give a wrong record."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from driftgate.errors import FormatError
from driftgate.storage import read_segment
from driftgate.storage.codec import HEADER_BYTES, MARKER, pack_payload, pack_record
from driftgate.storage.segments import (
    Damage,
    Entry,
    SegmentFile,
    header_bytes,
    read_entry,
    scan,
    take_over,
)

HEADER = header_bytes("gateway", 5)
RECORDS = [pack_record(3, pack_payload(b'{"n":%d}' % n, {}), time_ns=n) for n in range(3)]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def heads(path: Path) -> list[bytes]:
    return [entry.payload().head for entry in read_segment(path)]


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "s", HEADER + b"".join(RECORDS))
    assert heads(path) == [b'{"n":0}', b'{"n":1}', b'{"n":2}']
    assert [entry.header.time_ns for entry in read_segment(path)] == [0, 1, 2]


def test_a_tail_torn_at_any_byte_loses_only_the_torn_record(tmp_path: Path) -> None:
    whole = HEADER + b"".join(RECORDS)
    ends = [len(HEADER) + sum(map(len, RECORDS[: n + 1])) for n in range(3)]
    for size in range(len(HEADER), len(whole) + 1):
        path = write(tmp_path / "s", whole[:size])
        kept = sum(end <= size for end in ends)
        assert heads(path) == [b'{"n":%d}' % n for n in range(kept)]


def test_a_tail_of_zeros_or_noise_is_no_record(tmp_path: Path) -> None:
    for tail in (bytes(100), os.urandom(100), MARKER * 20, MARKER + bytes(100)):
        assert len(heads(write(tmp_path / "s", HEADER + RECORDS[0] + tail))) == 1


def test_any_damaged_byte_costs_its_record_only(tmp_path: Path) -> None:
    start, end = len(HEADER) + len(RECORDS[0]), len(HEADER) + len(RECORDS[0] + RECORDS[1])
    for at in range(start, end):
        data = bytearray(HEADER + b"".join(RECORDS))
        data[at] ^= 0x41
        path = write(tmp_path / "s", bytes(data))
        assert heads(path) == [b'{"n":0}', b'{"n":2}']
        assert [item for item in scan(path) if isinstance(item, Damage)] == [Damage(start, end)]


def test_a_huge_frame_length_is_not_allocated(tmp_path: Path) -> None:
    lie = struct.pack("<4sBBHIIQI", MARKER, 1, 0, 0, 1 << 30, 1 << 30, 0, 0)
    assert heads(write(tmp_path / "s", HEADER + RECORDS[0] + lie + bytes(50))) == [b'{"n":0}']


@pytest.mark.parametrize("at", range(len(HEADER)))
def test_a_damaged_segment_header_is_refused(tmp_path: Path, at: int) -> None:
    data = bytearray(HEADER + RECORDS[0])
    data[at] ^= 0x40
    with pytest.raises(FormatError):
        heads(write(tmp_path / "s", bytes(data)))


@pytest.mark.parametrize("size", range(len(HEADER)))
def test_a_short_segment_header_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(FormatError):
        heads(write(tmp_path / "s", HEADER[:size]))


def test_a_newer_version_says_upgrade(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"version 2.*upgrade"):
        heads(write(tmp_path / "s", HEADER[:8] + b"\x02\0" + HEADER[10:]))


def test_header_bytes_are_as_specified() -> None:
    assert HEADER[:24] == b"DGSEG\r\n\x1a" + struct.pack("<HHIQ", 1, 0, 7, 5)
    assert HEADER[24:31] == b"gateway"


def test_one_record_by_offset(tmp_path: Path) -> None:
    path = write(tmp_path / "s", HEADER + b"".join(RECORDS))
    second = len(HEADER) + len(RECORDS[0])
    assert read_entry(path, second).payload().head == b'{"n":1}'
    with pytest.raises(FormatError, match="no whole record"):
        read_entry(path, second + 1)


def test_resynchronising_finds_a_marker_across_search_blocks(tmp_path: Path) -> None:
    block = 1 << 20  # as segments.SEARCH_BYTES
    for junk in range(block - 6, block + 2):
        items = list(scan(write(tmp_path / "s", HEADER + b"x" * junk + RECORDS[0])))
        assert items[0] == Damage(len(HEADER), len(HEADER) + junk)
        assert isinstance(items[1], Entry)


def segment(tmp_path: Path) -> SegmentFile:
    (tmp_path / "segments").mkdir(exist_ok=True)
    return SegmentFile(tmp_path, name="gateway", serial=1)


def test_a_live_segment_cannot_be_taken_over(tmp_path: Path) -> None:
    live = segment(tmp_path)
    assert take_over(live.path) is None
    live.close()
    fd = take_over(live.path)
    assert fd is not None
    os.close(fd)


def test_append_and_take_back(tmp_path: Path) -> None:
    file = segment(tmp_path)
    offset = file.append(RECORDS[0])
    assert file.append(RECORDS[1][: HEADER_BYTES + 1]) == offset + len(RECORDS[0])
    file.truncate(offset + len(RECORDS[0]))
    file.append(RECORDS[2])
    file.close()
    assert heads(file.path) == [b'{"n":0}', b'{"n":2}']
    assert not list(tmp_path.glob("segments/*.tmp"))


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x" * 65, "ü"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="writer name"):
        SegmentFile(tmp_path, name=name, serial=1)

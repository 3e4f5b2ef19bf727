"""Segment files: create, append, scan, read one record. The only module that touches segment bytes
on disk.

A segment belongs to the process that holds its lock. Readers never lock and never write; they stop
at the last whole record (FORMAT.md, *Reading*).
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from driftgate.errors import FormatError
from driftgate.storage.codec import (
    HEADER_BYTES,
    MARKER,
    Header,
    Payload,
    parse_header,
    unpack_frame,
    unpack_payload,
    whole,
)

__all__ = [
    "FIRST_SERIAL",
    "Damage",
    "Entry",
    "SegmentFile",
    "fsync_dir",
    "has_living_writer",
    "header_bytes",
    "read_entry",
    "read_segment",
    "records_start",
    "scan",
    "segment_paths",
    "segments_dir",
    "serial_of",
    "series_of",
    "take_over",
]

MAGIC = b"DGSEG\r\n\x1a"
VERSION = 1
SUFFIX = ".dgs"

FIRST_SERIAL = 1
"""Of a writer's segments; the lock of that one says that its writer lives."""

MAX_NAME_BYTES = 64
"""Writer names are for people; this keeps file names far below the 255 bytes that file systems
take."""

MAX_RESYNC_TRIES = 10_000
"""Markers tried after damaged bytes before the rest is left: bounds the time that a hostile file
costs."""

SEARCH_BYTES = 1 << 20
"""Block size of that search."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HEADER = struct.Struct("<8sHHIQ")
_U32 = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Entry:
    """One whole record of a segment; ``frame`` is still compressed."""

    offset: int
    header: Header
    frame: bytes

    @property
    def end(self) -> int:
        """Offset of the byte after the record."""
        return self.offset + self.header.record_bytes

    def payload(self) -> Payload:
        """Decompressed and checked; FormatError where it breaks the format."""
        return unpack_payload(unpack_frame(self.header, self.frame))


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes ``start`` to ``end`` that are no whole record, with whole records after them."""

    start: int
    end: int


class SegmentFile:
    """A segment that this process writes. Not thread-safe: one writer thread owns it."""

    def __init__(self, root: Path, *, name: str, serial: int, start_ns: int | None = None) -> None:
        """Create, lock and sync a new segment; OSError where the disk refuses.

        ``start_ns`` is the writer's start, which its segments share; None: now.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"writer name {name!r}: use 1 to {MAX_NAME_BYTES} of A-Z a-z 0-9 _ -")
        created_ns = time.time_ns()
        start_ns = created_ns if start_ns is None else start_ns
        self.name = f"{name}-{os.getpid()}-{start_ns}-{serial:06d}{SUFFIX}"
        self.path = segments_dir(root) / self.name
        temporary = self.path.with_suffix(".tmp")
        self._fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            self.size = 0
            self.append(header_bytes(name, created_ns))
            self.start = self.committed = self.size
            """Of the first record; of the first that is not synced and in the index."""
            os.fsync(self._fd)
            os.rename(temporary, self.path)
            fsync_dir(self.path.parent)
        except BaseException:
            os.close(self._fd)
            temporary.unlink(missing_ok=True)
            raise

    def append(self, data: bytes) -> int:
        """Write all of ``data``; returns its offset. OSError may leave a part of it behind."""
        start, view = self.size, memoryview(data)
        while view:
            written = os.write(self._fd, view)
            self.size += written
            view = view[written:]
        return start

    def sync(self) -> None:
        """Force what was appended to disk."""
        os.fsync(self._fd)

    def truncate(self, size: int) -> None:
        """Take back everything after ``size``, durably."""
        os.ftruncate(self._fd, size)
        os.lseek(self._fd, size, os.SEEK_SET)
        self.size = size
        os.fsync(self._fd)

    def close(self) -> None:
        """Release the file and its lock."""
        os.close(self._fd)


def header_bytes(name: str, created_ns: int) -> bytes:
    """Header of a segment."""
    encoded = name.encode("ascii")
    fields = _HEADER.pack(MAGIC, VERSION, 0, len(encoded), created_ns) + encoded
    return fields + _U32.pack(google_crc32c.value(fields))


def segments_dir(root: Path) -> Path:
    """Where the segments of a store lie."""
    return root / "segments"


def segment_paths(root: Path) -> list[Path]:
    """Every segment of a store, in a fixed order: by their writers' starts, then name."""
    paths = segments_dir(root).glob(f"*{SUFFIX}")
    return sorted(paths, key=lambda path: (_started(path.name), path.name))


def scan(path: Path, start: int | None = None) -> Iterator[Entry | Damage]:
    """Whole records from offset ``start`` (None: the first), and the damage between them.

    Ends at the torn tail, if there is one. FormatError where the file is no segment of a known
    version, or where so many markers stand in damage that the rest of it is not searched.
    """
    with path.open("rb") as file:
        fd, size = file.fileno(), os.fstat(file.fileno()).st_size
        at = max(_header_end(path, fd), start or 0)
        while at < size:
            entry = _entry_at(fd, at, size)
            if entry is None:
                entry = _resync(path, fd, at + 1, size)
                if entry is None:
                    return
                yield Damage(at, entry.offset)
            yield entry
            at = entry.end


def records_start(path: Path) -> int:
    """Offset of a segment's first record; 0 where the file is none or cannot be read."""
    try:
        with path.open("rb") as file:
            return _header_end(path, file.fileno())
    except (FormatError, OSError):
        return 0


def read_segment(path: Path) -> Iterator[Entry]:
    """Whole records of a segment in order, skipping damage and ending at a torn tail."""
    return (item for item in scan(path) if isinstance(item, Entry))


def read_entry(path: Path, offset: int) -> Entry:
    """The record at ``offset``; FormatError where there is no whole one."""
    with path.open("rb") as file:
        entry = _entry_at(file.fileno(), offset, os.fstat(file.fileno()).st_size)
    if entry is None:
        raise FormatError(
            f"{path} at {offset}: no whole record, the segment is damaged; "
            "`driftgate index rebuild` says what is lost and keeps the rest"
        )
    return entry


def take_over(path: Path) -> int | None:
    """File descriptor of a segment whose writer is gone, locked; None while its writer lives."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        os.close(fd)
        raise
    return fd


def fsync_dir(path: Path) -> None:
    """Make a created or renamed name in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def has_living_writer(root: Path, segment: str) -> bool:
    """Whether the writer of ``segment`` lives: it holds the lock of the first of its series.

    Where that one is missing, or may not be opened, nothing says that it is gone: it counts as
    living.
    """
    path = segments_dir(root) / f"{series_of(segment)}-{FIRST_SERIAL:06d}{SUFFIX}"
    try:
        fd = take_over(path)
    except OSError:
        return True
    if fd is not None:
        os.close(fd)
    return fd is None


def series_of(segment: str) -> str:
    """What the names of one writer's segments have in common."""
    return segment.rpartition("-")[0]


def serial_of(segment: str) -> int:
    """Its place among them, from FIRST_SERIAL; 0 where the name has another form."""
    serial = segment.removesuffix(SUFFIX).rpartition("-")[2]
    return int(serial) if serial.isdecimal() else 0


def _started(name: str) -> int:
    """The writer's start in a segment's name; 0 where the name has another form."""
    parts = name.removesuffix(SUFFIX).rsplit("-", 2)
    return int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else 0


def _header_end(path: Path, fd: int) -> int:
    """Offset of the first record."""
    data = os.pread(fd, _HEADER.size + MAX_NAME_BYTES + _U32.size, 0)
    if len(data) < _HEADER.size or data[: len(MAGIC)] != MAGIC:
        raise FormatError(f"{path}: no driftgate segment (magic differs)")
    _, version, flags, name_bytes, _ = _HEADER.unpack_from(data)
    if version != VERSION:
        raise FormatError(
            f"{path}: format version {version}, this driftgate reads {VERSION}: upgrade it"
        )
    end = _HEADER.size + name_bytes
    if flags or name_bytes > MAX_NAME_BYTES or end + _U32.size > len(data):
        raise FormatError(f"{path}: segment header is damaged")
    if _U32.unpack_from(data, end) != (google_crc32c.value(data[:end]),):
        raise FormatError(f"{path}: segment header is damaged (CRC differs)")
    return int(end + _U32.size)


def _entry_at(fd: int, at: int, size: int) -> Entry | None:
    """The whole record at ``at`` in a file of ``size`` bytes, checked before it is read."""
    head = os.pread(fd, HEADER_BYTES, at)
    header = parse_header(head)
    if header is None or at + header.record_bytes > size:
        return None
    frame = os.pread(fd, header.frame_bytes, at + HEADER_BYTES)
    return Entry(at, header, frame) if whole(header, head, frame) else None


def _resync(path: Path, fd: int, at: int, size: int) -> Entry | None:
    """The next whole record from ``at`` on."""
    for tries, candidate in enumerate(_markers(fd, at)):
        if tries == MAX_RESYNC_TRIES:
            raise FormatError(
                f"{path}: damaged from byte {at - 1} on, and not searched to its end: it has more "
                f"than {MAX_RESYNC_TRIES} markers of records that are none"
            )
        entry = _entry_at(fd, candidate, size)
        if entry is not None:
            return entry
    return None


def _markers(fd: int, at: int) -> Iterator[int]:
    """Offsets of record markers from ``at`` on."""
    while True:
        block = os.pread(fd, SEARCH_BYTES, at)
        found = block.find(MARKER)
        while found >= 0:
            yield at + found
            found = block.find(MARKER, found + 1)
        if len(block) < SEARCH_BYTES:
            return
        at += SEARCH_BYTES - (len(MARKER) - 1)

"""The stored file of every released format version still says what it said, by value."""

from __future__ import annotations

import struct
from pathlib import Path

import google_crc32c
import msgspec
import numpy as np
import pytest
import zstandard

from driftgate.mismatch import Bucket
from driftgate.storage import Reader, read_segment, rebuild_index
from driftgate.storage.records import Kind

GOLDEN = Path(__file__).parents[1] / "golden" / "format-v1.dgs"


def store(tmp_path: Path) -> Reader:
    """A store whose only segment is the golden file."""
    (tmp_path / "segments").mkdir()
    (tmp_path / "segments" / GOLDEN.name).write_bytes(GOLDEN.read_bytes())
    report = rebuild_index(tmp_path)
    assert (report.records, report.torn_bytes, report.damaged_bytes) == (7, 0, 0)
    assert report.unreadable == []
    return Reader(tmp_path)


def test_kinds_and_times() -> None:
    got = [(entry.header.kind, entry.header.time_ns) for entry in read_segment(GOLDEN)]
    T, S = Kind.TRACE, Kind.SCORE
    kinds = [Kind.INTENT, T, T, T, S, Kind.OUTCOME, Kind.REWARD]
    assert got == list(zip(kinds, range(7), strict=True))


def test_the_full_record(tmp_path: Path) -> None:
    trace = store(tmp_path).trace("c0.0")
    assert trace.prompt_ids is not None
    assert trace.response_ids is not None
    assert trace.logprobs is not None
    assert trace.routes is not None
    assert trace.token_offsets is not None
    assert trace.prompt_ids.tolist() == [5, 6, 7, 8]
    assert trace.response_ids.tolist() == [9, 10, 11]
    assert trace.logprobs.view(np.uint32).tolist() == [0xBF000000, 0x7FC00000, 0xFF800000]
    assert trace.routes.dtype == np.uint16
    assert trace.routes.tolist()[0] == [[250, 251], [252, 253]]
    assert trace.routes.reshape(-1).tolist() == list(range(250, 274))
    assert trace.token_bytes.decode() == "aé!"
    assert trace.token_offsets.tolist() == [0, 1, 3, 4]
    assert trace.request == b'{"messages":["one"],"temperature":1.50}'
    assert trace.response == b'{"index":0}'
    assert (trace.meta.trajectory, trace.meta.engine.version) == ("t", "0.29.0")
    assert trace.meta.sampling.seed == 7


def test_the_record_built_on_it(tmp_path: Path) -> None:
    reader = store(tmp_path)
    assert reader.traces("t")[1].base == "c0.0"
    trace = reader.trace("c1.0")
    assert trace.prompt_ids is not None
    assert trace.response_ids is not None
    assert trace.routes is not None
    assert trace.prompt_ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert trace.response_ids.tolist() == [13, 14]
    expected = list(range(250, 274)) + [9] * 12
    expected[4 * 4 + 2 : 4 * 4 + 4] = [1, 2]
    assert trace.routes.reshape(-1).tolist() == expected
    assert trace.request == b'{"messages":["one","two"],"temperature":1.50}'


def test_the_record_without_arrays(tmp_path: Path) -> None:
    trace = store(tmp_path).trace("c2.0")
    arrays = (trace.prompt_ids, trace.response_ids, trace.logprobs, trace.routes)
    assert arrays == (None, None, None, None)
    assert (trace.token_offsets, trace.token_bytes) == (None, b"")
    assert (trace.meta.status, trace.meta.missing) == ("partial", ["token_ids: off"])


def test_the_score(tmp_path: Path) -> None:
    reader = store(tmp_path)
    score = reader.score("c1.0")
    assert score.logprobs.tolist() == [-1.25, -2.0]
    assert score.entropy.tolist() == [0.5, 0.25]
    assert score.logprobs_at_temperature is not None
    assert score.logprobs_at_temperature.tolist() == [-1.5, -2.5]
    assert score.routes is not None
    assert score.routes.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    train, rollout = np.array([-1.25, -2.0]), np.array([-1.0, -2.0])
    stored, fresh = score.meta.bucket, Bucket.of(train, rollout)
    assert stored is not None
    # Gates that were added since this file was written are not in it.
    assert stored.token_hits.items() <= fresh.token_hits.items()
    assert stored.seq_hits.items() <= fresh.seq_hits.items()
    counted = {"token_hits": stored.token_hits, "seq_hits": stored.seq_hits}
    # Another processor's exp ends on another bit.
    again = msgspec.structs.replace(fresh, **counted)
    assert stored.undefined().keys() == again.undefined().keys()
    known = [{k: v for k, v in one.metrics().items() if v is not None} for one in (stored, again)]
    assert known[0] == pytest.approx(known[1], rel=1e-12)
    assert score.meta.worst is not None
    assert (score.meta.worst.token_id, score.meta.worst.log_ratio) == (13, -0.25)
    assert reader.last_seq() == 1


def test_calls_and_reward(tmp_path: Path) -> None:
    reader = store(tmp_path)
    intent = reader.calls("t")[0].intent
    assert intent is not None
    assert (intent.call_id, intent.body_sha256) == ("c0", "0123456789abcdef")
    reward = reader.reward("t")
    assert reward is not None
    assert (reward.value, reward.source, reward.given_ns) == (0.5, "user", 4000)


def test_format_md_is_enough_to_read_it() -> None:
    """The third record, read by nothing but struct, zstd and FORMAT.md."""
    data = GOLDEN.read_bytes()
    assert data[:8] == b"DGSEG\r\n\x1a"
    version, flags, name_bytes, created = struct.unpack_from("<HHIQ", data, 8)
    assert (version, flags, data[24 : 24 + name_bytes]) == (1, 0, b"golden")
    assert created == 1_750_000_000_000_000_000
    at = 28 + name_bytes
    for _ in range(2):
        at += 28 + struct.unpack_from("<I", data, at + 8)[0]
    marker, kind, _, _, frame_bytes, payload_bytes, _, crc = struct.unpack_from(
        "<4sBBHIIQI", data, at
    )
    frame = data[at + 28 : at + 28 + frame_bytes]
    assert (marker, kind) == (b"\xd9REC", 1)
    assert crc == google_crc32c.value(data[at : at + 24] + frame)
    payload = zstandard.ZstdDecompressor().decompress(frame)
    assert len(payload) == payload_bytes
    (json_bytes,) = struct.unpack_from("<I", payload)
    json = msgspec.json.decode(payload[4 : 4 + json_bytes])
    assert json["head"]["delta"] == {
        "base": "c0.0",
        "ids": 7,
        "rows": 6,
        "request_prefix": 18,
        "request_suffix": 21,
    }
    area = (4 + json_bytes + 7) // 8 * 8
    columns = {c["name"]: c for c in json["columns"]}
    ids, gaps = columns["ids"], columns["patch_gaps"]
    assert struct.unpack_from("<3i", payload, area + ids["offset"]) == (12, 13, 14)
    assert (gaps["shape"], columns["patch_cells"]["shape"]) == ([1], [1, 2])
    assert struct.unpack_from("<i", payload, area + gaps["offset"]) == (4 * 2 + 1,)

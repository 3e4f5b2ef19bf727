"""A store whose segments are half written is read, named, rebuilt and scored all the same."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from driftgate.errors import FormatError, NotFoundError
from driftgate.gateway.answers import Answers
from driftgate.storage import Reader, Writer, read_segment
from driftgate.storage.records import Kind, decode_trace
from driftgate.storage.segments import Entry
from driftgate.testing.traces import assert_same_trace
from tests.e2e.support import (
    Scored,
    driftgate,
    reference,
    stored_scores,
    stored_traces,
    teach,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture
def store(scored: dict[str, Scored], tmp_path: Path) -> Path:
    """A copy of the MoE's store, scored."""
    return Path(shutil.copytree(scored["moe"].store, tmp_path / "store"))


def segment_of_traces(store: Path) -> tuple[Path, int, int]:
    """The segment that holds the traces, and where its last trace begins and ends."""
    for path in (store / "segments").glob("*.dgs"):
        traces = [entry for entry in read_segment(path) if entry.header.kind == Kind.TRACE]
        if traces:
            return path, traces[-1].offset, traces[-1].end
    raise AssertionError("no segment holds a trace")


def answers(store: Path) -> tuple[str, str]:
    """What a user sees of the store."""
    return driftgate("cells", "--store", store).stdout, driftgate(
        "show", "chat", "--store", store
    ).stdout


GARBAGE = b"\xd9REC\x01" + bytes(range(39))
"""The beginning of a record whose end was never written."""


def test_a_torn_tail_is_read_past_named_and_cut(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, *_ = segment_of_traces(store)
    before, size, seen = stored_traces(store), path.stat().st_size, answers(store)
    with path.open("ab") as file:
        file.write(GARBAGE)
    for old, new in zip(before, stored_traces(store), strict=True):
        assert_same_trace(old, new)
    assert answers(store) == seen
    rebuilt = driftgate("index", "rebuild", "--store", store)
    assert rebuilt.returncode == 0
    assert f"torn_bytes {len(GARBAGE)}" in rebuilt.stdout
    assert answers(store) == seen
    with caplog.at_level(logging.WARNING, logger="driftgate.storage"):
        Writer(store).close()  # as the next gateway does
    assert f"{path}: cut {len(GARBAGE)} bytes of an unfinished batch" in caplog.text
    assert path.stat().st_size == size
    assert answers(store) == seen


def test_a_lost_tail_costs_its_own_records_and_is_named(store: Path) -> None:
    path, start, end = segment_of_traces(store)
    *kept, lost = stored_traces(store)
    assert lost.meta.trajectory == "gap"
    whole = path.stat().st_size
    os.truncate(path, end - 7)
    with closing(Reader(store)) as reader:
        for trace in kept:
            assert_same_trace(reader.trace(trace.meta.trace_id), trace)
        with pytest.raises(FormatError, match=rf"{path.name} at {start}: .*damaged"):
            reader.trace(lost.meta.trace_id)
    shown = driftgate("show", "gap", "--step", "0", "--store", store)
    assert shown.returncode == 1
    assert shown.stderr.count("\n") == 1
    assert f"{path.name} at {start}" in shown.stderr
    assert "`driftgate index rebuild`" in shown.stderr
    assert every_answer(store) == 19, "its scores stand"
    rebuilt = driftgate("index", "rebuild", "--store", store)
    assert f"damaged_bytes {whole - start}" in rebuilt.stdout, "also those that are gone"
    assert rebuilt.returncode == 1
    for old, new in zip(kept, stored_traces(store), strict=True):
        assert_same_trace(old, new)
    with closing(Reader(store)) as reader, pytest.raises(NotFoundError):
        reader.trace(lost.meta.trace_id)
    assert every_answer(store) == 18
    shown = driftgate("show", "gap", "--store", store)
    assert shown.returncode == 0
    assert "INCOMPLETE_CAPTURE" in shown.stdout
    assert f"call {lost.meta.call_id} has not ended" in shown.stdout


def every_answer(store: Path) -> int:
    """Ask the API everything; how many traces it lists."""
    with closing(Reader(store)) as reader:
        answers = Answers(reader)
        names = [item.trajectory for item in answers.trajectories(limit=500).items]
        for name in names:
            answers.mismatch(name, tokens=True)
        assert len(answers.drift(0, 1000, None, "drift")) == 2 * 19
        assert all(cell.scored == 19 for cell in answers.cells().items if cell.kind == "drift")
        return sum(len(step.choices) for name in names for step in answers.trajectory(name).steps)


def test_a_trace_that_cannot_be_read_does_not_stop_the_teacher(
    captured: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    store = Path(shutil.copytree(captured["dense"], tmp_path / "store"))
    (trace,) = stored_traces(store, "twin-b")
    damage(store, trace.meta.trace_id)
    lost = unreadable(store)
    assert trace.meta.trace_id in lost
    backend = reference(checkpoints["dense"])
    report = teach(store, backend, checkpoints["dense"])
    assert (report.scored, report.refused) == (19 - len(lost), len(lost))
    refused = [score for score in stored_scores(store) if score.meta.bucket is None]
    assert {score.meta.trace_id for score in refused} == lost
    for score in refused:
        (reason,) = score.meta.comparable.reasons
        assert reason.code == "trace_unreadable"
        assert "the segment is damaged" in reason.detail
    again = teach(store, backend, checkpoints["dense"])
    assert (again.scored, again.refused) == (0, len(lost)), "its file may have been mended"


def damage(store: Path, trace_id: str) -> None:
    """Overwrite a part of the trace's record."""
    for path in (store / "segments").glob("*.dgs"):
        for entry in read_segment(path):
            if entry.header.kind == Kind.TRACE and named(entry) == trace_id:
                with path.open("r+b") as file:
                    file.seek(entry.end - 64)
                    file.write(bytes(16))


def named(entry: Entry) -> str:
    return decode_trace(entry.payload()).head.meta.trace_id


def unreadable(store: Path) -> set[str]:
    """The damaged trace, and those that are stored as differences to it."""
    lost = set()
    with closing(Reader(store)) as reader:
        for row in reader.trajectories():
            for trace in reader.traces(row.trajectory):
                try:
                    reader.trace(trace.meta.trace_id)
                except FormatError:
                    lost.add(trace.meta.trace_id)
    return lost

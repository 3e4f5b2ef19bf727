"""Leases: every piece of work is done once, and a dead worker's is done by another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from driftgate.codes import reason
from driftgate.storage import MAX_LEASE_S, Leases, Reader, Writer
from driftgate.testing.traces import TRAINER, make_score, make_trace, make_trajectory
from driftgate.trace import Comparable, Score, Trace

WAIT_S = 20
ME = TRAINER.digest


@pytest.fixture
def leases(tmp_path: Path) -> Iterator[Leases]:
    leases = Leases(tmp_path)
    yield leases
    leases.close()


def test_the_oldest_trajectory_is_leased_with_all_its_work(writer: Writer, leases: Leases) -> None:
    old, new = list(make_trajectory("old", steps=2)), make_trace(trajectory="new")
    for trace in (old[0], new, old[1]):
        writer.submit(trace).result(WAIT_S)
    lease = leases.acquire(ME, worker="a", ttl_s=10, now=100.0)
    assert lease is not None
    assert (lease.trajectory, lease.trace_ids, lease.expires) == (
        "old",
        ["old-0.0", "old-1.0"],
        110,
    )
    second = leases.acquire(ME, worker="b", ttl_s=10, now=100.0)
    assert second is not None
    assert second.trajectory == "new"
    assert leases.acquire(ME, worker="c", ttl_s=10, now=100.0) is None


def test_an_expired_lease_is_taken_by_another_worker(writer: Writer, leases: Leases) -> None:
    writer.submit(make_trace()).result(WAIT_S)
    lost = leases.acquire(ME, worker="a", ttl_s=10, now=100.0)
    assert lost is not None
    assert leases.acquire(ME, worker="b", ttl_s=10, now=109.9) is None
    taken = leases.acquire(ME, worker="b", ttl_s=10, now=110.0)
    assert taken is not None
    assert (taken.trace_ids, taken.worker) == (["t1-0.0"], "b")
    assert not leases.renew(lost, now=111.0)
    leases.release(lost)  # not his any more
    assert leases.acquire(ME, worker="c", ttl_s=10, now=111.0) is None


def test_a_clock_that_ran_ahead_holds_no_work(writer: Writer, leases: Leases) -> None:
    writer.submit(make_trace()).result(WAIT_S)
    day = 86_400.0
    assert leases.acquire(ME, worker="a", ttl_s=10, now=100.0 + day) is not None
    taken = leases.acquire(ME, worker="b", ttl_s=MAX_LEASE_S, now=100.0)  # a died; set right
    assert taken is not None
    assert taken.worker == "b"
    assert leases.acquire(ME, worker="c", ttl_s=10, now=100.0) is None, "as long as one may be"


def test_open_work_is_what_is_not_scored_leased_or_not(writer: Writer, leases: Leases) -> None:
    one, two = make_trace(trajectory="one"), make_trace(trajectory="two")
    for trace in (one, two):
        writer.submit(trace).result(WAIT_S)
    lease = leases.acquire(ME, worker="a", ttl_s=10, now=100.0)
    assert lease is not None
    left = leases.open_work(ME)
    assert [(work.trajectory, work.worker, work.expires) for work in left] == [
        ("one", "a", 110.0),
        ("two", None, None),
    ]
    for trace in (one, two):
        writer.submit(make_score(trace)).result(WAIT_S)
    assert leases.open_work(ME) == []
    assert [work.trajectory for work in leases.open_work("another")] == ["one", "two"]
    assert leases.open_work("another", model="elsewhere") == []


def test_leases_that_nobody_gave_back_are_counted(
    writer: Writer, leases: Leases, tmp_path: Path
) -> None:
    writer.submit(make_trace()).result(WAIT_S)
    for crashes in range(3):
        restarted = Leases(tmp_path)
        lease = restarted.acquire(ME, worker="a", ttl_s=10, now=100.0 + 10 * crashes)
        restarted.close()
        assert lease is not None
        assert lease.crashes == crashes
        last = lease
    leases.release(last)
    again = leases.acquire(ME, worker="a", ttl_s=10, now=200.0)
    assert again is not None
    assert again.crashes == 0, "giving back ends the count"


def test_untried_work_can_be_asked_for_alone(writer: Writer, leases: Leases) -> None:
    for trajectory in ("old", "new"):
        writer.submit(make_trace(trajectory=trajectory)).result(WAIT_S)
    assert leases.acquire(ME, worker="a", ttl_s=10, now=100.0) is not None
    untried = leases.acquire(ME, worker="b", ttl_s=10, untried=True, now=200.0)
    assert untried is not None
    assert (untried.trajectory, untried.crashes) == ("new", 0)
    assert leases.acquire(ME, worker="b", ttl_s=10, untried=True, now=200.0) is None


def test_a_renewed_lease_lasts_longer(writer: Writer, leases: Leases) -> None:
    writer.submit(make_trace()).result(WAIT_S)
    lease = leases.acquire(ME, worker="a", ttl_s=10, now=100.0)
    assert lease is not None
    assert leases.renew(lease, now=109.0)
    assert leases.acquire(ME, worker="b", ttl_s=10, now=118.0) is None


def test_released_and_scored_work(writer: Writer, leases: Leases) -> None:
    one, two = make_trajectory(steps=2)
    writer.submit(one)
    writer.submit(two).result(WAIT_S)
    lease = leases.acquire(ME, worker="a", ttl_s=10)
    assert lease is not None
    writer.submit(make_score(one)).result(WAIT_S)
    leases.release(lease)
    again = leases.acquire(ME, worker="a", ttl_s=10)
    assert again is not None
    assert again.trace_ids == ["t1-1.0"]
    writer.submit(make_score(two)).result(WAIT_S)
    leases.release(again)
    assert leases.acquire(ME, worker="a", ttl_s=10) is None


def test_new_steps_of_a_scored_trajectory_are_work_again(writer: Writer, leases: Leases) -> None:
    one, two = make_trajectory(steps=2)
    for record in (one, make_score(one)):
        writer.submit(record).result(WAIT_S)
    assert leases.acquire(ME, worker="a", ttl_s=10) is None
    writer.submit(two).result(WAIT_S)
    lease = leases.acquire(ME, worker="a", ttl_s=10)
    assert lease is not None
    assert lease.trace_ids == ["t1-1.0"]


def test_trainers_and_models_have_their_own_work(writer: Writer, leases: Leases) -> None:
    trace, dense = make_trace(), make_trace(trajectory="t2", model="dense")
    for record in (trace, dense, make_score(trace)):
        writer.submit(record).result(WAIT_S)
    assert leases.acquire(ME, worker="a", ttl_s=10, model="tiny-moe") is None
    mine = leases.acquire(ME, worker="a", ttl_s=10, model="dense")
    others = leases.acquire("other", worker="a", ttl_s=10)
    assert mine is not None
    assert others is not None
    assert (mine.trajectory, others.trajectory) == ("t2", "t1")


def test_a_refusal_that_may_have_passed_is_work_for_who_starts_later(
    writer: Writer, leases: Leases, tmp_path: Path
) -> None:
    traces = list(make_trajectory(steps=3))
    for trace in traces:
        writer.submit(trace).result(WAIT_S)
    writer.submit(make_score(traces[0])).result(WAIT_S)
    for trace, code in zip(traces[1:], ("scoring_failed", "tokenizer_mismatch"), strict=True):
        writer.submit(refused(trace, code)).result(WAIT_S)
    assert leases.acquire(ME, worker="a", ttl_s=10) is None
    with closing(Reader(tmp_path)) as reader:
        assert reader.cells()[0].n_seqs == 1
        later = Leases(tmp_path, refused=True)
        lease = later.acquire(ME, worker="b", ttl_s=10)
        assert lease is not None
        assert lease.trace_ids == ["t1-1.0"]
        later.release(lease)
        writer.submit(refused(traces[1], "scoring_failed")).result(WAIT_S)
        assert later.acquire(ME, worker="b", ttl_s=10) is None, "once more, not forever"
        later.close()
        for score in (make_score(traces[1]), refused(traces[1], "scoring_failed")):
            writer.submit(score).result(WAIT_S)
        assert writer.stats.duplicate_records == 1, "numbers stand"
        (cell,) = reader.cells()
        assert (cell.n_seqs, cell.scored) == (2, 3)


def refused(trace: Trace, code: str) -> Score:
    why = reason(code, "", "")
    return make_score(trace, bucket=None, comparable=Comparable(verdict="no", reasons=[why]))


def test_what_is_set_aside_is_left_to_others(writer: Writer, leases: Leases) -> None:
    for trace in make_trajectory(steps=2):
        writer.submit(trace).result(WAIT_S)
    leases.set_aside(["t1-0.0"])
    lease = leases.acquire(ME, worker="a", ttl_s=10)
    assert lease is not None
    assert lease.trace_ids == ["t1-1.0"]


def test_leases_are_shared_between_processes(
    writer: Writer, leases: Leases, tmp_path: Path
) -> None:
    writer.submit(make_trace()).result(WAIT_S)
    elsewhere = Leases(tmp_path)  # its own connection, as another process has
    assert elsewhere.acquire(ME, worker="b", ttl_s=10) is not None
    assert leases.acquire(ME, worker="a", ttl_s=10) is None
    elsewhere.close()


def test_a_score_written_twice_after_a_takeover_counts_once(
    writer: Writer, leases: Leases, tmp_path: Path
) -> None:
    trace = make_trace()
    writer.submit(trace).result(WAIT_S)
    slow, fast = Writer(tmp_path, name="slow"), Writer(tmp_path, name="fast")
    fast.submit(make_score(trace)).result(WAIT_S)
    slow.submit(make_score(trace, seed=1)).result(WAIT_S)
    assert (fast.stats.duplicate_records, slow.stats.duplicate_records) == (0, 1)
    slow.close()
    fast.close()

"""Several gateways on one store: they see each other, and no step is given out twice."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from driftgate.storage import Neighbours


def test_one_alone_is_alone_and_sees_another_come(tmp_path: Path) -> None:
    one = Neighbours(tmp_path)
    assert not one.any()
    two = Neighbours(tmp_path)
    assert (one.any(), two.any()) == (True, True)
    one.close()
    assert not two.any()  # neither gave a step
    two.close()
    assert not list((tmp_path / "gateways").iterdir())


def test_a_killed_one_is_noticed_at_the_next_start(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from driftgate.storage import Neighbours\n"
        "Neighbours(Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], timeout=30)
    assert len(list((tmp_path / "gateways").iterdir())) == 1
    one = Neighbours(tmp_path)
    assert not one.any()
    one.close()


def test_each_step_is_given_once(tmp_path: Path) -> None:
    gateways = [Neighbours(tmp_path) for _ in range(2)]
    with ThreadPoolExecutor(8) as threads:
        given = list(threads.map(lambda i: gateways[i % 2].next_step("t", 3), range(100)))
    assert sorted(given) == list(range(3, 103))
    assert gateways[0].next_step("t", 200) == 200  # one that numbered on its own before
    assert gateways[1].next_step("t", 0) == 201
    assert gateways[1].next_step("another", 0) == 0
    for gateway in gateways:
        gateway.close()


@pytest.mark.parametrize("noticed", [True, False])
def test_who_stays_goes_on_behind_the_steps_of_who_left(tmp_path: Path, noticed: bool) -> None:
    stays, leaves = Neighbours(tmp_path), Neighbours(tmp_path)
    assert not noticed or stays.any()
    assert [leaves.next_step("t", 1) for _ in range(2)] == [1, 2]
    leaves.close()
    assert stays.any()
    assert stays.next_step("t", 1) == 3
    stays.close()


def test_numbers_do_not_outlive_the_gateways(tmp_path: Path) -> None:
    for _ in range(2):
        one = Neighbours(tmp_path)
        assert one.next_step("t", 0) == 0
        one.close()

"""What ``driftgate tail`` shows, holds back and counts; and a person's keys on a real terminal."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from driftgate import tailing
from driftgate.gateway.answers import Answers
from driftgate.gateway.app import serve
from driftgate.gateway.config import GatewayConfig
from driftgate.storage import Reader, Writer
from driftgate.tailing import Tail, Wanted
from driftgate.testing.stores import write_store
from driftgate.testing.traces import make_intent, make_score, make_trajectory
from driftgate.trace import Comparable, Reason
from driftgate.views import DriftEvent

NO = Comparable(verdict="no", reasons=[Reason(code="wrong_checkpoint", detail="d", fix="f")])
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
"""Colours and movements of a terminal."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One score of each band, then one that is not comparable, of other models."""

    def records() -> Iterator[object]:
        for name, noise in (("green", 0.001), ("amber", 0.05), ("red", 0.5), ("no", 0.5)):
            options = {"routed": False, "model": f"model-{name}", "response": 64}
            for trace in make_trajectory(name, steps=1, **options):
                yield make_intent(trace)
                yield trace
                verdict = NO if name == "no" else Comparable(verdict="yes")
                yield make_score(trace, noise=noise, comparable=verdict)

    return write_store(tmp_path_factory.mktemp("store"), records())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def events(store: Path) -> Iterator[list[DriftEvent]]:
    reader = Reader(store)
    yield Answers(reader).drift(0, 100, None, None)
    reader.close()


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (Wanted(), ["green", "amber", "red", "no"]),
        (Wanted(band="green"), ["green", "amber", "red"]),
        (Wanted(band="amber"), ["amber", "red"]),
        (Wanted(band="red"), ["red"]),
        (Wanted(model="model-no"), ["no"]),
        (Wanted(trajectory="amber", band="red"), []),
        (Wanted(kind="noise_floor"), []),
    ],
)
def test_only_what_is_wanted(events: list[DriftEvent], wanted: Wanted, names: list[str]) -> None:
    assert [e.score.trajectory for e in events if wanted.fits(e)] == names


def test_the_address_says_the_filter_again() -> None:
    wanted = Wanted(trajectory="a/b é&c", model="m", band="red", kind="drift")
    address = urlsplit(wanted.address("http://h:1/"))
    assert (address.netloc, address.path) == ("h:1", "/")
    path, query = address.fragment.split("?")
    assert path == "/live"
    values = {"trajectory": "a/b é&c", "model": "m", "band": "red", "kind": "drift"}
    assert parse_qs(query) == {name: [value] for name, value in values.items()}


def test_pausing_holds_and_counts_what_it_cannot(
    events: list[DriftEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(tailing, "HELD", 2)
    tail = Tail(Wanted(band="green"), lambda event: shown.append(event.score.trajectory))
    tail.held = type(tail.held)(maxlen=2)
    tail.take(events[0])
    tail.toggle()
    for event in (*events, *events):
        tail.take(event)
    assert shown == ["green"]
    assert tail.status().startswith("paused, 2 waiting · 1 shown, 2 filtered out, 4 passed over")
    tail.toggle()
    assert shown == ["green", "amber", "red"]
    assert tail.status().startswith("following · 3 shown, 2 filtered out")
    tail.reach(False)
    assert tail.status().startswith("the gateway does not answer, trying again · 3 shown")
    tail.reach(True)
    assert tail.status().startswith("following · 3 shown")


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._own, theirs = pty.openpty()
        command = [sys.executable, "-m", "driftgate.cli", *arguments]
        environment = {**os.environ, "COLUMNS": "200", "TERM": "xterm"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
        )
        os.close(theirs)
        self._seen = ""

    def press(self, keys: str) -> None:
        os.write(self._own, keys.encode())

    def wait_for(self, text: str) -> str:
        """All that came up to ``text``."""
        while text not in self._seen:
            more = os.read(self._own, 4096).decode(errors="replace")
            self._seen = CONTROLS.sub("", self._seen + more)
        before, _, self._seen = self._seen.partition(text)
        return before

    def close(self) -> int:
        code = self.process.wait(30)
        os.close(self._own)
        return code


def add(store: Path, name: str, noise: float) -> None:
    """Write a scored answer while others look."""
    writer = Writer(store)
    try:
        for trace in make_trajectory(name, steps=1, routed=False, response=64):
            for record in (make_intent(trace), trace, make_score(trace, noise=noise)):
                writer.submit(record).result(timeout=30)
    finally:
        writer.close()


def sit_before(url: str, store: Path) -> None:
    """Pause, wait until two are held, go on, end."""
    terminal = Terminal("tail", "--url", url, "--after", "0", "--band", "red")
    watchdog = threading.Timer(60, terminal.process.kill)
    watchdog.start()
    terminal.wait_for("p pauses, q ends")
    terminal.press("p")
    terminal.wait_for("p goes on, q ends")
    for name, noise in (("held", 0.5), ("unwanted", 0.001), ("last", 0.5)):
        add(store, name, noise)
    assert "● held" not in terminal.wait_for("paused, 2 waiting")
    terminal.press("p")
    assert "● held" in (printed := terminal.wait_for("● last"))
    assert "unwanted" not in printed
    terminal.press("q")
    assert terminal.close() == 0
    watchdog.cancel()


async def test_a_person_pauses_goes_on_and_ends(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [])
    async with serve(GatewayConfig(upstream="http://127.0.0.1:9", store=store, port=0)) as url:
        await asyncio.to_thread(sit_before, url, store)

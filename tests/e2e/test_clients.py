"""Well-known clients on a real engine through a real gateway: each run is one whole trajectory,
scored, and the table in the README is what this run gave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

import pytest

from driftgate.client import Client as Api
from driftgate.testing.engine import EngineProcess
from driftgate.tree import Tree
from driftgate.views import TrajectoryRow
from tests.e2e.clients import (
    AT_ONCE,
    CLIENTS,
    PYTHON,
    ROOT,
    RUNS,
    Client,
    Played,
    Row,
    long_table,
    play,
    rows_of,
    section,
    short_table,
    stored,
)
from tests.e2e.support import Proxied, proxy, reference, stored_traces, teach

README, PAGE = ROOT / "README.md", ROOT / "docs" / "clients.md"

Jobs: TypeAlias = Sequence[tuple[Client, int]]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What all clients did, and what the gateway says of it."""

    played: dict[str, list[Played]]
    """By client, one for each run."""
    direct: dict[str, Played]
    """Run 0 of a client that speaks the engine's API, on the engine itself."""
    found: dict[tuple[str, int], str | None]
    """The trajectory of each run."""
    rows: dict[str, TrajectoryRow]
    trees: dict[str, Tree]

    def trajectories(self, client: Client) -> list[str | None]:
        """Of each run, the trajectory that holds just what it said, or None."""
        return [self.found[client.name, number] for number in range(RUNS)]

    def row(self, client: Client) -> Row:
        """What the tables say of it."""
        played, direct = self.played[client.name][0], self.direct.get(client.name)
        return Row(
            client,
            played.versions,
            [self.rows[name] for name in self.trajectories(client) if name is not None],
            None if direct is None else direct.said == played.said,
        )


def matched(
    played: dict[str, list[Played]], store: Path, names: Iterable[str]
) -> dict[tuple[str, int], str | None]:
    """A trajectory of its own for each run, by what was said in it: two runs may have said the
    same."""
    left: dict[str, list[str]] = {}
    for name in names:
        said = [stored(trace) for trace in stored_traces(store, name)]
        left.setdefault(json.dumps(said), []).append(name)
    return {
        (client, number): left[key].pop() if left.get(key := json.dumps(run.said)) else None
        for client, runs in played.items()
        for number, run in enumerate(runs)
    }


@pytest.fixture(scope="module")
def outcome(
    engines: dict[str, EngineProcess],
    checkpoints: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Outcome:
    assert PYTHON.exists(), "the clients are installed by `make setup`"
    store = tmp_path_factory.mktemp("clients")
    return asyncio.run(_all(engines["moe"], checkpoints["moe"], store))


async def _all(engine: EngineProcess, checkpoint: Path, store: Path) -> Outcome:
    room = asyncio.Semaphore(AT_ONCE)
    # No two runs sample the same.
    jobs = [(c, index * RUNS + run) for index, c in enumerate(CLIENTS) for run in range(RUNS)]
    async with proxy(engine, store) as proxied:

        async def at(url: str, program: str, jobs: Jobs, *, keyed: bool = False) -> list[Played]:
            async with room:
                key = await _minted(proxied) if keyed else "none"
                return await play(program, jobs, url=url, model=engine.model, key=key)

        calls, alone = list[Awaitable[list[Played]]](), list[Awaitable[list[Played]]]()
        for program, group in groupby(jobs, key=lambda job: job[0].program):
            own = list(group)
            calls.append(at(proxied.url, program, [job for job in own if not job[0].keyed]))
            calls += [at(proxied.url, program, [job], keyed=True) for job in own if job[0].keyed]
            if chat := [job for job in own[::RUNS] if job[0].api == "chat"]:
                alone.append(at(engine.url, program, chat))
        played, without = await asyncio.gather(asyncio.gather(*calls), asyncio.gather(*alone))
        await asyncio.to_thread(teach, store, reference(checkpoint), checkpoint)
        rows = await rows_of(proxied.url)
        async with Api(proxied.url) as api:
            trees = {name: await api.tree(name) for name in rows}
    by_client: dict[str, list[Played]] = {client.name: [] for client in CLIENTS}
    for one in sorted((one for group in played for one in group), key=lambda one: one.run):
        by_client[one.client.name].append(one)
    direct = {one.client.name: one for group in without for one in group}
    return Outcome(by_client, direct, matched(by_client, store, rows), rows, trees)


async def _minted(proxied: Proxied) -> str:
    async with proxied.http.post(f"{proxied.url}/api/trajectories", json={}) as minted:
        key: str = (await minted.json())["key"]
        return key


@pytest.fixture(params=CLIENTS, ids=lambda client: client.name)
def client(request: pytest.FixtureRequest) -> Client:
    found: Client = request.param
    return found


def test_each_run_is_one_whole_trajectory_of_what_it_said(outcome: Outcome, client: Client) -> None:
    for name, played in zip(outcome.trajectories(client), outcome.played[client.name], strict=True):
        assert name is not None, "no trajectory holds what the client was told, call by call"
        row = outcome.rows[name]
        assert (row.gaps, row.complete, row.failed_calls) == ([], True, 0)
        assert row.steps == row.captured == row.scored == len(played.said)


def test_nothing_else_was_recorded(outcome: Outcome) -> None:
    assert len(outcome.rows) == len(CLIENTS) * RUNS


def test_the_agent_got_what_the_engine_says(outcome: Outcome) -> None:
    for name, direct in outcome.direct.items():
        assert outcome.played[name][0].said == direct.said, name


def test_a_handoff_and_a_helper_stand_in_the_tree(outcome: Outcome) -> None:
    # What follows a forced call breaks: it was sampled without the marks that templates put around.
    assert _kinds(outcome, "helper") == ["root", "sub_agent", "broken"]
    for variant in ("chat", "chat-stream", "responses", "responses-stream"):
        assert _kinds(outcome, variant) == ["root", "handoff", "broken"], variant


def _kinds(outcome: Outcome, variant: str) -> list[str]:
    (client,) = (c for c in CLIENTS if (c.program, c.variant) == ("openai_agents", variant))
    name = outcome.trajectories(client)[0]
    assert name is not None
    return [node.kind for node in outcome.trees[name].nodes]


@pytest.mark.parametrize(("document", "table"), [(README, short_table), (PAGE, long_table)])
def test_the_tables_are_this_runs(
    outcome: Outcome,
    request: pytest.FixtureRequest,
    document: Path,
    table: Callable[[Sequence[Row]], str],
) -> None:
    made = table([outcome.row(client) for client in CLIENTS])
    before, written, after = section(document.read_text())
    if request.config.getoption("--write", default=False):
        document.write_text(f"{before}\n\n{made}\n\n{after}")
    else:
        assert written == made, "what clients do has changed: make clients WRITE=1"

"""A real agent on the OpenAI SDK that knows only a base URL: each run is one whole trajectory."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from driftgate.storage import Reader
from driftgate.testing.engine import EngineProcess
from examples.agent import Task, run, tasks
from tests.e2e.support import proxy

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def group() -> list[Task]:
    """Four runs: two of one prompt with other seeds, a streaming one, and one of them repeated."""
    first, second = tasks(2)
    return [first, replace(first, seed=99), second, first]


async def test_runs_in_parallel_never_mix(
    engines: dict[str, EngineProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with proxy(engines["moe"], tmp_path) as proxied:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{proxied.url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        runs = [
            asyncio.to_thread(
                run, task, model=proxied.engine.model, workspace=Path(__file__).parent
            )
            for task in group()
        ]
        said = await asyncio.gather(*runs)
    with closing(Reader(tmp_path)) as reader:
        rows = reader.trajectories()
        assert [row.gaps for row in rows] == [[]] * len(said)
        requests = [last_request(reader, row.trajectory) for row in rows]
    # The last request of a trajectory holds all of one run's conversation but the last answer.
    assert sorted(map(spoken, requests)) == sorted(spoken(messages[:-1]) for messages in said)


def last_request(reader: Reader, trajectory: str) -> list[Any]:
    row = reader.traces(trajectory)[-1]
    assert row.meta.ambiguous == []
    messages: list[Any] = json.loads(reader.trace(row.meta.trace_id).request)["messages"]
    return messages


def spoken(messages: list[Any]) -> str:
    """A conversation as one string, tool call ids included: no two runs share those."""
    return json.dumps(messages, sort_keys=True)

"""Real client programs (``examples/clients``) as processes that know a base URL and a key, what the
store says of their runs, and the table in the README.

Every cell is of the run: versions as the programs report them, counts from the gateway's API.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from driftgate.client import Client as Api
from driftgate.spoken import message_of
from driftgate.trace import Trace
from driftgate.views import TrajectoryRow

ROOT = Path(__file__).parents[2]
PYTHON = Path(f"{sys.prefix}-clients", "bin", "python")
"""Installed by ``make setup``."""
RUNS = 2
"""Of each client, at the same time."""
AT_ONCE = 2
"""Programs side by side, on a machine with two cores."""
TIMEOUT_S = 600
MARKERS = ("<!-- clients -->", "<!-- /clients -->")


@dataclass(frozen=True, slots=True)
class Client:
    """One row of the table."""

    program: str
    variant: str
    how: str
    """Its entry points, in the client's own words."""
    keyed: bool = False
    """Each run has a key of its own, because its agents begin conversations of their own."""

    @property
    def name(self) -> str:
        """As an id."""
        return f"{self.program}:{self.variant}"

    @property
    def api(self) -> str:
        """What goes over the wire."""
        if self.program == "anthropic_sdk":
            return "Messages"
        return "Responses" if self.variant.startswith("responses") else "chat"


CLIENTS = (
    Client("openai_sdk", "sync", "`chat.completions.create`, tools"),
    Client("openai_sdk", "async", "`AsyncOpenAI`, tools"),
    Client("openai_sdk", "stream", "`chat.completions.stream`, tools"),
    Client("openai_sdk", "parse", "`chat.completions.parse`, tools and objects"),
    Client("openai_sdk", "responses", "`responses.create`, tools"),
    Client("openai_sdk", "responses-stream", "`responses.stream`, tools"),
    Client("openai_agents", "responses", "Responses: handoff, function tool"),
    Client("openai_agents", "responses-stream", "the same by `run_streamed`"),
    Client("openai_agents", "chat", "chat completions: handoff, function tool"),
    Client("openai_agents", "chat-stream", "the same by `run_streamed`"),
    Client("openai_agents", "helper", "an agent as the tool of another", keyed=True),
    Client("anthropic_sdk", "messages", "`messages.create`, tools"),
    Client("anthropic_sdk", "stream", "`messages.stream`, tools"),
    Client("langgraph_agent", "chat", "`StateGraph`, two tool calls in one answer"),
    Client("langgraph_agent", "stream", "the same, streaming"),
    Client("mini_swe", "toolcall", "`mini`, a repository and a shell"),
)


@dataclass(frozen=True, slots=True)
class Played:
    """One finished run."""

    client: Client
    run: int
    versions: str
    said: list[Any]
    """What the client's library says that the model said, call by call."""


async def play(
    program: str, jobs: Sequence[tuple[Client, int]], *, url: str, model: str, key: str = "none"
) -> list[Played]:
    """Runs of one program in a process of its own, against ``url``, without ``/v1``."""
    given = {
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_API_KEY": key,
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": key,
    }
    process = await asyncio.create_subprocess_exec(
        *(str(PYTHON), "-m", f"examples.clients.{program}", "--model", model),
        *(f"{client.variant}:{run}" for client, run in jobs),
        cwd=ROOT,
        env=os.environ | given,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started holds its pipes open
    assert process.returncode == 0, f"{program}:\n{err.decode()[-4000:]}"
    told = [json.loads(line) for line in out.splitlines() if line.startswith(b"{")]
    return [
        Played(client, run, line["client"], line["said"])
        for (client, run), line in zip(jobs, told, strict=True)
    ]


def stored(trace: Trace) -> dict[str, Any]:
    """What a trace says that the model said, in the form of a transcript."""
    message = message_of(trace.response)
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return {
        "text": message.get("content") or "",
        "calls": [[call["name"], json.loads(call["arguments"] or "{}")] for call in calls],
    }


async def rows_of(url: str) -> dict[str, TrajectoryRow]:
    """All trajectories, by id, as the gateway tells them."""
    async with Api(url) as api:
        page = await api.trajectories(limit=500)
    assert page.next is None
    return {row.trajectory: row for row in page.items}


@dataclass(frozen=True, slots=True)
class Row:
    """One client's runs, as the gateway tells them."""

    client: Client
    versions: str
    trajectories: Sequence[TrajectoryRow]
    as_the_engine: bool | None
    """Run 0 got what the engine says without us; None where it is asked in another API."""


SHORT = ("client", "speaks", "set", "runs", "trajectories", "steps", "complete", "scored")
LONG = ("client", "what it did", *SHORT[2:], "as without us")


def short_table(rows: Sequence[Row]) -> str:
    """The README's table: one line for each package."""
    lines = []
    for versions in dict.fromkeys(row.versions for row in rows):
        own = [row for row in rows if row.versions == versions]
        speaks = ", ".join(dict.fromkeys(row.client.api for row in own))
        lines.append([versions, speaks, *_counts(own)])
    return _markdown(SHORT, lines)


def long_table(rows: Sequence[Row]) -> str:
    """One line for each client and way of calling it."""
    equal = {True: "the same", False: "NOT THE SAME", None: "-"}
    return _markdown(
        LONG,
        [[row.versions, row.client.how, *_counts([row]), equal[row.as_the_engine]] for row in rows],
    )


def _counts(rows: Sequence[Row]) -> list[str]:
    found = [trajectory for row in rows for trajectory in row.trajectories]
    complete = sum(trajectory.complete for trajectory in found)
    captured = sum(trajectory.captured for trajectory in found)
    given = dict.fromkeys("URL and key" if row.client.keyed else "URL" for row in rows)
    return [
        "; ".join(given),
        str(RUNS * len(rows)),
        str(len(found)),
        str(sum(trajectory.steps for trajectory in found)),
        f"{complete} of {len(found)}",
        f"{sum(trajectory.scored for trajectory in found)} of {captured}",
    ]


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---", "---", "---", *["---:"] * 5, *["---"] * (len(head) - 8)], *body]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def section(text: str) -> tuple[str, str, str]:
    """A document up to the first marker, between the two, and from the second on."""
    before, rest = text.split(MARKERS[0])
    inside, after = rest.split(MARKERS[1])
    return before + MARKERS[0], inside.strip(), MARKERS[1] + after

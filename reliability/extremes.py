"""Very large and very slow answers: what they cost the gateway, and the calls beside them.

Memory is the peak of the gateway's process during an answer (``VmHWM``) over what it held before.
"""

from __future__ import annotations

import asyncio
import re
import time
from functools import partial
from pathlib import Path

from reliability.agent import ask, path_of
from reliability.answers import Said, request, say
from reliability.engine import Script, serve_engine, well
from reliability.gateway import Gateway, running
from reliability.upstream import Parts, drip
from reliability.verdict import Call, Row

__all__ = ["run"]

TOKENS = {False: 100_000, True: 36_000}
"""In JSON and streamed, as vLLM spells them, with logprobs: 10 MB."""

LARGE_BYTES = 10_000_000

MEMORY_MB = 100.0
"""What an answer of 10 MB may cost."""

DRIPPED_BYTES = 55
"""One a second."""

PATIENCE_S = 150.0


def large(said: Said, stream: bool) -> Parts:
    """The answer to the same call, at length."""
    for part in well(_at_length(said, stream), stream):
        assert isinstance(part, bytes)
        assert not said.asked or len(part) >= LARGE_BYTES, len(part)
        yield part


def _at_length(said: Said, stream: bool) -> Said:
    return say(said.name, asked=said.asked, tokens=TOKENS[stream])


SLOWEST = partial(drip, pause_s=1.0, count=DRIPPED_BYTES)
SCRIPTS: dict[str, Script] = {"large": large, "slowest": SLOWEST}


async def _call(gateway: Gateway, script: str, name: str, *, stream: bool) -> Call:
    body = request(script, name, stream=stream)
    seen = await ask(gateway.url, body, path=path_of(name), patience_s=PATIENCE_S)
    said = say(name, asked=True)
    return Call(_at_length(said, stream) if script == "large" else said, name, body, seen)


def _memory_mb(gateway: Gateway, field: str) -> float:
    status = Path(f"/proc/{gateway.pid}/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None, field
    return int(found.group(1)) / 1000


async def memory(gateway: Gateway, tries: int, *, stream: bool) -> Row:
    """The peak over several answers, one after the other, the first of which warms up."""
    row = Row(f"10 MB answers, {'streamed' if stream else 'JSON'}", worst=0.0, unit="MB")
    for number in range(tries + 1):
        await gateway.drained()
        before_mb = _memory_mb(gateway, "VmRSS")
        Path(f"/proc/{gateway.pid}/clear_refs").write_text("5")  # forget the peak so far
        call = await _call(gateway, "large", f"large-{stream}.{number}", stream=stream)
        await gateway.drained()
        cost_mb = _memory_mb(gateway, "VmHWM") - before_mb
        row.judge(gateway.store, [call])
        row.check(call.seen.answered, f"saw {call.seen.words}")
        row.check(cost_mb < MEMORY_MB, f"answer {number} cost {cost_mb:.0f} MB")
        row.worst = max(row.worst or 0.0, cost_mb)
        row.tries, row.saw = row.tries + 1, f"{call.seen.words}; memory at the peak of one"
    return row


async def drips(gateway: Gateway) -> Row:
    """A byte a second for a minute, JSON and a stream at once, while other calls go on."""
    row, slowest_s = Row("one byte a second for a minute"), 0.0
    dripping = [
        asyncio.create_task(_call(gateway, "slowest", f"slowest-{stream}", stream=stream))
        for stream in (False, True)
    ]
    while not all(task.done() for task in dripping):
        started = time.monotonic()
        other = await _call(gateway, "well", f"beside.{row.tries}", stream=bool(row.tries % 2))
        slowest_s = max(slowest_s, time.monotonic() - started)
        row.check(other.seen.answered, f"a call beside it saw {other.seen.words}")
        row.tries += 1
        await asyncio.sleep(1.0)
    await gateway.drained()
    dripped = [await task for task in dripping]
    row.judge(gateway.store, dripped)
    row.check(all(call.seen.answered for call in dripped), "a slow answer was not passed on")
    row.tries += len(dripped)
    row.worst, row.saw = slowest_s * 1000, "200; the slowest call beside it"
    return row


async def run(folder: Path, *, full: bool) -> list[Row]:
    """Large ones; ``full``: more of them, and slow ones, which take a minute."""
    async with serve_engine(SCRIPTS) as engine, running(engine.url, folder / "store") as gateway:
        rows = [await memory(gateway, 20 if full else 1, stream=stream) for stream in (False, True)]
        if full:
            rows.append(await drips(gateway))
    return rows

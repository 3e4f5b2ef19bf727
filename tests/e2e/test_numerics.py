"""An engine's numerical fingerprint: the same at each start of a gateway, and another for another
model."""

from __future__ import annotations

from pathlib import Path

from driftgate.gateway.numerics import SETTING
from driftgate.testing.engine import EngineProcess
from tests.e2e.support import proxy, stored_traces


async def read(engine: EngineProcess, store: Path) -> dict[str, str]:
    """The engine's settings as a fresh gateway sees them."""
    async with proxy(engine, store) as proxied:
        message = {"role": "user", "content": "hi"}
        await proxied.call("t", {"model": engine.model, "messages": [message], "max_tokens": 4})
    return stored_traces(store)[0].meta.engine.settings


async def test_a_build_keeps_its_numbers(engines: dict[str, EngineProcess], tmp_path: Path) -> None:
    found = {
        kind: [await read(engine, tmp_path / f"{kind}{again}") for again in range(2)]
        for kind, engine in engines.items()
    }
    assert all(first == second for first, second in found.values())
    dense, moe = (settings[0][SETTING] for settings in found.values())
    assert dense != moe
    assert all(settings[0]["kv_cache_dtype"] == "auto" for settings in found.values())

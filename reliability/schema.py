"""schemathesis over our OpenAPI document, against a real gateway that asks for keys."""

from __future__ import annotations

import asyncio
import re
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from driftgate.testing.stores import example_records, write_store
from reliability.gateway import running

__all__ = ["Examined", "examine"]

SETTINGS = Path(__file__).parent / "schema.toml"
NO_ENGINE = "http://127.0.0.1:9"
"""The API answers without one."""


@dataclass(frozen=True, slots=True)
class Examined:
    """What schemathesis said."""

    operations: int
    cases: int
    passed: bool
    said: str


async def examine(examples: int, *, seed: int = 1) -> Examined:
    """About ``examples`` valid and invalid requests for each operation, alone and in sequences,
    with the admin key."""
    keys = {name: secrets.token_hex(24) for name in ("CALL", "READ", "ADMIN", "SIGNING")}
    wrap = ("env", *(f"DRIFTGATE_{name}_KEY={key}" for name, key in keys.items()))
    with tempfile.TemporaryDirectory(prefix="driftgate-schema-") as folder:
        store = write_store(Path(folder) / "store", example_records())
        async with running(NO_ENGINE, store, wrap=wrap, ready="/healthz") as gateway:
            command = [
                *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(SETTINGS), "run"),
                f"{gateway.url}/api/openapi.json",
                *("-H", f"Authorization: Bearer {keys['ADMIN']}"),
                *("-n", str(examples), "--seed", str(seed)),
                *("--generation-database", "none", "--request-timeout", "20", "--no-color"),
            ]
            done = await asyncio.to_thread(
                subprocess.run, command, capture_output=True, text=True, check=False
            )
    said = done.stdout + done.stderr
    return Examined(
        operations=_number(r"Tested: (\d+)", said),
        cases=_number(r"(\d[\d,]*) generated", said),
        passed=done.returncode == 0,
        said=said,
    )


def _number(pattern: str, said: str) -> int:
    found = re.search(pattern, said)
    return int(found[1].replace(",", "")) if found else 0

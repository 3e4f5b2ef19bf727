"""The threat model's table of limits is the code's, and names every limit on a request."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from driftgate.gateway import limits
from driftgate.gateway.config import GatewayConfig

TEXT = (Path(__file__).parents[1] / "docs" / "threat-model.md").read_text()
TABLE: dict[str, str] = dict(
    re.findall(r"^\| [^|]+ \| `([a-z]+\.\w+)` \| ([^|]+) \| [^|]+ \|$", TEXT, re.M)
)


def shown(name: str, value: float) -> str:
    """A limit as the table writes it."""
    if name.endswith("_S"):
        return f"{value:g} s"
    if not name.lower().endswith("_bytes"):
        return str(value)
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value % size == 0:
            return f"{int(value) // size} {unit}"
    return f"{value} B"


def value_of(name: str) -> float:
    module, _, constant = name.partition(".")
    if module == "config":
        return int(getattr(GatewayConfig(upstream="http://e:1"), constant))
    found: float = getattr(importlib.import_module(f"driftgate.gateway.{module}"), constant)
    return found


def test_the_tables_limits_are_the_codes() -> None:
    assert len(TABLE) > 10
    assert {name: shown(name, value_of(name)) for name in TABLE} == TABLE


def test_every_limit_on_a_request_is_in_the_table() -> None:
    known = {f"limits.{name}" for name in vars(limits) if re.match(r"MAX_|\w+_TIMEOUT_S$", name)}
    assert known
    assert known <= set(TABLE), known - set(TABLE)

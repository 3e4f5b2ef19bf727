"""Lists and counts as sentences show them."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["counted", "listed"]

SHOWN = 8
"""A line of a terminal holds so many steps; answers with all of them stand in the JSON."""


def listed(items: Sequence[object]) -> str:
    """``1, 2, 3``; of more than eight how many are not named."""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(map(str, items[:SHOWN])) + more


def counted(count: int, name: str) -> str:
    """``1 step``, ``1,200 steps``."""
    return f"{count:,} {name}{'' if count == 1 else 's'}"

"""Lists as sentences show them: the first few, and that there are more."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["listed"]

SHOWN = 8
"""A line of a terminal holds so many steps; answers with all of them stand in the JSON."""


def listed(items: Sequence[object]) -> str:
    """``1, 2, 3``; of more than eight how many are not named."""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(map(str, items[:SHOWN])) + more

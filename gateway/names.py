"""What can be a trajectory's id. Ids are names, never paths. Pure."""

from __future__ import annotations

import secrets
import unicodedata
from typing import TypeGuard

from driftgate.errors import RequestError

__all__ = ["check_trajectory", "is_trajectory", "new_trajectory"]

MAX_ID_CHARS = 200
"""Twice the longest session id seen; an id stands in every record."""

DOTS = frozenset({".", ".."})
"""Every client resolves them in an address, percent-encoded too: nobody could ask for one."""


def new_trajectory() -> str:
    """A fresh id."""
    return f"t-{secrets.token_hex(8)}"


def check_trajectory(name: str) -> str:
    """``name`` if it can be a trajectory's id, else RequestError. Ids are names, never paths."""
    if not 0 < len(name) <= MAX_ID_CHARS:
        raise RequestError(f"a trajectory id has 1 to {MAX_ID_CHARS} characters, not {len(name)}")
    if name in DOTS:
        raise RequestError(
            f"a trajectory id is no {name!r}: clients take it out of an address as a folder; "
            "give it another name"
        )
    if not is_trajectory(name):
        raise RequestError(
            f"trajectory id {name[:40]!r} starts or ends with a space or holds control characters"
        )
    return name


def is_trajectory(name: object) -> TypeGuard[str]:
    """``name`` can be a trajectory's id. What an agent sends for its own purposes may not be one:
    then it names nothing, and the call is served all the same."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= MAX_ID_CHARS
        and name not in DOTS
        and name == name.strip()
        and not any(unicodedata.category(c)[0] == "C" for c in name)
    )

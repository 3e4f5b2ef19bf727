"""The names of noise floors: how the second run of a side was made.

A floor is a cell whose two sides are one engine, or one trainer. Where the second run was not
simply the same again, the settings of the second side say how, under `LABEL`; so each kind is a
cell of its own.
"""

from __future__ import annotations

from typing import Literal

from driftgate.trace import Engine, Trainer

__all__ = ["LABEL", "PREFILL", "REPEAT", "FloorLabel", "label_of"]

FloorLabel = Literal["repeat", "decode_vs_prefill"]

LABEL = "floor"
"""Key in the second side's settings."""

REPEAT: FloorLabel = "repeat"
"""The same work again: one request and seed twice, or one forward twice."""

PREFILL: FloorLabel = "decode_vs_prefill"
"""The engine decoded the tokens one by one, and then read them all at once as a prompt: what its
two kinds of kernel differ by, and the nearest to what a trainer does that it can do itself."""


def label_of(second: Engine | Trainer) -> str:
    """How the second run of a floor was made."""
    return second.settings.get(LABEL, REPEAT)

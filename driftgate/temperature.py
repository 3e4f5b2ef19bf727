"""What temperature an engine samples at when it is asked for one: asked and done can differ."""

from __future__ import annotations

__all__ = ["MIN_TEMPERATURE", "effective_temperature"]

MIN_TEMPERATURE = 0.01
"""vLLM raises any smaller positive temperature to this one before it divides logits by it."""


def effective_temperature(asked: float | None) -> float:
    """The temperature that the logits are divided by; 0 is greedy, unsent (None) is 1."""
    if asked is None:
        return 1.0
    return max(asked, MIN_TEMPERATURE) if asked > 0.0 else 0.0

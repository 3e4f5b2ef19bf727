"""Numbers and foreign texts as a terminal may show them."""

from __future__ import annotations

import json
import math
from typing import Any

from rich.text import Text

__all__ = ["MISSING", "number", "percent", "plain", "quoted", "safe", "signed"]

MISSING = "–"

CONTROL = {code: "␦" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
"""Control characters and what is drawn in their place."""


def number(value: Any) -> str:
    """A metric in at most 9 characters; ``–`` where it has no value."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    return f"{value:.4f}" if 0.01 <= abs(value) < 1000 else f"{value:.2e}"


def percent(value: Any) -> str:
    """A share with one decimal."""
    return MISSING if value is None else f"{100 * value:.1f}%"


def signed(value: float | None) -> str:
    """A difference in nats, always with its sign."""
    return MISSING if value is None else f"{value:+.3f}"


def safe(text: str) -> str:
    """``text`` without control characters: what a model says must not steer the terminal."""
    return text.translate(CONTROL)


def plain(text: str) -> Text:
    """``text`` as it is: square brackets in it are no markup."""
    return Text(safe(text))


def quoted(token_id: int, text: str | None) -> str:
    """A token as a JSON string, so that blanks and line ends are seen; its id without a text."""
    return f"⟨{token_id}⟩" if text is None else safe(json.dumps(text, ensure_ascii=False))

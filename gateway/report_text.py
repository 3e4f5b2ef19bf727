"""Takes what was said out of the API's answers: texts, and the token ids that spell them. Pure.

It goes by what an answer's parts are, not by where they stand, so that a new answer made of the
same parts is covered; a test looks for every stored text in a whole report.
"""

from __future__ import annotations

from typing import Any

__all__ = ["LEFT_OUT", "without_text"]

LEFT_OUT = (
    "The texts of messages, tool calls and tokens, token ids and the engine's error messages "
    "(`--no-text`). Names of trajectories, models and rewards' sources are there."
)

TOKEN = frozenset({"text", "before", "after", "bytes_base64", "token_id"})
"""Of whatever has a ``token_id``: tokens, worst tokens, places. With a tokenizer an id is text."""

BODIES = frozenset({"request", "response", "prompt_ids", "alternatives"})
"""Of whatever has ``prompt_ids``: stored answers."""

OUTCOME = frozenset({"reason"})
"""Of whatever has an ``http_status``: an engine's refusal often quotes what it refused."""

BREAK = frozenset({"was", "now"})
"""Of whatever has a ``was``: both sides of a prefix that broke."""

GAP_PARTS = 2
"""A gap reads ``step 3: failed: …``; what an engine said stands behind the second colon."""


MARKS = (
    ("token_id", TOKEN),
    ("prompt_ids", BODIES),
    ("http_status", OUTCOME),
    ("was", BREAK),
)


def without_text(answer: Any) -> Any:
    """``answer`` (decoded JSON) with null for everything that was said."""
    if isinstance(answer, dict) and "was" in answer:
        # Its reasons quote the messages that were changed.
        quoting = answer.get("reasons", ())
        answer = {**answer, "reasons": [{**reason, "detail": None} for reason in quoting]}
    if isinstance(answer, list):
        return [without_text(item) for item in answer]
    if not isinstance(answer, dict):
        return answer
    hidden: frozenset[str] = frozenset()
    for mark, fields in MARKS:
        if mark in answer:
            hidden |= fields
    return {
        name: None
        if name in hidden
        else [_gap(gap) for gap in value]
        if name == "gaps" and isinstance(value, list)
        else without_text(value)
        for name, value in answer.items()
    }


def _gap(gap: str) -> str:
    return ": ".join(gap.split(": ")[:GAP_PARTS])

"""Whether an engine's parsers may take the reasoning of an earlier turn for this answer's. Pure.

vLLM asks its reasoning parser whether the *prompt* ends its reasoning: to mask a grammar's first
tokens, to tell a stream's as thoughts or as text, to count what is left of a thinking budget. Many
parsers (0.29: all that inherit ``BaseThinkingReasoningParser.is_reasoning_end``, ``deepseek_r1``
among them) look for the last end mark anywhere in it, so that kept reasoning counts as this turn's,
and thoughts are told as text. An engine does not say which parser it has, so what reads the prompt
does not go on exactly. An answer in one piece is parsed by itself
(``chat_completion_full_generator`` gives its parser the sampled text and ids only).
"""

from __future__ import annotations

from typing import Any

from driftgate.adapters.base import EngineAdapter
from driftgate.gateway.fields import Fields, is_absent, read
from driftgate.gateway.openai import Plan

__all__ = ["misled"]

GRAMMARS = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")

WHY = "the kept ids hold earlier reasoning, and the engine reads the prompt for "


def misled(fields: Fields, plan: Plan, adapter: EngineAdapter, version: str) -> str | None:
    """Why this request cannot go on from ids that hold reasoning; None where it can."""
    if plan.stream and plan.mode != "synthesise":
        return WHY + "a stream's parser: it may tell this answer's thoughts as text"
    if (what := _grammar(fields)) is not None:
        return WHY + f"the grammar of {what}: it may hold from the first thought on"
    if not is_absent(fields, "thinking_token_budget"):
        return WHY + "thinking_token_budget"
    if not version.startswith(adapter.parses_alone):
        return f"the kept ids hold earlier reasoning, and {adapter.name} {version} may read it"
    return None


def _grammar(fields: Fields) -> str | None:
    """What lets the engine make a grammar; tools do where one is forced or strict."""
    kind = (read(fields, "response_format", dict[str, Any]) or {}).get("type", "text")
    if kind != "text":
        return "response_format"
    if (named := next((n for n in GRAMMARS if not is_absent(fields, n)), None)) is not None:
        return named
    choice = read(fields, "tool_choice", str)
    if not is_absent(fields, "tool_choice") and choice not in ("auto", "none"):
        return "tool_choice"
    if choice != "none" and any(_strict(tool) for tool in read(fields, "tools", list[Any]) or ()):
        return "a strict tool"
    return None


def _strict(tool: object) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and bool(function.get("strict"))

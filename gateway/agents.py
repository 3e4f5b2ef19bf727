"""Which agent of a run makes a call, from the headers that coding agents document. Pure.

A run's sub-agents share its trajectory (Claude Code, Codex) or have one each (OpenCode); either
way the headers say who called and who started it. An agent of your own does the same with
OpenCode's two: ``x-session-id`` and ``x-parent-session-id``.

Sources, read in 2026: Claude Code's gateway protocol reference (code.claude.com/docs, *Request
headers* and *Gateway hint headers*); Codex's ``core/src/responses_metadata.rs``; OpenCode's
``session/llm.ts``. NVIDIA Dynamo reads the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping

from driftgate.trace import Agent

__all__ = ["MAX_CHARS", "read_agent"]

MAX_CHARS = 200
"""Of one value, as of a trajectory's id; it stands in every record."""


def read_agent(headers: Mapping[str, str]) -> Agent | None:
    """The calling agent; None where no header names one. ``headers`` find names in any case."""

    def value(name: str) -> str | None:
        found = headers.get(name, "").strip()
        return found if 0 < len(found) <= MAX_CHARS and found.isprintable() else None

    if session := value("x-claude-code-session-id"):
        own = value("x-claude-code-agent-id")
        return Agent(
            id=own or session,
            parent=(value("x-claude-code-parent-agent-id") or session) if own else None,
            kind=value("x-claude-code-agent-type") or value("x-claude-code-request-class"),
            compacted=value("x-claude-code-context-compacted") is not None,
        )
    if thread := value("thread-id") or value("session-id"):
        return Agent(
            id=thread,
            parent=value("x-codex-parent-thread-id"),
            kind=value("x-openai-subagent"),
            window=value("x-codex-window-id"),
        )
    if session := value("x-session-id"):
        return Agent(id=session, parent=value("x-parent-session-id"))
    return None

"""What of a trace stays in memory until its trajectory is scored.

A trace carries its whole history: the requests of a long trajectory repeat it at every step, and
so do the routes, which are [P + R - 1, L, K]. Only the rows that predict the response are compared,
so the rest is let go as soon as a trace has been read: what a lease holds then grows with the
tokens that were sampled, not with their number times the number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from driftgate.facts import Parent
from driftgate.teacher.sequences import assemble
from driftgate.trace import Routes, Trace

__all__ = ["Held", "fed_tokens", "hold", "smaller"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Held:
    """A trace without its bulk, and the routes of its response."""

    trace: Trace
    """Without routes, and with empty bodies."""
    routes: Routes | None
    """[R, L, K] the rows that predict the response."""
    no_routes: str | None
    """Why there are no routes."""
    parent: Parent | None = None
    """The trace that it continues, where that is known."""


def hold(trace: Trace, parent: Parent | None = None) -> Held:
    """The part of a scorable ``trace`` that scoring needs; nothing of it shares the trace's
    memory."""
    assert trace.prompt_ids is not None
    assert trace.response_ids is not None
    assert trace.logprobs is not None
    routes, no_routes = _response_routes(trace, len(trace.prompt_ids), len(trace.response_ids))
    light = replace(
        trace,
        prompt_ids=trace.prompt_ids.copy(),
        response_ids=trace.response_ids.copy(),
        logprobs=trace.logprobs.copy(),
        routes=None,
        token_bytes=b"",
        token_offsets=None,
        request=b"",
        response=b"",
    )
    return Held(trace=light, routes=routes, no_routes=no_routes, parent=parent)


def smaller(held: list[Held]) -> list[list[Held]]:
    """Parts to try by themselves where all failed together: trajectories, then forwards, then the
    longest trace of a forward and the rest; nothing of a single trace."""
    groups: dict[str, list[Held]] = {}
    for one in held:
        groups.setdefault(one.trace.meta.trajectory, []).append(one)
    if len(groups) > 1:
        return list(groups.values())
    by_id = {one.trace.meta.trace_id: one for one in held}
    forwards = [
        [by_id[part.trace_id] for part in sequence.slices]
        for sequence in assemble([one.trace for one in held])
    ]
    if len(forwards) > 1:
        return forwards
    *rest, longest = sorted(held, key=lambda one: fed_tokens(one.trace))
    return [[longest], rest] if rest else []


def fed_tokens(trace: Trace) -> int:
    """Tokens that have to be fed to score ``trace``."""
    assert trace.prompt_ids is not None
    assert trace.response_ids is not None
    return len(trace.prompt_ids) + len(trace.response_ids) - 1


def _response_routes(
    trace: Trace, prompt_len: int, response_len: int
) -> tuple[Routes | None, str | None]:
    if trace.routes is None:
        said = [text for text in trace.meta.missing if "rout" in text]
        return None, said[0] if said else "the trace has no routes"
    if len(trace.routes) != prompt_len + response_len - 1:
        return None, f"the engine gave {len(trace.routes)} rows of routes, not P + R - 1"
    return trace.routes[prompt_len - 1 :].copy(), None

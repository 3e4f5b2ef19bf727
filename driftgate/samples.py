"""The canonical training sample: what every exporter writes a slice or a pad of.

A sample is one line of an agent's run as one token sequence: where the prompt of a call begins with
all tokens of an earlier call, prompt and answer, the two are one sequence (DESIGN 8). Where a run
branches (``n > 1``, a sub-agent, an edited history) each line is a sample of its own, and tokens
that both share are trained in the line that went on longest and are context in the others: over all
samples, **each sampled token is under the mask exactly once**. (prime-rl's pull request 2975 shows
what else happens: k branches give the shared tokens k times their gradient.)

Routes of a position are those of the first call that fed it, which is the forward that its next
token was sampled from. Rows that no engine gave are marked in ``routes_valid``, never guessed.

Pure: arrays in, values out; no torch, no I/O. Letters: ``n`` tokens of the sample, ``L`` layers of
the engine's routes, ``K`` experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt

from driftgate.facts import as_sampled
from driftgate.profiles import Tier
from driftgate.temperature import effective_temperature
from driftgate.trace import F32, I32, LogprobsMode, Routes, Trace

__all__ = [
    "Bools",
    "RoutesMeta",
    "Sample",
    "SampleMeta",
    "Span",
    "assemble",
    "lines",
    "span_mask",
]

Bools = npt.NDArray[np.bool_]


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens that one call sampled."""

    trace_id: str
    step: int
    choice: int
    start: int
    """First sampled position."""
    end: int
    """One past the last."""
    temperature: float | None
    """That the engine sampled at; None where neither request nor engine said."""
    logprobs_mode: LogprobsMode = "unknown"
    """``raw_logprobs``: the logprobs are those at T = 1, whatever was sampled at.
    ``processed_logprobs``: of the density that was sampled from."""
    weight_version: str
    finish_reason: str | None

    @property
    def logprobs_temperature(self) -> float | None:
        """Temperature of the density that the logprobs are of; None where that is not known."""
        if self.logprobs_mode == "raw_logprobs":
            return 1.0
        if self.temperature is None:
            return None
        asked = effective_temperature(self.temperature)
        if asked in (0.0, 1.0):
            return 1.0
        return asked if self.logprobs_mode == "processed_logprobs" else None


class RoutesMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What formats lose about routes: their type, and which rows are really known."""

    dtype: str
    """``uint8`` or ``uint16``."""
    layers: int
    k: int
    missing: list[tuple[int, int]]
    """Half-open ranges of rows without routes."""


class SampleMeta(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of a sample but its arrays; a line of a shard's ``.meta.jsonl``."""

    sample_id: str
    """Trace that ended the line."""
    trajectory: str
    model: str
    tokens: int
    """n"""
    prompt_len: int
    """Tokens before the first sampled one; at least 1."""
    spans: list[Span]
    """In order of position."""
    reward: float | None
    """Of the whole trajectory; None where none was given."""
    line: int = 0
    """Which of its trajectory's samples."""
    verdict: Tier | None = None
    """Of its run by trainers that have scored all of it, the mildest; None where none has."""
    flags: list[str] = []
    """Why the sample is left out by default; empty for a clean one."""
    routes: RoutesMeta | None = None
    """None where no call of the line has routes."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Sample:
    """One sequence to train on."""

    meta: SampleMeta
    tokens: I32
    """[n] token ids from position 0; a token's position is its index."""
    mask: Bools
    """[n] True for tokens sampled by the model in this line; prompts, tool outputs and template
    text are False."""
    logprobs: F32
    """[n] nats as the engine reported them; 0 where ``mask`` is False."""
    routes: Routes | None
    """[n - 1, L, K] expert ids of positions 0 .. n-2; the last sampled token is never fed back. 0
    where ``routes_valid`` is False."""
    routes_valid: Bools | None
    """[n - 1] whether the row is known; None exactly where ``routes`` is."""
    request: bytes = b""
    """JSON body of the line's last call: the whole conversation before its answer."""
    response: bytes = b""
    """JSON of the last answer."""

    @property
    def response_len(self) -> int:
        """Tokens from the first sampled one on, tool outputs among them."""
        return self.meta.tokens - self.meta.prompt_len


def lines(pairs: Sequence[tuple[I32, I32]]) -> list[list[int]]:
    """Which calls form one line: lists of indices into ``pairs`` (prompt [P], response [R]).

    Each index is in exactly one list; lists are in order of their first index. A call continues the
    one with the longest prompt + response that its own prompt begins with.
    """
    lengths = [len(p) + len(r) for p, r in pairs]
    parent = _parents(pairs, lengths)
    below = [1] * len(pairs)
    for index in sorted(range(len(pairs)), key=lambda i: -lengths[i]):
        over = parent[index]
        if over is not None:
            below[over] = max(below[over], below[index] + 1)
    heir: dict[int, int] = {}
    for index, over in enumerate(parent):
        if over is not None and (over not in heir or below[index] > below[heir[over]]):
            heir[over] = index
    found = []
    for index, over in enumerate(parent):
        if over is not None and heir[over] == index:
            continue
        line = [index]
        while line[-1] in heir:
            line.append(heir[line[-1]])
        found.append(line)
    return found


def assemble(
    traces: Iterable[Trace],
    *,
    reward: float | None,
    flags: Callable[[Trace], list[str]] | None = None,
    line: int = 0,
    verdict: Tier | None = None,
) -> Sample:
    """The sample of one line: ``traces`` in order, each prompt beginning with all tokens before it.

    One trace is looked at after the other, so a caller can load them as they are asked for.
    ValueError where the line does not join or its routes have two shapes.
    """
    tokens = np.zeros(0, np.int32)
    spans: list[Span] = []
    logprobs: list[F32] = []
    rows: list[tuple[int, Routes | None]] = []
    noted: dict[str, None] = {}
    last: Trace | None = None
    for trace in traces:
        prompt, response, sampled = _arrays(trace)
        start, end = len(prompt), len(prompt) + len(response)
        if not np.array_equal(prompt[: len(tokens)], tokens):
            name = trace.meta.trace_id
            raise ValueError(f"trace {name} does not begin with the tokens before it")
        covered = sum(count for count, _ in rows)
        logprobs += [np.zeros(start - len(tokens), np.float32), sampled]
        rows.append((end - 1 - covered, _new_rows(trace, covered, end - 1)))
        tokens = np.concatenate([prompt, response])
        spans.append(_span(trace, start, end))
        noted |= dict.fromkeys(flags(trace) if flags else [])
        last = trace
    assert last is not None, "a line has at least one trace"
    routes, valid = _join(rows, last.meta.trace_id)
    return Sample(
        meta=SampleMeta(
            sample_id=last.meta.trace_id,
            trajectory=last.meta.trajectory,
            model=last.meta.model,
            tokens=len(tokens),
            prompt_len=spans[0].start,
            spans=spans,
            reward=reward,
            line=line,
            verdict=verdict,
            flags=list(noted),
            routes=_routes_meta(routes, valid),
        ),
        tokens=tokens,
        mask=span_mask(len(tokens), spans),
        logprobs=np.concatenate(logprobs),
        routes=routes,
        routes_valid=valid,
        request=last.request,
        response=last.response,
    )


def span_mask(n: int, spans: Iterable[Span]) -> Bools:
    """[n] True inside ``spans``."""
    mask = np.zeros(n, np.bool_)
    for span in spans:
        mask[span.start : span.end] = True
    return mask


def _routes_meta(routes: Routes | None, valid: Bools | None) -> RoutesMeta | None:
    """The description of ``routes`` [n - 1, L, K] and ``valid`` [n - 1]."""
    if routes is None or valid is None:
        return None
    edges = np.flatnonzero(np.diff(np.concatenate([[True], valid, [True]]))).tolist()
    return RoutesMeta(
        dtype=routes.dtype.name,
        layers=routes.shape[1],
        k=routes.shape[2],
        missing=[(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)],
    )


def _parents(pairs: Sequence[tuple[I32, I32]], lengths: Sequence[int]) -> list[int | None]:
    """The call that each one continues; of equal calls the first is continued.

    A run's prompts are quadratic in its length: nothing of them is copied. Compared are only calls
    whose last token stands in the prompt where they end, from the longest down.
    """
    order = sorted((i for i, (_, r) in enumerate(pairs) if len(r)), key=lambda i: -lengths[i])
    ends = np.array([lengths[i] for i in order], np.int64)
    last = np.array([pairs[i][1][-1] for i in order], np.int32)
    parent: list[int | None] = []
    for prompt, _ in pairs:
        first = int(np.searchsorted(-ends, -len(prompt)))
        likely = first + np.flatnonzero(prompt[ends[first:] - 1] == last[first:])
        found = (order[n] for n in likely.tolist())
        parent.append(next((i for i in found if _begins(prompt, *pairs[i])), None))
    return parent


def _begins(prompt: I32, before: I32, sampled: I32) -> bool:
    """Whether ``prompt`` begins with another call's tokens."""
    head, tail = np.split(prompt[: len(before) + len(sampled)], [len(before)])
    return np.array_equal(head, before) and np.array_equal(tail, sampled)


def _arrays(trace: Trace) -> tuple[I32, I32, F32]:
    prompt, response, logprobs = trace.prompt_ids, trace.response_ids, trace.logprobs
    if prompt is None or response is None or logprobs is None:
        raise ValueError(f"trace {trace.meta.trace_id} has no prompt, response or logprobs")
    if not len(prompt) or not len(response) or len(response) != len(logprobs):
        raise ValueError(
            f"trace {trace.meta.trace_id}: {len(prompt)} prompt tokens, {len(response)} sampled, "
            f"{len(logprobs)} logprobs"
        )
    return prompt, response, logprobs


def _new_rows(trace: Trace, covered: int, rows: int) -> Routes | None:
    """Rows that this call was the first to feed, copied out of the trace."""
    if trace.routes is None or len(trace.routes) != rows:
        return None
    return trace.routes[covered:].copy()


def _span(trace: Trace, start: int, end: int) -> Span:
    meta = trace.meta
    return Span(
        trace_id=meta.trace_id,
        step=meta.step,
        choice=meta.choice,
        start=start,
        end=end,
        temperature=as_sampled(meta.engine, meta.sampling).temperature,
        logprobs_mode=meta.engine.logprobs_mode,
        weight_version=meta.weight_version,
        finish_reason=meta.finish_reason,
    )


def _join(
    parts: Sequence[tuple[int, Routes | None]], trace_id: str
) -> tuple[Routes | None, Bools | None]:
    """[n - 1, L, K] and its validity; a row of zeros that the engine never wrote is not valid."""
    known = [array for _, array in parts if array is not None]
    if not known:
        return None, None
    shapes = {array.shape[1:] for array in known}
    if len(shapes) > 1:
        raise ValueError(
            f"the line of trace {trace_id} has routes of several shapes: {sorted(shapes)}"
        )
    _, layers, k = known[0].shape
    # Of an engine that sends int32 each answer has the narrowest type that its own ids fit into.
    dtype = max((array.dtype for array in known), key=lambda one: one.itemsize)
    routes = np.zeros((sum(count for count, _ in parts), layers, k), dtype)
    valid = np.zeros(len(routes), np.bool_)
    for (start, end), (_, array) in zip(
        pairwise(np.cumsum([0, *(count for count, _ in parts)]).tolist()), parts, strict=True
    ):
        if array is not None:
            routes[start:end] = array
            valid[start:end] = array.any(axis=(1, 2)) if k > 1 else True
    return routes, valid

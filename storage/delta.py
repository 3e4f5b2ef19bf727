"""A trace as the difference to another trace of its trajectory, and back, bit for bit. Pure.

A step's prompt, routes and request body extend those of the step before, and the samples of one
call share their prompt, so only the rest is stored (FORMAT.md, *Trace*). Nothing is assumed equal:
every id, route cell and byte that is left out was compared. ``resolve`` is linear in the size of
the result however deep the chain of bases is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from driftgate.errors import FormatError
from driftgate.trace import F32, I32, Routes, Trace, TraceMeta

__all__ = ["MAX_DEPTH", "Delta", "StoredTrace", "TraceHead", "diff", "resolve", "trace_bytes"]

MAX_DEPTH = 128
"""Links from a record to its full record: bounds how many records one read touches and how many
traces one damaged record takes with it, as key frames do in video. Up to 129 steps have one full
record; the next one costs as much again as all steps before it, so the bound is not tighter."""

MIN_SAVED_SHARE = 0.25
"""A delta that saves less than this share of the arrays and the request is not worth depending on
another record: the prefix is as good as broken, and a full record starts a new chain."""

MAX_PATCHED_SHARE = 0.5
"""With more differing cells than this a patch (index + cell) is no smaller than the rows
themselves."""

MAX_IDS = 1 << 24
"""Ids, and route rows, of one resolved trace: 16 times the longest contexts in use. Checked before
a record's own claim about them is allocated."""


MAX_ROUTES_BYTES = 1 << 30
"""Of one resolved trace's routes; 128k tokens x 94 layers x top-8 in two bytes are 193 MB."""


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What a record leaves out, as counts into its base."""

    base: str
    """Trace id."""
    ids: int
    """Leading ids equal to the base's prompt + response."""
    rows: int = 0
    """Leading route rows taken from the base, before patches."""
    request_prefix: int = 0
    request_suffix: int = 0


class TraceHead(msgspec.Struct, frozen=True, kw_only=True):
    """JSON part of a trace record."""

    meta: TraceMeta
    prompt_len: int | None
    """P; None: no prompt ids."""
    response_len: int | None
    """R; None: no response ids."""
    twin_key: str | None = None
    prompt_key: str | None = None
    depth: int = 0
    delta: Delta | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StoredTrace:
    """A trace record decoded but not yet joined to its base; shapes as in FORMAT.md."""

    head: TraceHead
    ids: I32
    logprobs: F32 | None
    routes: Routes | None
    patch_gaps: I32 | None
    patch_cells: Routes | None
    token_bytes: bytes
    token_offsets: I32 | None
    request: bytes
    response: bytes


def trace_bytes(trace: Trace) -> int:
    """Memory of a trace's arrays and bodies, in bytes."""
    arrays = (
        trace.prompt_ids,
        trace.response_ids,
        trace.logprobs,
        trace.routes,
        trace.token_offsets,
    )
    bodies = (trace.token_bytes, trace.request, trace.response)
    return sum(a.nbytes for a in arrays if a is not None) + sum(map(len, bodies))


def diff(
    trace: Trace, base: Trace | None, *, base_depth: int = 0, twin_key: str | None = None
) -> StoredTrace:
    """``trace`` against ``base``; a full record where there is none or too little is shared.

    ValueError for a trace that ``resolve`` would not give back, however little of it is stored.
    """
    sides = (trace.prompt_ids, trace.response_ids)
    if (count := sum(len(side) for side in sides if side is not None)) > MAX_IDS:
        raise ValueError(f"a trace has at most {MAX_IDS} ids, not {count}")
    if trace.routes is not None and trace.routes.nbytes > MAX_ROUTES_BYTES:
        raise ValueError(
            f"a trace has at most {MAX_ROUTES_BYTES} bytes of routes, not {trace.routes.nbytes}"
        )
    if base is not None and base_depth < MAX_DEPTH:
        stored, saved = _against(trace, base, base_depth + 1, twin_key)
        if saved >= MIN_SAVED_SHARE * trace_bytes(trace):
            return stored
    return _stored(trace, _head(trace, twin_key), _ids(trace), trace.routes, trace.request)


def resolve(chain: Sequence[StoredTrace], base: Trace | None = None) -> Trace:
    """The trace of ``chain[0]``. ``chain[i + 1]`` is the base of ``chain[i]``; ``base`` that of the
    last.

    All arrays are read-only. FormatError where a record takes more from its base than that has.
    """
    newest = chain[0].head
    prompt_len, response_len = newest.prompt_len or 0, newest.response_len or 0
    first = chain[0]
    count = len(first.ids) + (newest.delta.ids if newest.delta else 0)
    if count != prompt_len + response_len or not 0 <= prompt_len <= count:
        raise _broken(first, f"{count} ids for {prompt_len} + {response_len}")
    if count > MAX_IDS:
        raise _broken(first, f"{count} ids are more than {MAX_IDS}")
    ids = np.empty(count, np.int32)
    _fill_ids(ids, chain, base)
    ids.setflags(write=False)
    return Trace(
        meta=newest.meta,
        prompt_ids=None if newest.prompt_len is None else ids[:prompt_len],
        response_ids=None if newest.response_len is None else ids[prompt_len:],
        logprobs=first.logprobs,
        routes=_routes(chain, base),
        token_bytes=first.token_bytes,
        token_offsets=first.token_offsets,
        request=_request(chain, base),
        response=first.response,
    )


def _against(
    trace: Trace, base: Trace, depth: int, twin_key: str | None
) -> tuple[StoredTrace, int]:
    """``trace`` as a delta to ``base``, and the bytes that this saves."""
    ids = _ids(trace)
    shared = _common(ids, _ids(base))
    prefix = _common(_u8(trace.request), _u8(base.request))
    room = min(len(trace.request), len(base.request)) - prefix
    suffix = _common_end(_u8(trace.request), _u8(base.request), room)
    rows, gaps, cells = _shared_rows(trace.routes, base.routes, shared)
    routes = None if trace.routes is None else trace.routes[rows:]
    patch_bytes = 0 if gaps is None or cells is None else gaps.nbytes + cells.nbytes
    row_bytes = 0 if not rows or trace.routes is None else trace.routes[0].nbytes
    delta = Delta(
        base=base.meta.trace_id, ids=shared, rows=rows, request_prefix=prefix, request_suffix=suffix
    )
    head = _head(trace, twin_key, depth, delta)
    request = trace.request[prefix : len(trace.request) - suffix]
    stored = _stored(trace, head, ids[shared:], routes, request, gaps, cells)
    return stored, 4 * shared + row_bytes * rows - patch_bytes + prefix + suffix


def _shared_rows(
    routes: Routes | None, base: Routes | None, ids: int
) -> tuple[int, I32 | None, Routes | None]:
    """Rows to take from the base; gaps and values of the cells in them that differ."""
    if routes is None or base is None:
        return 0, None, None
    if routes.dtype != base.dtype or routes.shape[1:] != base.shape[1:]:
        return 0, None, None
    rows = min(len(routes), len(base), ids)
    new, old = routes[:rows], base[:rows]
    if np.array_equal(new, old):
        return rows, None, None
    differs = (new != old).any(axis=2).reshape(-1)
    cells = np.flatnonzero(differs)
    if len(cells) > MAX_PATCHED_SHARE * len(differs):
        return 0, None, None
    gaps = np.diff(cells, prepend=0).astype(np.int32)
    return rows, gaps, new.reshape(-1, new.shape[2])[cells]


def _head(
    trace: Trace, twin_key: str | None, depth: int = 0, delta: Delta | None = None
) -> TraceHead:
    return TraceHead(
        meta=trace.meta,
        prompt_len=None if trace.prompt_ids is None else len(trace.prompt_ids),
        response_len=None if trace.response_ids is None else len(trace.response_ids),
        twin_key=twin_key,
        depth=depth,
        delta=delta,
    )


def _stored(
    trace: Trace,
    head: TraceHead,
    ids: I32,
    routes: Routes | None,
    request: bytes,
    gaps: I32 | None = None,
    cells: Routes | None = None,
) -> StoredTrace:
    return StoredTrace(
        head=head,
        ids=ids,
        logprobs=trace.logprobs,
        routes=routes,
        patch_gaps=gaps,
        patch_cells=cells,
        token_bytes=trace.token_bytes,
        token_offsets=trace.token_offsets,
        request=request,
        response=trace.response,
    )


def _ids(trace: Trace) -> I32:
    """[P + R] prompt and response ids; a missing side counts as none."""
    sides = [side for side in (trace.prompt_ids, trace.response_ids) if side is not None]
    return np.concatenate(sides) if sides else np.empty(0, np.int32)


def _u8(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def _common(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> int:
    """Length of the longest common prefix of two vectors."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


def _common_end(a: npt.NDArray[Any], b: npt.NDArray[Any], room: int) -> int:
    """Length of the longest common suffix of two vectors, at most ``room``."""
    differs = a[len(a) - room :] != b[len(b) - room :]
    return int(differs[::-1].argmax()) if differs.any() else room


def _broken(stored: StoredTrace, what: str) -> FormatError:
    return FormatError(f"trace {stored.head.meta.trace_id}: {what}")


def _fill_ids(out: I32, chain: Sequence[StoredTrace], base: Trace | None) -> None:
    """Write the newest record's ids, walking down the chain only as far as ids come from there."""
    need = len(out)
    for stored in chain:
        shared = stored.head.delta.ids if stored.head.delta else 0
        if need > shared + len(stored.ids) or shared < 0:
            raise _broken(stored, f"{need} ids wanted, {shared} shared + {len(stored.ids)} here")
        if need > shared:
            out[shared:need] = stored.ids[: need - shared]
            need = shared
    if need:
        ids = _base_ids(chain, base)
        if need > len(ids):
            raise _broken(chain[-1], f"{need} ids wanted of a base with {len(ids)}")
        out[:need] = ids[:need]


def _base_ids(chain: Sequence[StoredTrace], base: Trace | None) -> I32:
    if base is None:
        raise _broken(chain[-1], "a delta without its base")
    return _ids(base)


def _routes(chain: Sequence[StoredTrace], base: Trace | None) -> Routes | None:
    """The newest record's routes: suffixes from the newest down, patches from the oldest up."""
    first = chain[0]
    if first.routes is None:
        return None
    delta = first.head.delta
    if delta is None or not delta.rows:
        return first.routes
    if not 0 <= delta.rows <= MAX_IDS:
        raise _broken(first, f"{delta.rows} shared route rows")
    row_bytes = math.prod(first.routes.shape[1:]) * first.routes.dtype.itemsize
    if (delta.rows + len(first.routes)) * row_bytes > MAX_ROUTES_BYTES:
        raise _broken(first, f"routes of more than {MAX_ROUTES_BYTES} bytes")
    out = np.empty((delta.rows + len(first.routes), *first.routes.shape[1:]), first.routes.dtype)
    need, needs = len(out), []
    for stored in chain:
        delta, suffix = stored.head.delta, stored.routes
        shared = delta.rows if delta else 0
        if suffix is None or suffix.dtype != out.dtype or suffix.shape[1:] != out.shape[1:]:
            raise _broken(stored, "routes are missing or of another shape than those built on them")
        if need > shared + len(suffix) or shared < 0:
            raise _broken(stored, f"{need} route rows wanted, {shared} + {len(suffix)} here")
        if need > shared:
            out[shared:need] = suffix[: need - shared]
            need = shared
        needs.append(need)
        if not need:
            break
    if need:
        _fill_base_rows(out[:need], chain[-1], base)
    for stored, rows in reversed(list(zip(chain, needs, strict=False))):
        _patch(out[:rows], stored)
    out.setflags(write=False)
    return out


def _fill_base_rows(out: Routes, stored: StoredTrace, base: Trace | None) -> None:
    routes = None if base is None else base.routes
    if routes is None or routes.dtype != out.dtype or routes.shape[1:] != out.shape[1:]:
        raise _broken(stored, "a delta whose base has no such routes")
    if len(routes) < len(out):
        raise _broken(stored, f"{len(out)} route rows wanted of a base with {len(routes)}")
    out[:] = routes[: len(out)]


def _patch(rows: Routes, stored: StoredTrace) -> None:
    """Overwrite the cells of ``rows`` [n, L, K] that this record changed, ignoring later ones."""
    if stored.patch_gaps is None or stored.patch_cells is None or not len(rows):
        return
    layers, experts = rows.shape[1:]
    index = np.cumsum(stored.patch_gaps, dtype=np.int64)
    shape_is_right = stored.patch_cells.shape == (len(index), experts)
    if not shape_is_right or stored.patch_cells.dtype != rows.dtype or (index < 0).any():
        raise _broken(stored, "route patches do not fit the routes")
    wanted = index < len(rows) * layers
    rows.reshape(-1, experts)[index[wanted]] = stored.patch_cells[wanted]


def _request(chain: Sequence[StoredTrace], base: Trace | None) -> bytes:
    """The newest record's request body, joined from the oldest up."""
    body = b"" if base is None else base.request
    for stored in reversed(chain):
        delta = stored.head.delta
        if delta is None:
            body = stored.request
            continue
        prefix, suffix = delta.request_prefix, delta.request_suffix
        if min(prefix, suffix) < 0 or prefix + suffix > len(body):
            raise _broken(stored, f"request takes {prefix} + {suffix} of {len(body)} bytes")
        body = body[:prefix] + stored.request + body[len(body) - suffix :]
    return body

"""What every export format shares: shards of bounded size, facts beside each sample, the way back.

A format writes *its own project's* layout and nothing else into it. What that layout has no place
for (ids, reward as given, temperatures, why a sample is flagged) stands in ``SHARD.meta.jsonl``,
one `SampleMeta` a line in the shard's order. ``manifest.json`` is written last: a folder without
one is not whole. A shard never mixes models, nor samples with and without routes: trainers stack
them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt

from driftgate.errors import DriftgateError
from driftgate.samples import Bools, Sample, SampleMeta, Span, span_mask
from driftgate.temperature import effective_temperature
from driftgate.trace import I32, Routes

__all__ = [
    "Format",
    "Manifest",
    "Shard",
    "all_routes",
    "no_routes",
    "padded_routes",
    "read_export",
    "sample_of",
    "whole_routes",
    "write_export",
]

SHARD_BYTES = 256 << 20
"""A shard's arrays, padded: what the writer holds at once. A trainer's global batch is about this
long (256 sequences of 8k tokens with 40 MoE layers of top-8 would be 1.3 GB in one piece)."""

SHARD_SAMPLES = 1024
"""Samples of a shard at most: a file of short samples is then still quick to look into."""

TOKEN_BYTES = 32
"""Of a padded position without routes: ids, positions, masks, logprobs."""

META_SUFFIX = ".meta.jsonl"
MANIFEST = "manifest.json"
MISSING = -1
"""Stands for every expert of a row without routes; never 0, which is an expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One project's files."""

    name: str
    write: Callable[[Path, Sequence[Sample]], None]
    """Writes one shard. ValueError, in words, for values that the layout cannot hold."""
    read: Callable[[Path, Sequence[SampleMeta]], list[Sample]]
    """The shard's samples; ``read(write(s)) == carries(s)``, bit for bit."""
    carries: Callable[[Sample], Sample]
    """What of a sample the layout can hold."""
    shard_name: str
    """Of shard number ``{}``, below the export's folder."""
    route_bytes: int = 2
    """Of one expert id while a shard is written."""
    readme: str = ""
    """Text of a README.md beside the shards, where readers of the format look for one."""


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """One file of an export."""

    file: str
    samples: int
    tokens: int
    sampled_tokens: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What an export holds and what it leaves out."""

    format: str
    shards: list[Shard]
    samples: int
    sampled_tokens: int
    left_out: dict[str, int]
    """Traces by reason."""
    flagged: int
    """Samples that are in only because incomplete ones were asked for."""
    verdicts: dict[str, int] = {}
    """Samples by the verdict on their run; ``none`` where no trainer has scored all of it."""
    other_temperature: int = 0
    """Samples with logprobs at another temperature than was sampled at, or at one not known."""
    damaged: list[str]
    """What could not be read, and why."""


def write_export(
    samples: Iterable[Sample],
    out: Path,
    fmt: Format,
    *,
    left_out: dict[str, int],
    damaged: list[str],
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Write ``samples`` into the new folder ``out``; ``left_out`` and ``damaged`` are read last.

    DriftgateError where the folder has files already or cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise DriftgateError(f"{out} is not empty; choose another --output")
        shards, flagged, verdicts, elsewhere = [], 0, Counter[str](), 0
        for index, batch in enumerate(_batches(samples, fmt, shard_bytes)):
            shards.append(_write_shard(out, index, batch, fmt))
            flagged += sum(bool(sample.meta.flags) for sample in batch)
            verdicts.update(sample.meta.verdict or "none" for sample in batch)
            elsewhere += sum(any(map(_elsewhere, sample.meta.spans)) for sample in batch)
        manifest = Manifest(
            format=fmt.name,
            shards=shards,
            samples=sum(shard.samples for shard in shards),
            sampled_tokens=sum(shard.sampled_tokens for shard in shards),
            left_out=dict(sorted(left_out.items())),
            flagged=flagged,
            verdicts=dict(sorted(verdicts.items())),
            other_temperature=elsewhere,
            damaged=damaged,
        )
        if fmt.readme:
            (out / "README.md").write_text(fmt.readme)
        (out / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    except OSError as error:
        raise DriftgateError(f"cannot write {out}: {error}; choose another --output") from error
    return manifest


def _elsewhere(span: Span) -> bool:
    asked = effective_temperature(span.temperature)
    return span.temperature is None or (asked > 0.0 and span.logprobs_temperature != asked)


def read_export(out: Path, fmt: Format) -> list[Sample]:
    """Every sample of an export, back in canonical form. DriftgateError where it is not whole."""
    try:
        manifest = msgspec.json.decode((out / MANIFEST).read_bytes(), type=Manifest)
        found = []
        for shard in manifest.shards:
            lines = (out / (shard.file + META_SUFFIX)).read_bytes().splitlines()
            metas = [msgspec.json.decode(line, type=SampleMeta) for line in lines]
            found += fmt.read(out / shard.file, metas)
    except FileNotFoundError as error:
        raise DriftgateError(f"{error.filename} is missing: the export is not whole") from error
    return found


def padded_routes(sample: Sample, rows: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """[rows, L, K] of a signed ``dtype``: known rows, and -1 in every other.

    ValueError where an expert id does not fit.
    """
    assert sample.routes is not None
    assert sample.routes_valid is not None
    out = np.full((rows, *sample.routes.shape[1:]), MISSING, dtype)
    known = np.flatnonzero(sample.routes_valid)
    if len(known) and int(sample.routes[known].max()) > np.iinfo(out.dtype).max:
        raise ValueError(f"expert id {sample.routes[known].max()} does not fit {out.dtype}")
    out[known] = sample.routes[known]
    return out


def sample_of(
    meta: SampleMeta,
    tokens: npt.ArrayLike,
    mask: npt.ArrayLike,
    logprobs: npt.ArrayLike,
    routes: npt.NDArray[Any] | None = None,
    *,
    valid: npt.NDArray[np.bool_] | None = None,
) -> Sample:
    """The canonical sample of a format's own arrays; a row of ``routes`` that is all -1 is missing.

    ``mask`` and ``logprobs`` are of the last tokens, at least from the first sampled one on;
    ``routes`` [>= n-1, L, K]. ValueError where shard and meta disagree.
    """
    ids: I32 = np.asarray(tokens, np.int32)
    masked, values = np.zeros(len(ids), np.bool_), np.zeros(len(ids), np.float32)
    sampled, given = np.asarray(mask).astype(np.bool_), np.asarray(logprobs, np.float32)
    masked[len(ids) - len(sampled) :] = sampled
    values[len(ids) - len(given) :] = given
    if not np.array_equal(masked, span_mask(meta.tokens, meta.spans)):
        raise ValueError(f"sample {meta.sample_id}: the shard's mask is not that of its meta")
    back, known = _routes_back(routes, valid, meta)
    return Sample(
        meta=meta if back is not None else msgspec.structs.replace(meta, routes=None),
        tokens=ids,
        mask=masked,
        logprobs=values,
        routes=back,
        routes_valid=known,
    )


def all_routes(sample: Sample) -> Sample:
    """For layouts that can say which rows are missing."""
    return replace(sample, request=b"", response=b"")


def no_routes(sample: Sample) -> Sample:
    """For layouts without a place for routes."""
    meta = msgspec.structs.replace(sample.meta, routes=None)
    return replace(all_routes(sample), meta=meta, routes=None, routes_valid=None)


def whole_routes(sample: Sample) -> Sample:
    """For layouts whose trainers replay every row: all of the routes or none, never a made-up one.

    Without routes a trainer routes by itself; a filled row would send its token to expert 0.
    """
    whole = sample.routes_valid is not None and bool(sample.routes_valid.all())
    return all_routes(sample) if whole else no_routes(sample)


def _routes_back(
    routes: npt.NDArray[Any] | None, valid: Bools | None, meta: SampleMeta
) -> tuple[Routes | None, Bools | None]:
    if routes is None or meta.routes is None:
        return None, None
    rows = routes[: meta.tokens - 1]
    known = (rows != MISSING).any(axis=(1, 2)) if valid is None else valid[: meta.tokens - 1]
    back = np.zeros(rows.shape, meta.routes.dtype)
    back[known] = rows[known]
    return cast(Routes, back), known


@dataclass(slots=True)
class _Batch:
    """Alike samples that wait for more of their kind."""

    samples: list[Sample] = field(default_factory=list)
    widest: int = 0

    @property
    def size(self) -> int:
        """Bytes of the padded arrays."""
        return self.widest * len(self.samples)

    def has_room(self, size: int, limit: int) -> bool:
        padded = max(self.widest, size) * (len(self.samples) + 1)
        return not self.samples or (len(self.samples) < SHARD_SAMPLES and padded <= limit)

    def add(self, sample: Sample, size: int) -> None:
        self.samples.append(sample)
        self.widest = max(self.widest, size)


def _batches(samples: Iterable[Sample], fmt: Format, limit: int) -> Iterable[list[Sample]]:
    """Alike samples whose padded arrays stay under ``limit``; one alone may be larger.

    Models come by turns in a store, so each kind waits for more of its own; all that waits stays
    under ``limit`` too.
    """
    waiting: dict[tuple[str, str | None, int], _Batch] = {}
    for sample in map(fmt.carries, samples):
        routes = sample.meta.routes
        cells = routes.layers * routes.k if routes else 0
        size = sample.meta.tokens * (TOKEN_BYTES + cells * fmt.route_bytes)
        kind = (sample.meta.model, routes.dtype if routes else None, cells)
        if kind in waiting and not waiting[kind].has_room(size, limit):
            yield waiting.pop(kind).samples
        waiting.setdefault(kind, _Batch()).add(sample, size)
        while len(waiting) > 1 and sum(batch.size for batch in waiting.values()) > limit:
            yield waiting.pop(max(waiting, key=lambda one: waiting[one].size)).samples
    for batch in waiting.values():
        yield batch.samples


def _write_shard(out: Path, index: int, batch: list[Sample], fmt: Format) -> Shard:
    path = out / fmt.shard_name.format(index)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fmt.write(path, batch)
    except ValueError as error:
        raise DriftgateError(
            f"{fmt.name} cannot hold {batch[0].meta.sample_id}: {error}"
        ) from error
    lines = b"".join(msgspec.json.encode(sample.meta) + b"\n" for sample in batch)
    path.with_name(path.name + META_SUFFIX).write_bytes(lines)
    return Shard(
        file=path.relative_to(out).as_posix(),
        samples=len(batch),
        tokens=sum(sample.meta.tokens for sample in batch),
        sampled_tokens=sum(int(sample.mask.sum()) for sample in batch),
    )

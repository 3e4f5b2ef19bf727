"""Weight versions inside one answer: what its spans say, and words for a change without a place.

Pure. A trainer may push new weights while an engine samples, so an answer has as many versions as
it has spans. Where nobody can say which token came before a change, the span says that, and counts
as no version at all: a lag over it is null."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from driftgate.trace import TraceMeta, WeightSpan

__all__ = ["UNKNOWN", "changed", "is_mixed", "joined", "merged", "sampled_under"]

UNKNOWN = "unknown"


def changed(versions: Iterable[str]) -> str:
    """Of tokens that were sampled while the weights went through ``versions``."""
    return f"changed during: {', '.join(versions)}"


def merged(spans: Sequence[WeightSpan], tokens: int) -> list[WeightSpan]:
    """``spans`` of so many tokens without empty ones, neighbours of one version put together."""
    ends = [span.first for span in spans[1:]] + [tokens]
    kept = [span for span, end in zip(spans, ends, strict=True) if span.first < end] or spans[:1]
    return [next(same) for _, same in groupby(kept, key=lambda span: span.version)]


def joined(spans: Sequence[WeightSpan]) -> str:
    """All versions, each once: ``TraceMeta.weight_version``."""
    return "+".join(dict.fromkeys(span.version for span in spans)) or UNKNOWN


def sampled_under(meta: TraceMeta) -> tuple[str, ...]:
    """Every version that a token of the trace was sampled under, in order, each once."""
    found = dict.fromkeys(span.version for span in meta.weight_spans)
    return tuple(found) or (meta.weight_version,)


def is_mixed(meta: TraceMeta) -> bool:
    """The weights changed while the answer was sampled."""
    versions = sampled_under(meta)
    return len(versions) > 1 or versions[0].startswith(changed(()))

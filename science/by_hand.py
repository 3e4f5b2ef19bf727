"""METRICS 3 and 5 written out by hand: Python sets and plain arithmetic, cell by cell.

METRICS 2 is in ``tests/e2e/oracle.py``. Nothing here imports the code that it checks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Ids", "router", "verdict"]

Ids = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]

NEAR_TIE = 2.0**-6
"""The spacing of bfloat16 numbers between 2 and 4."""


def router(a: Ids, b: Ids, margins: F64 | None, *, ordered: bool) -> dict[str, Any]:
    """METRICS 3 of expert ids [R, L, K]: ``a`` of the rollout, ``b`` of the trainer, all valid.

    ``margins`` [R, L] of the trainer; ``ordered``: both sides prove their order.
    """
    rows, layers, k = a.shape
    sets = {
        (t, m): (set(a[t, m].tolist()), set(b[t, m].tolist()))
        for t in range(rows)
        for m in range(layers)
    }
    other = {cell: x != y for cell, (x, y) in sets.items()}
    slot0 = {(t, m): a[t, m, 0] != b[t, m, 0] for t, m in sets}
    each = {
        "router_set_disagree_rate": {c: float(d) for c, d in other.items()},
        "router_expert_miss_rate": {c: 1 - len(x & y) / k for c, (x, y) in sets.items()},
        "router_jaccard_mean": {c: len(x & y) / len(x | y) for c, (x, y) in sets.items()},
        "router_zero_overlap_rate": {c: float(not x & y) for c, (x, y) in sets.items()},
        "router_slot0_flip_rate": {c: float(d) for c, d in slot0.items()},
    }
    found: dict[str, Any] = {name: fmean(values.values()) for name, values in each.items()}
    for name, values in each.items():
        found[f"{name}_by_layer"] = [
            fmean(values[t, m] for t in range(rows)) for m in range(layers)
        ]
    by_layer = found["router_set_disagree_rate_by_layer"]
    per_token = [sum(other[t, m] for m in range(layers)) for t in range(rows)]
    bins: dict[int, list[bool]] = defaultdict(list)
    for (t, _), differs in other.items():
        bins[int(math.log2(t + 1))].append(differs)
    found |= {
        "n_cells": rows * layers,
        "n_rows": rows,
        "n_excluded": 0,
        "n_excluded_out_of_range": 0,
        "n_excluded_all_zero": 0,
        "n_excluded_duplicate": 0,
        "layers": list(range(layers)),
        "router_token_any_layer_rate": fmean(n > 0 for n in per_token),
        "router_layers_disagree_per_token": fmean(per_token),
        "router_top1_flip_rate": found["router_slot0_flip_rate"] if ordered else None,
        "router_worst_layer": by_layer.index(max(by_layer)) if max(by_layer) else None,
        "router_set_disagree_rate_by_position": [fmean(bins[n]) for n in sorted(bins)],
    }
    return found | _margins(other, margins)


def _margins(other: dict[tuple[int, int], bool], margins: F64 | None) -> dict[str, Any]:
    names = ("mean", "near_tie_frac", "near_tie_rate", "clear_rate")
    if margins is None:
        absent = {f"router_flip_margin_{name}": None for name in names}
        return absent | {"router_tie_count": None, "router_near_tie_count": None}
    known = {cell: float(margins[cell]) for cell in other}
    flips = [known[cell] for cell, differs in other.items() if differs]
    near = [differs for cell, differs in other.items() if known[cell] < NEAR_TIE]
    clear = [differs for cell, differs in other.items() if known[cell] >= NEAR_TIE]
    values: Sequence[float | None] = (
        fmean(flips) if flips else None,
        fmean(x < NEAR_TIE for x in flips) if flips else None,
        fmean(near) if near else None,
        fmean(clear) if clear else None,
    )
    return {
        **{f"router_flip_margin_{name}": v for name, v in zip(names, values, strict=True)},
        "router_tie_count": sum(x == 0 for x in known.values()),
        "router_near_tie_count": len(near),
    }


def verdict(profile: str, d: F64, lag: int, disagree: float, slot0: float) -> str:
    """METRICS 5 for one response with log ratios ``d`` and these router rates, written as rules."""
    w, size = np.exp(d), np.abs(d)
    kish = float(w.sum() ** 2 / (len(w) * (w * w).sum()))
    if profile == "observatory":
        c = np.exp(d.clip(-20, 20))
        kish = float(c.sum() ** 2 / (len(c) * (c * c).sum()))
        clamped = float((size > 20).mean())
        if kish < 0.30 or clamped > 0.10 or lag > 8 or size.max() > 30:
            return "quarantine"
        if kish < 0.60 or lag > 4:
            return "replay"
        return "train_with_correction" if clamped > 0 or lag or slot0 > 0.15 else "train"
    two, five = (int((size > math.log(tau)).sum()) for tau in (2, 5))
    n, rest = len(d), _but_worst(w, size)
    shift = abs(float(np.delete(d, int(size.argmax())).mean()))
    if w.min() < 1e-4 or size.max() > 13.8 or _rate(two, n, 0.1) or _rate(five, n, 0.01):
        return "quarantine"
    if rest < 0.80 or lag > 8 or shift > 0.47:
        return "quarantine"
    if rest < 0.95 or lag > 4 or shift > 0.22:
        return "replay"
    mild = two / n > 1e-3 or kish < 0.99 or lag > 0 or disagree > 0.20 or shift > 0.10
    return "train_with_correction" if mild else "train"


def _rate(hits: int, n: int, limit: float) -> bool:
    """A share above the limit, of at least three tokens: fewer are no rate."""
    return hits >= 3 and hits / n > limit


def _but_worst(w: F64, size: F64) -> float:
    """ESS without the token of the largest |D|."""
    others = np.delete(w, int(size.argmax()))
    return float(others.sum() ** 2 / (len(others) * (others * others).sum()))

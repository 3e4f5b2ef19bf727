"""Router mismatch: how often engine and trainer send a token to different experts (METRICS 3).

One job: compare two arrays of chosen experts for the same tokens, keep integer counts per layer
that merge exactly, and read the rates off. Choices are compared as sets: an engine's slots need
not be in order (vLLM on CPU calls ``topk(sorted=False)``), so the top-1 rate exists only where
both sides prove their order.

A *cell* is one (token, layer). Cells that are no choice at all are left out and counted by cause:
negative or out-of-range ids (a sentinel), all zeros (padding; K > 1) and repeated ids.

Alignment: row j of both arrays is the row that predicts sampled token j, the last R rows of an
engine's P + R - 1. Keep prompt rows out. `driftgate.routes` finds arrays shifted by rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from driftgate.routes import ShiftFinding, random_zero_overlap, route_shift, shared_experts

__all__ = [
    "NEAR_TIE_MARGIN",
    "RouterBucket",
    "RouterValue",
    "ShiftFinding",
    "by_layer",
    "random_zero_overlap",
    "route_shift",
    "shared_experts",
    "valid_cells",
]

RouterValue = float | int | None | list[float | None] | list[int]
IntArray = npt.NDArray[Any]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NEAR_TIE_MARGIN = 2.0**-6
"""A trainer's margin s_(K) - s_(K+1) below this is a near tie: 2^-6 is the spacing of bfloat16
numbers in [2, 4), so to a bf16 side two router logits there that are closer are the same number.
For scores that are probabilities it is generous; the counts at exactly 0 are given besides."""

CHUNK_CELLS = 1 << 18
"""Cells compared at once. With K = 8 the [cells, K, K] comparison is 16 MiB."""

CAUSES = ("out_of_range", "all_zero", "duplicate")


class RouterBucket(msgspec.Struct, kw_only=True):
    """Counts behind every router metric of many sequences. Lists are by layer unless said
    otherwise."""

    k: int = 0
    """Experts per token; 0 in an empty bucket."""
    layers: list[int] = []
    """Absolute layer numbers."""
    n_rows: int = 0
    """Tokens with at least one valid cell."""
    excluded: dict[str, int] = {}
    """Cells left out, by cause."""
    shared: list[list[int]] = []
    """[L][K + 1]: cells by how many experts both sides chose. Every set metric comes from these."""
    slot0_flips: list[int] = []
    rows_any: int = 0
    """Tokens where at least one layer differs."""
    unordered_rollout: int = 0
    """Cells whose rollout side does not prove its order."""
    unordered_train: int = 0
    margin_cells: int = 0
    """Valid cells whose margin is known."""
    margin_ties: int = 0
    """Of those, margin exactly 0."""
    margin_near: int = 0
    """Of those, margin below NEAR_TIE_MARGIN."""
    margin_flips: int = 0
    """Of those, the sets differ."""
    margin_flips_near: int = 0
    margin_flips_sum: float = 0.0
    """Sum of the margin over cells that differ."""
    position_cells: list[int] = []
    """By bin of the token's position in its response: bin b holds positions [2^b - 1, 2^(b+1) -
    1)."""
    position_disagree: list[int] = []
    max_expert: int = -1
    """Largest expert id seen on either side."""

    @classmethod
    def of(
        cls,
        rollout: IntArray,
        train: IntArray,
        *,
        rollout_ordered: bool = False,
        train_ordered: bool = False,
        margins: npt.NDArray[Any] | None = None,
        layer_ids: Sequence[int] | None = None,
        num_experts: int | None = None,
    ) -> RouterBucket:
        """The bucket of one response.

        ``rollout``, ``train``: expert ids [R, L, K], row j predicts sampled token j on both sides.
        ``*_ordered``: slots are proven to be in order of probability. ``margins`` [R, L]: the
        trainer's s_(K) - s_(K+1) in the scores it selects by, NaN where unknown. ``layer_ids``:
        absolute numbers of the MoE layers; a side that also has rows for dense layers (its L axis
        counts all hidden layers) is cut to these. ``num_experts``: ids from here on are sentinels.
        ValueError on shapes that do not agree.
        """
        a, b = by_layer(rollout, layer_ids), by_layer(train, layer_ids)
        if a.shape != b.shape:
            raise ValueError(
                f"rollout routes {a.shape} and train routes {b.shape} must be one [R, L, K]: "
                "cut both to the R rows that predict the response and to the MoE layers"
            )
        rows, n_layers, k = a.shape
        layers = list(range(n_layers)) if layer_ids is None else [int(i) for i in layer_ids]
        if margins is not None and margins.shape != (rows, n_layers):
            raise ValueError(f"margins {margins.shape} must be [R, L] = {(rows, n_layers)}")
        bucket = _empty(k, layers)
        for start, part_a, part_b in _chunks(a, b):
            part = None if margins is None else margins[start : start + len(part_a)]
            bucket = bucket.merge(_count(part_a, part_b, start, part, layers, num_experts))
        cells = bucket.n_cells
        bucket.unordered_rollout = 0 if rollout_ordered else cells
        bucket.unordered_train = 0 if train_ordered else cells
        return bucket

    @property
    def n_cells(self) -> int:
        """Valid (token, layer) cells."""
        return sum(map(sum, self.shared))

    def merge(self, other: RouterBucket) -> RouterBucket:
        """The bucket of both. ValueError when they are of different layers or K."""
        if not other.k:
            return self
        if not self.k:
            return other
        if (self.k, self.layers) != (other.k, other.layers):
            raise ValueError(
                f"cannot merge router buckets of layers {self.layers}, K = {self.k} with layers "
                f"{other.layers}, K = {other.k}: they are of different models"
            )
        merged = {
            name: _added(getattr(self, name), getattr(other, name))
            for name in self.__struct_fields__
            if name not in ("k", "layers", "max_expert")
        }
        max_expert = max(self.max_expert, other.max_expert)
        return RouterBucket(k=self.k, layers=self.layers, max_expert=max_expert, **merged)

    def metrics(self) -> dict[str, RouterValue]:
        """Every metric of METRICS 3 by name; None where it is undefined (see `undefined`)."""
        shared = np.array(self.shared, dtype=np.int64).reshape(len(self.layers), self.k + 1)
        cells = shared.sum(axis=1)
        total = shared.sum(axis=0)
        n = int(cells.sum())
        differing = n - int(total[-1]) if n else 0
        by_layer = {name: _rates(f, shared) for name, f in _SET_METRICS.items()}
        out: dict[str, RouterValue] = {
            "n_cells": n,
            "n_rows": self.n_rows,
            "n_excluded": sum(self.excluded.values()),
            **{f"n_excluded_{cause}": self.excluded.get(cause, 0) for cause in CAUSES},
            **{
                name: _rates(f, total[None, :])[0] if n else None
                for name, f in _SET_METRICS.items()
            },
            "router_token_any_layer_rate": _over(self.rows_any, self.n_rows),
            "router_layers_disagree_per_token": _over(differing, self.n_rows),
            "router_top1_flip_rate": (
                None if self._order_reason() else _over(sum(self.slot0_flips), n)
            ),
            "router_slot0_flip_rate": _over(sum(self.slot0_flips), n),
            "router_worst_layer": self._worst_layer(by_layer["router_set_disagree_rate"]),
            "layers": self.layers,
        }
        out |= {f"{name}_by_layer": values for name, values in by_layer.items()}
        out["router_slot0_flip_rate_by_layer"] = [
            _over(flips, int(of)) for flips, of in zip(self.slot0_flips, cells, strict=True)
        ]
        out["router_set_disagree_rate_by_position"] = [
            _over(d, c) for d, c in zip(self.position_disagree, self.position_cells, strict=True)
        ]
        return out | self._margins()

    def _margins(self) -> dict[str, RouterValue]:
        clear = self.margin_cells - self.margin_near
        return {
            "router_flip_margin_mean": _over(self.margin_flips_sum, self.margin_flips),
            "router_flip_margin_near_tie_frac": _over(self.margin_flips_near, self.margin_flips),
            "router_flip_margin_near_tie_rate": _over(self.margin_flips_near, self.margin_near),
            "router_flip_margin_clear_rate": _over(
                self.margin_flips - self.margin_flips_near, clear
            ),
            "router_tie_count": self.margin_ties if self.margin_cells else None,
            "router_near_tie_count": self.margin_near if self.margin_cells else None,
        }

    def _worst_layer(self, rates: list[float | None]) -> int | None:
        known = [(rate, -layer) for rate, layer in zip(rates, self.layers, strict=True) if rate]
        return -max(known)[1] if known else None

    def _order_reason(self) -> str | None:
        sides = [
            side
            for side, cells in (
                ("rollout", self.unordered_rollout),
                ("train", self.unordered_train),
            )
            if cells
        ]
        if not sides:
            return None
        return f"not proven that slot 0 is the most probable expert: {', '.join(sides)}"

    def undefined(self) -> dict[str, str]:
        """Why each metric that is None is None."""
        return {name: self._why(name) for name, value in self.metrics().items() if value is None}

    def _why(self, name: str) -> str:
        if not self.n_cells:
            return f"no valid cell ({sum(self.excluded.values())} excluded)"
        if name == "router_top1_flip_rate":
            return self._order_reason() or "no valid cell"
        if name == "router_worst_layer":
            return "no layer differs"
        if not self.margin_cells:
            return "the trainer gave no margins"
        return "no cell of that kind"


_SET_METRICS = {
    "router_set_disagree_rate": lambda shared, k: (shared < k).astype(np.float64),
    "router_expert_miss_rate": lambda shared, k: 1.0 - shared / k,
    "router_jaccard_mean": lambda shared, k: shared / (2 * k - shared),
    "router_zero_overlap_rate": lambda shared, k: (shared == 0).astype(np.float64),
}
"""Value of one cell by how many of its K experts both sides chose."""


def _rates(value: Any, shared: I64) -> list[float | None]:
    """Mean of ``value`` per row of ``shared`` [rows, K + 1]; None for a row without cells."""
    k = shared.shape[1] - 1
    values = value(np.arange(k + 1), k) if k > 0 else np.zeros(k + 1)
    return [float(row @ values) / int(row.sum()) if row.any() else None for row in shared]


def _over(total: float, n: int) -> float | None:
    return total / n if n else None


def _added(a: Any, b: Any) -> Any:
    if isinstance(a, list):
        return [
            _added(x, y)
            for x, y in zip(a + [0] * (len(b) - len(a)), b + [0] * (len(a) - len(b)), strict=True)
        ]
    if isinstance(a, dict):
        return {key: a.get(key, 0) + b.get(key, 0) for key in {**a, **b}}
    return a + b


def _empty(k: int, layers: list[int]) -> RouterBucket:
    return RouterBucket(
        k=k, layers=layers, shared=[[0] * (k + 1) for _ in layers], slot0_flips=[0] * len(layers)
    )


def by_layer(routes: IntArray, layer_ids: Sequence[int] | None) -> IntArray:
    """Cut [R, L, K] to the MoE layers where its L axis counts all hidden layers. ValueError where
    it is neither."""
    if routes.ndim != 3 or routes.shape[2] < 1 or routes.dtype.kind not in "iu":
        raise ValueError(f"routes must be integers [R, L, K], got {routes.dtype} {routes.shape}")
    if layer_ids is None or routes.shape[1] == len(layer_ids):
        return routes
    if not layer_ids or routes.shape[1] <= max(layer_ids):
        raise ValueError(
            f"routes have {routes.shape[1]} layers: neither the {len(layer_ids)} MoE layers nor "
            f"all hidden layers up to number {max(layer_ids, default=-1)}"
        )
    return routes[:, list(layer_ids)]


def _chunks(a: IntArray, b: IntArray) -> Iterator[tuple[int, IntArray, IntArray]]:
    """(first row, rows of a, rows of b) in pieces of about CHUNK_CELLS cells."""
    rows = max(1, CHUNK_CELLS // max(1, a.shape[1]))
    for start in range(0, len(a), rows):
        yield start, a[start : start + rows], b[start : start + rows]


def valid_cells(rollout: IntArray, train: IntArray, num_experts: int | None = None) -> Bools:
    """[R, L]: both sides chose K experts there; see this module for what is left out."""
    valid: Bools = _invalid(rollout, train, num_experts) == 0
    return valid


def _invalid(a: IntArray, b: IntArray, num_experts: int | None) -> npt.NDArray[np.int8]:
    """[...] 0 for a valid cell, else 1 + index of its cause in CAUSES."""
    k = a.shape[-1]
    cause = np.zeros(a.shape[:-1], dtype=np.int8)
    for side in (a, b):
        if k > 1:
            ordered = np.sort(side, axis=-1)
            repeated = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
            cause[repeated & (cause == 0)] = 3
            cause[~side.any(axis=-1) & (cause != 1)] = 2
        outside = (side < 0).any(axis=-1)
        if num_experts is not None:
            outside |= (side >= num_experts).any(axis=-1)
        cause[outside] = 1
    return cause


def _count(
    a: IntArray,
    b: IntArray,
    start: int,
    margins: npt.NDArray[Any] | None,
    layers: list[int],
    num_experts: int | None,
) -> RouterBucket:
    """The bucket of rows ``start ...`` of a response, without the order flags."""
    n_layers, k = a.shape[1], a.shape[2]
    cause = _invalid(a, b, num_experts)
    valid = cause == 0
    shared = shared_experts(a, b)
    differs = valid & (shared < k)
    code = (shared + (k + 1) * np.arange(n_layers))[valid]
    histogram = np.bincount(code, minlength=n_layers * (k + 1)).reshape(n_layers, k + 1)
    flips = (valid & (a[..., 0] != b[..., 0])).sum(axis=0)
    position = np.log2(np.arange(start, start + len(a)) + 1.0).astype(np.int64)
    largest = max((int(side[valid].max()) for side in (a, b)), default=-1) if valid.any() else -1
    bucket = RouterBucket(
        k=k,
        layers=layers,
        n_rows=int(valid.any(axis=1).sum()),
        excluded={name: int((cause == i + 1).sum()) for i, name in enumerate(CAUSES)},
        shared=histogram.tolist(),
        slot0_flips=flips.tolist(),
        rows_any=int(differs.any(axis=1).sum()),
        position_cells=_binned(position, valid),
        position_disagree=_binned(position, differs),
        max_expert=largest,
    )
    if margins is not None:
        _count_margins(bucket, np.asarray(margins, dtype=np.float64), valid, differs)
    return bucket


def _binned(position: I64, cells: Bools) -> list[int]:
    bins: list[int] = np.bincount(position, weights=cells.sum(axis=1)).astype(np.int64).tolist()
    return bins


def _count_margins(
    bucket: RouterBucket, margins: npt.NDArray[np.float64], valid: Bools, differs: Bools
) -> None:
    known = valid & np.isfinite(margins)
    near = known & (margins < NEAR_TIE_MARGIN)
    flipped = known & differs
    bucket.margin_cells = int(known.sum())
    bucket.margin_ties = int((known & (margins == 0.0)).sum())
    bucket.margin_near = int(near.sum())
    bucket.margin_flips = int(flipped.sum())
    bucket.margin_flips_near = int((flipped & near).sum())
    bucket.margin_flips_sum = float(margins[flipped].sum())

"""Many short answers judged as one: scores pooled by what was asked, and the pools tested.

An agent's step has too few tokens for the tests of METRICS 4, so that each score passes by itself
with ``low_power``. Together they have the power. A pool holds the scores of one cell that share
their sampling settings; where its merged sums fail a test, none of its scores is evidence of
drift, whatever each said by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal

import msgspec

from driftgate.codes import SEVERITY, SPOILS_ROUTES, reason
from driftgate.comparable import judge_merged
from driftgate.lag import lag_label
from driftgate.mismatch import Bucket, Worst
from driftgate.replay import ReplayPair
from driftgate.router import RouterBucket
from driftgate.trace import Engine, Reason, Sampling, ScoreMeta

__all__ = [
    "MAX_POOLS",
    "OTHERS",
    "Findings",
    "Judged",
    "LagSums",
    "Pools",
    "pool_of",
    "refusals",
    "refutes",
]

MAX_POOLS = 32
"""Of one cell. Agents use a handful of settings; one that draws its temperature must not grow the
cell without end."""

OTHERS = "others"
"""The pool of what comes after `MAX_POOLS` kinds of settings: tested for what holds for any."""

SHOWN = ("low_power",)
"""Notes of a pool that are told besides what refutes it: it was not tested."""

NO_REASON = reason("reason_unknown", "not comparable, and no known reason", "score it again")
"""Of a score that is not comparable and does not say why: it may doubt anything."""

Findings = Mapping[str, Sequence[Reason]]
"""What the merged sums of each pool gave, by its key; every pool has an entry."""


def pool_of(meta: ScoreMeta, known: Collection[str]) -> str:
    """Key of the pool that a score belongs to; ``known``: of the cell's pools so far."""
    key = f"{_settings(meta.sampling)} @ T = {meta.temperature:g}"
    return key if key in known or len(known) < MAX_POOLS else OTHERS


def refutes(reasons: Iterable[Reason], codes: Collection[str] | None = None) -> bool:
    """Any of ``reasons`` makes the numbers no evidence (``codes``: only these count)."""
    return any(SEVERITY.get(r.code) == "no" and (codes is None or r.code in codes) for r in reasons)


def refusals(meta: ScoreMeta, findings: Findings) -> list[Reason]:
    """Why this score is no evidence, each code once; empty where it is.

    Its own reasons, then those of its pool among ``findings``, which are of a cell that it is
    folded into.
    """
    pooled = findings.get(pool_of(meta, findings), ())
    found: dict[str, Reason] = {}
    for one in (*meta.comparable.reasons, *pooled):
        if refutes([one]):
            found.setdefault(one.code, one)
    if not found and meta.comparable.verdict == "no":
        found[NO_REASON.code] = NO_REASON
    return list(found.values())


def _settings(sampling: Sampling | None) -> str:
    """In words, what was asked that shapes the sampling density; the same words, the same pool."""
    if sampling is None:
        return "settings not recorded"
    bare = msgspec.structs.replace(sampling, seed=None, n=1, max_tokens=None)
    return ", ".join(f"{k}={v}" for k, v in msgspec.to_builtins(bare).items()) or "nothing sent"


@dataclass(slots=True)
class _Pool:
    """Sums of the scores of one cell that share their settings."""

    sampling: Sampling | None
    temperature: float
    buckets: dict[str, Bucket] = field(default_factory=dict)
    """By lag, over the scores whose own verdict is not ``no``; so are the next three."""
    at_requested: Bucket | None = None
    worst: Worst | None = None
    replay: ReplayPair | None = None
    """Over those of them that were scored under the rollout's routes too."""
    converted: bool = False
    """One of them is."""
    routers: dict[str, RouterBucket] = field(default_factory=dict)
    """By lag, over the scores without a reason that spoils routes."""

    @property
    def bucket(self) -> Bucket | None:
        """Over all lags."""
        return reduce(Bucket.merge, self.buckets.values()) if self.buckets else None

    @property
    def router(self) -> RouterBucket | None:
        """Over all lags."""
        return reduce(RouterBucket.merge, self.routers.values()) if self.routers else None

    def add(self, meta: ScoreMeta) -> None:
        lag = lag_label(meta.weight_version, meta.trainer_weight_version)
        if meta.router is not None and not refutes(meta.comparable.reasons, SPOILS_ROUTES):
            known = self.routers.get(lag)
            self.routers[lag] = meta.router if known is None else known.merge(meta.router)
        if meta.bucket is None or meta.comparable.verdict == "no":
            return
        self.buckets[lag] = merged(self.buckets.get(lag), meta.bucket)
        if meta.at_requested_temperature is not None:
            self.at_requested = merged(self.at_requested, meta.at_requested_temperature)
        self.worst = larger(self.worst, meta.worst)
        if (pair := ReplayPair.of(meta)) is not None:
            self.replay = pair if self.replay is None else self.replay.merge(pair)
        self.converted |= meta.comparable.verdict == "converted"

    def judge(self, engine: Engine) -> list[Reason]:
        return judge_merged(
            engine,
            self.sampling,
            temperature=self.temperature,
            headline=self.bucket,
            at_requested=self.at_requested,
            router=self.router,
        )


class LagSums(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a cell that was sampled so many weight versions before it was scored."""

    label: str
    """Of `driftgate.lag.lag_label`."""
    bucket: Bucket | None
    router: RouterBucket | None


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """What is left of a cell once its pools are judged."""

    verdict: Literal["yes", "converted", "no"]
    """Of what is left: ``no`` where nothing is."""
    findings: dict[str, list[Reason]]
    """What refutes a pool or kept it from being tested, by pool."""
    bucket: Bucket | None
    router: RouterBucket | None
    worst: Worst | None
    replay: ReplayPair | None = None
    """Of the scores behind ``bucket`` that were scored under the rollout's routes too."""
    by_lag: list[LagSums] = []
    """``bucket`` and ``router`` by policy lag; their sums are those."""


class Pools:
    """The pools of one cell, filled score by score."""

    def __init__(self) -> None:
        self._pools: dict[str, _Pool] = {}

    def add(self, meta: ScoreMeta) -> None:
        """Fold one score of the cell."""
        key = pool_of(meta, self._pools)
        if key not in self._pools:
            sampling = None if key == OTHERS else meta.sampling
            self._pools[key] = _Pool(sampling, meta.temperature)
        self._pools[key].add(meta)

    def judge(self, engine: Engine | None, wider: Findings | None = None) -> Judged:
        """Test each pool and fold what stands.

        ``engine`` None: a noise floor, where nothing was sampled twice that could be tested.
        ``wider``: findings of a cell that this is a part of; what they refute is refuted here too.
        """
        findings = {}
        for key, pool in self._pools.items():
            own = pool.judge(engine) if engine is not None else []
            found = [r for r in own if SEVERITY[r.code] == "no" or r.code in SHOWN]
            findings[key] = [*found, *_inherited(key, found, wider or {})]
        sound = [pool for key, pool in self._pools.items() if not refutes(findings[key])]
        routed = [
            pool for key, pool in self._pools.items() if not refutes(findings[key], SPOILS_ROUTES)
        ]
        buckets = [bucket for pool in sound if (bucket := pool.bucket) is not None]
        routers = [router for pool in routed if (router := pool.router) is not None]
        pairs = [pool.replay for pool in sound if pool.replay is not None]
        converted = any(pool.converted for pool in sound)
        return Judged(
            verdict="no" if not buckets else "converted" if converted else "yes",
            findings=findings,
            bucket=reduce(Bucket.merge, buckets) if buckets else None,
            router=reduce(RouterBucket.merge, routers) if routers else None,
            worst=reduce(larger, (pool.worst for pool in sound), None),
            replay=reduce(ReplayPair.merge, pairs) if pairs else None,
            by_lag=list(_by_lag(sound, routed)),
        )


def _by_lag(sound: Sequence[_Pool], routed: Sequence[_Pool]) -> Iterator[LagSums]:
    """In order of the lag; what is not a number comes last."""
    labels = {label for pool in sound for label in pool.buckets}
    labels |= {label for pool in routed for label in pool.routers}
    for label in sorted(labels, key=lambda one: (not one.isdigit(), one.zfill(3))):
        buckets = [pool.buckets[label] for pool in sound if label in pool.buckets]
        routers = [pool.routers[label] for pool in routed if label in pool.routers]
        yield LagSums(
            label=label,
            bucket=reduce(Bucket.merge, buckets) if buckets else None,
            router=reduce(RouterBucket.merge, routers) if routers else None,
        )


def merged(total: Bucket | None, bucket: Bucket) -> Bucket:
    """The sum of both, where there is one already."""
    return bucket if total is None else total.merge(bucket)


def larger(old: Worst | None, new: Worst | None) -> Worst | None:
    """The one with the larger |D|; of equals the older."""
    if old is None or new is None:
        return old or new
    return new if abs(new.log_ratio) > abs(old.log_ratio) else old


def _inherited(key: str, own: Sequence[Reason], wider: Findings) -> list[Reason]:
    known = {r.code for r in own}
    return [
        msgspec.structs.replace(r, detail=f"in the whole cell, {r.detail}")
        for r in wider.get(key, wider.get(OTHERS, ()))
        if SEVERITY.get(r.code) == "no" and r.code not in known
    ]

"""METRICS 5: verdicts over many random responses against the rules written out by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from driftgate.mismatch import Bucket
from driftgate.profiles import PROFILES
from driftgate.router import RouterBucket
from driftgate.verdict import Lag, Subject, judge
from science import by_hand
from science.table import Row, exactly

__all__ = ["verdicts"]

RESPONSES = 400
TOKENS = 200


def verdicts(part: str) -> Iterator[Row]:
    """How often ours and the rules agree, and how often each verdict came up."""
    rng = np.random.default_rng(0)
    agreed: Counter[str] = Counter()
    came: dict[str, Counter[str]] = {name: Counter() for name in PROFILES}
    for _ in range(RESPONSES):
        d = rng.normal(0, 10.0 ** rng.uniform(-3, 0), TOKENS)
        spikes = rng.random(TOKENS) < 10.0 ** rng.uniform(-4, -1)
        d = np.where(spikes, d + rng.normal(0, rng.choice([1.0, 5.0, 25.0]), TOKENS), d)
        lag = int(rng.choice([0, 0, 0, 0, 1, 4, 5, 8, 9]))
        a = rng.random((TOKENS, 1, 8)).argsort(-1)[..., :2].astype(np.uint8)
        b = a.copy()
        moved = rng.random(TOKENS) < rng.choice([0.0, 0.1, 0.3])
        b[moved] = (a[moved] + 1) % 8
        rates = by_hand.router(a, b, None, ordered=True)
        rollout = np.full(TOKENS, -2.0 - max(0.0, float(d.max())))
        found = Subject(
            captured=1,
            scorable=1,
            scored=1,
            tokens=TOKENS,
            bucket=Bucket.of(rollout + d, rollout),
            router=RouterBucket.of(a, b, rollout_ordered=True, train_ordered=True),
            lag=Lag(steps=lag),
        )
        for name, profile in PROFILES.items():
            ours = judge(found, profile).verdict
            wanted = by_hand.verdict(
                name, d, lag, rates["router_set_disagree_rate"], rates["router_slot0_flip_rate"]
            )
            agreed[name] += ours == wanted
            came[name][wanted] += 1
    for name in PROFILES:
        yield exactly(part, f"profile {name}: verdicts as the rules", agreed[name], RESPONSES)
        yield exactly(part, f"profile {name}: kinds of verdict that came up", len(came[name]), 4)

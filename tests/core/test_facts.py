"""Facts that single traces cannot tell: other digests of one tokenizer, caches older than weights;
and that every reason there is can be given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from driftgate.codes import CODES
from driftgate.comparable import judge
from driftgate.facts import NEUTRAL_DEFAULTS, Parent
from driftgate.mismatch import Bucket
from driftgate.trace import Comparable, Engine, Proof, Sampling, TraceMeta, Trainer

DEFAULTS = {f"default_{name}": str(value) for name, value in NEUTRAL_DEFAULTS.items()}
ENGINE = Engine(
    name="vllm", version="1", model="m", logprobs_mode="raw_logprobs", settings=DEFAULTS
)
TRAINER = Trainer(backend="reference", model="m", dtype="float32", settings={"weight_version": "7"})


def meta(**fields: Any) -> TraceMeta:
    given: dict[str, Any] = {
        "trace_id": "c.0",
        "call_id": "c",
        "trajectory": "t",
        "step": 1,
        "choice": 0,
        "api": "chat",
        "model": "m",
        "attribution": "url",
        "engine": ENGINE,
        "sampling": Sampling(temperature=1.0),
        "streamed": False,
        "started_ns": 0,
        "ended_ns": 1,
        "weight_version": "7",
    }
    return TraceMeta(**(given | fields))


def drifted(d: float, n: int = 40) -> Bucket:
    rollout = np.log(np.random.default_rng(n).uniform(0.1, 0.9, n))
    return Bucket.of(rollout + d, rollout)


def codes(result: Comparable) -> list[str]:
    return [reason.code for reason in result.reasons]


def test_a_tokenizer_digest_refuses_only_numbers_that_differ_too() -> None:
    trace = meta(engine=msgspec.structs.replace(ENGINE, settings={**DEFAULTS, "tokenizer": "a"}))
    trainer = msgspec.structs.replace(TRAINER, settings={**TRAINER.settings, "tokenizer": "b"})
    result = judge(trace, trainer, at_one=drifted(0.001))
    assert (result.verdict, codes(result)[0]) == ("yes", "tokenizer_digest_differs")
    assert judge(trace, trainer, at_one=drifted(0.05)).verdict == "no"


@pytest.mark.parametrize(
    ("cached", "sampled_under", "stale"),
    [
        (80, "6", True),
        (80, "7", False),
        (80, "unknown", False),
        (48, "6", False),  # a system prompt, which any run may have cached since
        (None, "6", False),
    ],
)
def test_a_prefix_cache_older_than_the_weights_is_told_by_what_only_the_parent_cached(
    cached: int | None, sampled_under: str, stale: bool
) -> None:
    trace = meta(parent="b.0", prefix_len=90, prefix_exact=True, proof=Proof(usage_cached=cached))
    parent = Parent("b.0", prompt_len=50, weight_version=sampled_under)
    result = judge(trace, TRAINER, at_one=drifted(0.001), parent=parent)
    assert ("prefix_cache_stale" in codes(result)) == stale
    assert result.verdict == ("no" if stale else "yes")
    if stale:
        assert "80 prompt tokens came from the prefix cache, 30 of them" in result.reasons[0].detail


def test_nan_and_sentinels_are_left_out_and_named() -> None:
    rollout = np.full(40, -1.0)
    train = rollout + 0.001
    train[3], rollout[7], rollout[9] = np.nan, -9999.0, 0.5
    bucket = Bucket.of(train, rollout)
    assert (bucket.n_tokens, bucket.n_bad_tokens) == (37, 3)
    result = judge(meta(), TRAINER, at_one=bucket)
    assert (result.verdict, codes(result)[0]) == ("converted", "bad_logprobs")
    assert result.reasons[0].detail == "3 of 40 tokens left out"


UNREACHED = {"incomplete_capture"}
"""Of a trace that the index calls scorable and that is not: storage leases no such trace."""


def test_every_reason_has_a_test_that_plants_it() -> None:
    tests = Path(__file__).parents[1]
    words = "".join(path.read_text() for path in tests.rglob("test_*.py"))
    assert {
        code for code in CODES if f'"{code}"' not in words and f"{code}:" not in words
    } <= UNREACHED

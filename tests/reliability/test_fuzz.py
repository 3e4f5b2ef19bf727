"""A short run of every fuzz target, and proof that a run finds what there is to find."""

from __future__ import annotations

import pytest

from reliability.fuzz import run
from reliability.fuzz_targets import TARGETS

CASES = 3_000


@pytest.mark.parametrize("name", [target.name for target in TARGETS])
def test_nothing_that_reads_foreign_bytes_breaks(name: str) -> None:
    outcome = run(name, CASES)
    assert outcome.said == ""
    assert outcome.cases >= CASES


def test_what_breaks_is_found() -> None:
    outcome = run("canary", 100_000)
    assert outcome.finds == 1
    assert "AssertionError: found" in outcome.said

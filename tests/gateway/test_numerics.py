"""The fingerprint of an engine's arithmetic: what it is over, and when there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from driftgate.gateway.numerics import SETTING, Numerics, fingerprint_of
from driftgate.gateway.weights import Weights
from tests.gateway.conftest import Agent, StandIn
from tests.gateway.test_upstream import REPORT as BARE

Connect = Callable[..., Any]

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
REPORT = msgspec.structs.replace(BARE, logprobs=True)
ROWS = {"tokens": ["a", "b"], "token_logprobs": [-0.5, -1.25]}


def test_noise_below_the_rounding_is_no_difference() -> None:
    base = fingerprint_of(ROWS)
    near = {"tokens": ["a", "b"], "token_logprobs": [-0.50001, -1.2501]}
    assert fingerprint_of(near) == base
    assert fingerprint_of(ROWS | {"token_logprobs": [-0.52, -1.25]}) != base
    assert fingerprint_of(ROWS | {"tokens": ["a", "c"]}) != base
    assert fingerprint_of({"tokens": ["a"], "token_logprobs": [-0.0]}) == fingerprint_of(
        {"tokens": ["a"], "token_logprobs": [0.0]}
    )


@pytest.mark.parametrize(
    "rows",
    [
        {"tokens": [], "token_logprobs": []},
        {"tokens": ["a"], "token_logprobs": [None]},
        {"tokens": ["a"], "token_logprobs": [-1.0, -2.0]},
        {"tokens": ["a"]},
    ],
)
def test_what_is_no_reading(rows: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        fingerprint_of(rows)


async def numerics(agent: Agent) -> str | None:
    """In the trace of a call."""
    await agent.send(CHAT)
    return (await agent.traces())[-1].meta.engine.settings.get(SETTING)


async def test_an_engine_is_named_by_its_numbers(connect: Connect, tmp_path: Any) -> None:
    one = await numerics(await connect(store=tmp_path / "1"))
    again = await numerics(await connect(store=tmp_path / "2"))
    assert one is not None
    assert one == again


async def test_other_numbers_are_another_engine(
    connect: Connect, engine: StandIn, tmp_path: Any
) -> None:
    one = await numerics(await connect(store=tmp_path / "1"))
    sample = engine.sample

    def colder(body: dict[str, Any], choice: int) -> tuple[list[int], list[str], list[float]]:
        ids, texts, values = sample(body, choice)
        return ids, texts, [value * 1.05 for value in values]

    engine.sample = colder  # type: ignore[method-assign]
    other = await numerics(await connect(store=tmp_path / "2"))
    assert other not in (one, None)


async def test_numbers_that_do_not_repeat_are_no_fingerprint(
    connect: Connect, engine: StandIn
) -> None:
    sample, tries = engine.sample, iter(range(100))

    def noisy(body: dict[str, Any], choice: int) -> tuple[list[int], list[str], list[float]]:
        ids, texts, values = sample(body, choice)
        shift = 0.1 * next(tries)
        return ids, texts, [value - shift for value in values]

    engine.sample = noisy  # type: ignore[method-assign]
    assert await numerics(await connect()) is None


async def test_weights_that_were_updated_in_place_have_none() -> None:
    weights = Weights("unknown")
    weights.tell("42", 1, 1)
    numerics = Numerics("http://127.0.0.1:9", None)  # where nobody is asked
    await numerics.read(REPORT, weights)
    assert numerics.known(REPORT)
    assert numerics.setting(REPORT.system_fingerprint) == {}

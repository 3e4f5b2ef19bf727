"""The API does what its OpenAPI document says, for requests that follow it and that do not."""

from __future__ import annotations

from reliability.schema import examine


async def test_the_api_keeps_to_its_document() -> None:
    found = await examine(10)
    assert found.passed, found.said
    assert found.operations >= 15
    assert found.cases > 300

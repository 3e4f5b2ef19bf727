"""Bodies that engines take and JSON does not: whole in a document of ours, and nothing lost."""

from __future__ import annotations

import json

import msgspec
import pytest

from driftgate.bodies import body_of, json_of

LAX = '{"model":"m","note":NaN}'
ESCAPED = r'{"text":"\ud800"}'


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", None),
        (b'{"temperature": 1.50,\n "n": 1}', {"temperature": 1.5, "n": 1}),
        (b'\xef\xbb\xbf{"a":1}', {"a": 1}),
        ('{"a":"é"}'.encode("utf-16"), {"a": "é"}),
        (LAX.encode(), LAX),
        (LAX.encode("utf-16"), LAX),
        (ESCAPED.encode(), ESCAPED),
        (b'{"a":"\xff"}', {"base64": "eyJhIjoi/yJ9"}),
    ],
)
def test_every_body_is_json(body: bytes, told: object) -> None:
    raw = json_of(body)
    assert json.loads(msgspec.json.encode(raw)) == told
    assert json_of(body_of(raw)) == raw
    assert b"\n" not in bytes(raw)


def test_what_is_given_back_is_spelled_as_it_was() -> None:
    for body in (b"", b'{"a":1.50}', b"{}", LAX.encode(), b'{"a":"\xff"}'):
        assert body_of(json_of(body)) == body

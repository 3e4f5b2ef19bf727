"""Logs: one JSON object a line, and nothing that looks like a credential in either format."""

from __future__ import annotations

import io
import json
import logging

import pytest

from driftgate.logs import JsonFormatter, TextFormatter, blanked

SECRETS = [
    "Authorization: Bearer abc.DEF-123",
    "'authorization': 'abcDEF123'",
    "api_key=abcDEF123",
    '{"x-api-key": "abcDEF123"}',
    "http://user:abcDEF123@engine:8000/v1",
    "sk-proj-abcDEF123",
    "Authorization: Basic abcDEF123==",
    "sent Bearer abcDEF123",
]


def logger(formatter: logging.Formatter) -> tuple[logging.Logger, io.StringIO]:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(formatter)
    log = logging.Logger("driftgate.test")
    log.addHandler(handler)
    return log, out


def test_a_line_is_one_object_with_what_the_call_gave() -> None:
    log, out = logger(JsonFormatter())
    log.warning("two\nlines %d", 2, extra={"trajectory": "run-17", "step": 3})
    try:
        raise ValueError("bad")
    except ValueError:
        log.exception("failed")
    first, second = map(json.loads, out.getvalue().splitlines())
    assert first["message"] == "two\nlines 2"
    assert (first["level"], first["logger"]) == ("warning", "driftgate.test")
    assert (first["trajectory"], first["step"]) == ("run-17", 3)
    assert first["time"].endswith("+00:00")
    assert "ValueError: bad" in second["exception"]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter("%(message)s")])
def test_credentials_are_blanked(secret: str, formatter: logging.Formatter) -> None:
    log, out = logger(formatter)
    log.error("the engine said %s", secret, extra={"said": secret})
    try:
        raise RuntimeError(secret)
    except RuntimeError:
        log.exception("failed")
    assert "abc" not in out.getvalue()
    assert "***" in out.getvalue()


def test_ordinary_words_stay() -> None:
    text = "probing http://engine:8000/v1 with basic settings, keys: 3; the bearer of news"
    assert blanked(text) == text

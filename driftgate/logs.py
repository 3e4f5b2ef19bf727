"""What a process of ours logs, and how: lines for people, or a JSON object a line for a collector.

Credentials are not put into messages. What looks like one all the same (an engine's error may quote
a header) is blanked here, in both formats, because logs are copied to places that nobody guards.
"""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime
from typing import Literal

import msgspec

__all__ = ["JsonFormatter", "LogFormat", "TextFormatter", "blanked", "configure"]

LogFormat = Literal["text", "json"]

CREDENTIALS = re.compile(
    r"(?i)(?P<before>\bauthorization\W{1,4}(?:(?:bearer|basic)\s+)?"
    r"|\bbearer\s+(?=\S{8})"
    r"|\b(?:x-)?api[-_]key\W{1,4}"
    r"|://[^\s/@:]*:(?=[^\s/@]+@))"
    r"[^\s\"'@,;]+"
    r"|\bsk-[\w-]{8,}"
)
"""Authorization's values, API keys by name, passwords in URLs, and keys that look like OpenAI's."""

STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""Attributes of every record; what else is there was given as ``extra``."""


def blanked(text: str) -> str:
    """``text`` with ``***`` in place of what looks like a credential."""
    return CREDENTIALS.sub(lambda found: f"{found['before'] or ''}***", text)


class TextFormatter(logging.Formatter):
    """A line for people."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with a traceback behind it where there is one."""
        return blanked(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and what the call gave as
    ``extra``; ``exception`` holds a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": blanked(record.getMessage()),
        }
        for name, value in vars(record).items():
            if name not in STANDARD:
                fields[name] = blanked(value) if isinstance(value, str) else value
        if record.exc_info:
            fields["exception"] = blanked(self.formatException(record.exc_info))
        return msgspec.json.encode(fields, enc_hook=lambda value: blanked(str(value))).decode()


def configure(how: LogFormat) -> None:
    """Log to stderr from INFO on. Once, where a process begins."""
    handler = logging.StreamHandler()
    text = TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if how == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler])

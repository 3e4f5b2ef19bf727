"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = [
    "DAMAGED_STATUS",
    "DEFAULT_STORE",
    "JsonOption",
    "KeyOption",
    "LogFormatOption",
    "StoreInstead",
    "StoreOption",
    "UrlOption",
]

DEFAULT_STORE = Path("driftgate-store")
"""The gateway's default as well."""

DAMAGED_STATUS = 1
"""Exit status where something could not be read; the rest is done."""

StoreOption = Annotated[
    Path, typer.Option("--store", help="Directory of the store.", envvar="DRIFTGATE_STORE")
]
StoreInstead = Annotated[
    Path | None,
    typer.Option("--store", help="Read this store directly instead of asking a gateway."),
]
UrlOption = Annotated[
    str, typer.Option("--url", help="Address of the gateway.", envvar="DRIFTGATE_URL")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the API's JSON.")]
KeyOption = Annotated[
    str | None,
    typer.Option("--key", help="Key for reading, if asked for.", envvar="DRIFTGATE_KEY"),
]
LogFormatOption = Annotated[
    Literal["text", "json"] | None,
    typer.Option("--log-format", help="json: one object a line on stderr; else text."),
]

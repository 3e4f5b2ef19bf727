"""The formats of ``driftgate export`` by name; a format's module is loaded when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Literal, get_args

from driftgate.adapters.export_base import Format

__all__ = ["NAMES", "FormatName", "load"]

FormatName = Literal[
    "hf", "megatron", "miles", "nemo-rl", "parquet", "prime-rl", "skyrl", "slime", "trl", "verl"
]
NAMES: tuple[FormatName, ...] = get_args(FormatName)

ELSEWHERE = {"hf": "parquet:HF", "megatron": "megatron_routes:FORMAT", "miles": "slime:MILES"}
"""Formats that are not ``FORMAT`` in the module of their name."""


def load(name: FormatName) -> Format:
    """The format of that name."""
    module, _, attribute = ELSEWHERE.get(name, f"{name.replace('-', '_')}:FORMAT").partition(":")
    found = getattr(import_module(f"driftgate.adapters.{module}"), attribute)
    assert isinstance(found, Format)
    return found

"""The formats of ``driftgate export`` by name; a format's module is loaded when it is asked for."""

from __future__ import annotations

from importlib import import_module

from driftgate.adapters.export_base import Format

__all__ = ["load"]

ELSEWHERE = {"hf": "parquet:HF", "megatron": "megatron_routes:FORMAT", "miles": "slime:MILES"}
"""Formats that are not ``FORMAT`` in the module of their name."""


def load(name: str) -> Format:
    """The format of that name, one of ``driftgate.commands.export.FormatOption``."""
    module, _, attribute = ELSEWHERE.get(name, f"{name.replace('-', '_')}:FORMAT").partition(":")
    found = getattr(import_module(f"driftgate.adapters.{module}"), attribute)
    assert isinstance(found, Format)
    return found

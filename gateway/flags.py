"""What a server says of its own flags, as settings of an engine's fingerprint.

SGLang answers with all its arguments; of vLLM only the line of its metrics about the KV cache is
open to everybody, and ``system_fingerprint`` hashes the rest. Pure but for reading a model's
``config.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from driftgate.errors import UNREADABLE

__all__ = ["ServerInfo", "cache_flags", "read_info"]

FLAGS = {
    "dtype": "dtype",
    "quantization": "quantization",
    "kv_cache_dtype": "kv_cache_dtype",
    "attention_backend": "attention_backend",
    "sampling_backend": "sampling_backend",
    "moe_runner_backend": "moe_backend",
    "tp_size": "tp",
    "dp_size": "dp",
    "ep_size": "ep",
    "pp_size": "pp",
    "speculative_algorithm": "speculative",
    "enable_deterministic_inference": "deterministic",
}
"""SGLang's arguments that change numbers, and their names in a fingerprint."""

RETURNS_ROUTES = "enable_return_routed_experts"
CACHE_LABELS = {"cache_dtype": "kv_cache_dtype", "block_size": "kv_block_size"}
_CACHE_LINE = re.compile(rb"^vllm:cache_config_info\{([^}]*)\}", re.MULTILINE)
_LABEL = re.compile(rb'(\w+)="([^"\\]*)"')

MAX_CONFIG_BYTES = 1 << 20
"""Real ones have a few thousand bytes."""


class ServerInfo(NamedTuple):
    """Of one server; empty where it does not tell."""

    version: str | None = None
    flags: dict[str, str] = {}  # noqa: RUF012  a NamedTuple's default, never changed
    route_shape: tuple[int, int] | None = None


def read_info(said: Mapping[str, Any], root: str | None) -> ServerInfo:
    """SGLang's ``/server_info``; ``root`` is where it says that the model lies."""
    flags = {
        name: str(said[key]).lower()
        for key, name in FLAGS.items()
        if said.get(key) not in (None, "", False)
    }
    shape = _route_shape(root) if said.get(RETURNS_ROUTES) else None
    version = said.get("version")
    return ServerInfo(version if isinstance(version, str) else None, flags, shape)


def cache_flags(metrics: bytes) -> dict[str, str]:
    """Of vLLM's ``/metrics``; empty where there is no such line."""
    line = _CACHE_LINE.search(metrics)
    labels = dict(_LABEL.findall(line[1])) if line else {}
    return {
        name: labels[label.encode()].decode(errors="replace")
        for label, name in CACHE_LABELS.items()
        if label.encode() in labels
    }


def _route_shape(root: str | None) -> tuple[int, int] | None:
    """SGLang gives a row for every layer of the model, dense ones too."""
    if root is None:
        return None
    try:
        with Path(root, "config.json").open("rb") as file:
            said = msgspec.json.decode(file.read(MAX_CONFIG_BYTES), type=dict[str, Any])
    except (OSError, *UNREADABLE):
        return None
    layers, k = said.get("num_hidden_layers"), said.get("num_experts_per_tok")
    return (layers, k) if isinstance(layers, int) and isinstance(k, int) else None

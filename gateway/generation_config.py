"""What an engine takes where a request does not say: a model's ``generation_config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from driftgate.errors import UNREADABLE
from driftgate.facts import NEUTRAL_DEFAULTS

__all__ = ["defaults_of", "sampling_defaults"]

GENERATION_CONFIG = "generation_config.json"
MAX_GENERATION_CONFIG_BYTES = 1 << 20
"""Real ones have a few hundred bytes."""


def defaults_of(engine: str, root: str | None) -> dict[str, float] | None:
    """As vLLM and SGLang read them of the base model's folder; other engines are not known to."""
    if engine not in ("vllm", "sglang") or root is None or not Path(root).is_dir():
        return None
    return sampling_defaults(Path(root))


def sampling_defaults(root: Path) -> dict[str, float] | None:
    """Each of `NEUTRAL_DEFAULTS` as the model at ``root`` sets it; None if that cannot be read.

    An engine that was told to take no defaults from the model (vLLM ``--generation-config vllm``)
    does not say so: declare ``default_temperature`` and the like there.
    """
    try:
        with (root / GENERATION_CONFIG).open("rb") as file:
            said = msgspec.json.decode(file.read(MAX_GENERATION_CONFIG_BYTES), type=dict[str, Any])
    except FileNotFoundError:
        said = {}
    except (*UNREADABLE, OSError):
        return None
    return {
        name: float(value) if isinstance(value := said.get(name), (int, float)) else neutral
        for name, neutral in NEUTRAL_DEFAULTS.items()
    }

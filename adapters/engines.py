"""Which adapter an engine needs, by the name that it gives itself."""

from __future__ import annotations

from functools import cache

from driftgate.adapters.base import EngineAdapter
from driftgate.adapters.sglang import Sglang
from driftgate.adapters.vllm import Vllm

__all__ = ["adapter_for"]


@cache
def adapter_for(engine: str, route_shape: tuple[int, int] | None = None) -> EngineAdapter:
    """For ``vllm``, ``sglang`` or ``unknown``, which is asked as vLLM is."""
    return Sglang(route_shape) if engine == "sglang" else Vllm()

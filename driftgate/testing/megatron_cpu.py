"""Lets Megatron-Core run on a machine without CUDA. For tests only: the product patches nothing.

Megatron-Core asks ``torch.cuda`` for the current device wherever it makes a tensor, and its
all-to-all dispatcher copies sizes on a stream of its own. Both have an obvious meaning on a CPU, so
that the numbers are those of the code that runs on a GPU. One name is missing upstream where
TransformerEngine is not installed (``moe_utils.te_general_gemm``, a NameError in every router).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

__all__ = ["megatron_on_cpu"]


class _Stream:
    """A stream whose work is done as soon as it is asked for."""

    def wait_stream(self, _other: object) -> None: ...

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None: ...


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Everything of Megatron-Core that this project's tests use, on the CPU."""
    with warnings.catch_warnings():
        # Several, each time it is imported without TransformerEngine and Apex.
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        from megatron.core.transformer.moe import moe_utils, token_dispatcher
    move = token_dispatcher.maybe_move_tensor_to_cpu

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """A tensor that is on the CPU already stays a tensor there, of which a list of sizes is
        made; on a GPU it would have become an array."""
        moved = move(tensor, as_numpy=as_numpy, record_stream=record_stream)
        return moved.numpy() if as_numpy and isinstance(moved, torch.Tensor) else moved

    stream = _Stream()
    with (
        patch.object(torch.cuda, "current_device", lambda: "cpu"),
        patch.object(torch.Tensor, "cuda", lambda tensor: tensor),
        patch.object(torch.cuda, "Stream", _Stream),
        patch.object(torch.cuda, "current_stream", lambda: stream),
        patch.object(torch.cuda, "stream", lambda _stream: nullcontext()),
        patch.object(moe_utils, "te_general_gemm", None, create=True),
        patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", to_cpu),
    ):
        yield

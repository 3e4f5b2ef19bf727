"""vLLM's names, checked against 0.29.0, and its packing of routed experts (base64 of a
``.npy``)."""

from __future__ import annotations

import re
import struct
from math import prod
from typing import Any, cast

import numpy as np
import pybase64

from driftgate.adapters.base import Ask
from driftgate.trace import LogprobsMode, Routes

__all__ = ["Vllm", "narrow_routes", "read_npy"]

Integers = np.ndarray[tuple[int, ...], np.dtype[np.integer[Any]]]

ROUTE_DTYPES = {text.encode(): np.dtype(text) for text in ("|u1", "<u2", ">u2", "<i4", ">i4")}
"""What vLLM builds were seen to send (uint8, uint16, int32), as a ``.npy`` header says it."""

_MAGIC, _MAGIC_2 = b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00"
_HEADER = re.compile(
    rb"\{'descr': '(?P<dtype>[|<>][A-Za-z][0-9]{0,3})', 'fortran_order': False, "
    rb"'shape': \((?P<shape>(?:[0-9]{1,20}, ?)*(?:[0-9]{1,20})?)\), \} *\n"
)
"""As numpy writes it. Its own reader evaluates the header as Python and lets errors of the
tokenizer out."""

_SIZE = re.compile(rb"[0-9]+")

MAX_ROUTES_BYTES = 1 << 30
"""Decoded; 128k tokens x 94 layers x top-8 in two bytes are 193 MB."""

MAX_NPY_HEADER_BYTES = 4096
"""numpy writes 128 bytes for an array of three dimensions."""


class Vllm:
    """``driftgate.adapters.base.EngineAdapter`` for vLLM."""

    name = "vllm"
    ask_ids = "return_token_ids"
    asks = (Ask("return_token_ids", ("token_ids", "prompt_token_ids"), ("prompt_token_ids",)),)
    streams_ids = True
    omits_unasked = False
    logprobs_mode: LogprobsMode = "unknown"
    weights_path = "/weight_info"
    """With VLLM_SERVER_DEV_MODE=1; 0.29.0 has it."""
    info_paths: tuple[str, ...] = ()
    ask_stream_routes = "driftgate_routes"
    routes_chunk_mark = "driftgate"
    render_path = "/v1/chat/completions/render"
    prompt_ids_field = ("kv_transfer_params", "prompt_token_ids")
    """Made for the decoding half of a split deployment; it skips templating and tokenizing only
    (``renderers/online_renderer.py``)."""
    parses_alone = ("0.29.",)
    """``chat_completion_full_generator``, read in 0.29.0."""

    @property
    def refused_fields(self) -> dict[str, str]:
        """In 0.29 a ``routed_experts_prompt_start`` past the prompt ends the engine for
        everybody."""
        return {
            "routed_experts_prompt_start": "in vLLM 0.29 a value past the prompt's end stops "
            "the whole engine, and a smaller one would leave the recorded routes incomplete"
        }

    def common(self, answer: bytes) -> bytes:
        """See ``EngineAdapter``."""
        return answer

    def decode_routes(self, encoded: bytes, *, prompt_len: int, response_len: int) -> Routes:
        """See ``EngineAdapter``."""
        if len(encoded) // 4 * 3 > MAX_ROUTES_BYTES:
            raise ValueError(f"{len(encoded)} characters are over {MAX_ROUTES_BYTES} bytes")
        array = read_npy(pybase64.b64decode(encoded, validate=True))
        if array.ndim != 3:
            raise ValueError(f"shape {list(array.shape)} is not [rows, layers, experts]")
        rows = prompt_len + response_len - 1
        if array.shape[0] != rows:
            raise ValueError(
                f"{array.shape[0]} rows came for {prompt_len} + {response_len} tokens, "
                f"expected {rows}"
            )
        return narrow_routes(array)

    def advice(self, what: str) -> str:
        """See ``EngineAdapter``."""
        return {
            "ids": "token ids need vLLM 0.10.2 or newer (the request's return_token_ids)",
            "logprobs": "logprobs need a vLLM that was not started with --max-logprobs 0 and no "
            "engine option that disables them",
            "routes": "for a MoE model start vLLM with --enable-return-routed-experts (a dense "
            "model has no routes)",
            "streaming_routes": "install driftgate in the engine's environment, so that vLLM "
            "loads its plugin (entry point vllm.general_plugins), or set streaming_routes to "
            "synthesise",
        }[what]


def read_npy(data: bytes) -> Integers:
    """The integer array of a ``.npy``, without pickle and without trusting its header.
    ValueError."""
    if data[: len(_MAGIC)] not in (_MAGIC, _MAGIC_2):
        raise ValueError(f"{data[:8]!r} does not begin a .npy of version 1 or 2")
    length = struct.Struct("<H" if data[: len(_MAGIC)] == _MAGIC else "<I")
    start = len(_MAGIC) + length.size
    if len(data) < start:
        raise ValueError(f"a .npy of {len(data)} bytes ends in its header")
    (header_bytes,) = length.unpack_from(data, len(_MAGIC))
    if header_bytes > MAX_NPY_HEADER_BYTES:
        raise ValueError(f"a .npy header of {header_bytes} bytes is over {MAX_NPY_HEADER_BYTES}")
    header = data[start : start + header_bytes]
    said = _HEADER.fullmatch(header)
    if said is None:
        raise ValueError(f".npy header {header!r} is not of an array of integers in rows")
    dtype = ROUTE_DTYPES.get(said["dtype"])
    shape = [int(size) for size in _SIZE.findall(said["shape"])]
    if dtype is None:
        raise ValueError(f"dtype {said['dtype'].decode()} is none of uint8, uint16 and int32")
    offset = start + header_bytes
    expected, got = prod(shape) * dtype.itemsize, len(data) - offset
    if expected != got:
        raise ValueError(f"shape {shape} of {dtype} needs {expected} bytes, {got} came")
    return np.frombuffer(data, dtype, offset=offset).reshape(shape)


def narrow_routes(array: Integers) -> Routes:
    """The same expert ids as uint8 or uint16. ValueError where they do not fit."""
    if array.dtype in (np.uint8, np.uint16) and array.dtype.isnative:
        return cast(Routes, array)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high > 0xFFFF:
        raise ValueError(f"expert ids from {low} to {high} are not between 0 and 65535")
    return array.astype(np.uint8) if high <= 0xFF else array.astype(np.uint16)

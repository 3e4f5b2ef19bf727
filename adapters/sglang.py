"""SGLang's names and shapes, from its public code and documentation of 2026
(``srt/entrypoints/openai/protocol.py`` and ``serving_chat.py``, ``srt/utils/weight_versions.py``).

**Not run against a live server**: its tests use answers that were written from those sources.

What differs from vLLM: a chat stream refuses every field that capture needs, so streams are asked
for as JSON and written by the gateway. Keys that were not asked for are absent, not null. Routes
are flat int32, so the model's sizes must be known to shape them. ``meta_info`` says under which
weights each token was sampled. Log-probabilities are taken after the temperature and before
truncation, unless the server runs with ``SGLANG_RETURN_ORIGINAL_LOGPROB=1``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pybase64
from msgspec import Raw

from driftgate.adapters.base import Ask
from driftgate.adapters.vllm import MAX_ROUTES_BYTES, narrow_routes
from driftgate.trace import LogprobsMode, Routes

__all__ = ["Sglang"]

_IDS = Ask("return_token_ids", in_choice=("token_ids", "prompt_token_ids"))
_PROMPT_IDS = Ask("return_prompt_token_ids", in_choice=("prompt_token_ids",))
"""Servers before ``return_token_ids`` came know only this, and pass over the other."""
_META = Ask("return_meta_info", in_choice=("meta_info",))
_ROUTES = Ask("return_routed_experts", in_top=("sglext",))


class _Span(msgspec.Struct):
    version: str
    start: int


class _Meta(msgspec.Struct):
    weight_version: str | None = None
    weight_versions: list[_Span] = []
    output_token_logprobs: list[tuple[float | None, int, Any]] | None = None
    routed_experts: str | None = None


_ANSWER = msgspec.json.Decoder(dict[str, Raw])
_CHOICES = msgspec.json.Decoder(list[dict[str, Raw]])


@dataclass(frozen=True)
class Sglang:
    """``driftgate.adapters.base.EngineAdapter`` for SGLang."""

    route_shape: tuple[int, int] | None = None
    """(layers, experts per token) of the model, where routes are asked for."""

    name = "sglang"
    ask_ids = "return_token_ids"
    ask_stream_routes = "driftgate_routes"
    routes_chunk_mark = "driftgate"
    render_path = None
    prompt_ids_field = ("", "")
    parses_alone = ()
    streams_ids = False
    omits_unasked = True
    logprobs_mode: LogprobsMode = "processed_logprobs"
    weights_path = "/model_info"
    info_paths = ("/server_info", "/get_server_info")

    @property
    def asks(self) -> tuple[Ask, ...]:
        """See ``EngineAdapter``."""
        return (_IDS, _PROMPT_IDS, _META, *((_ROUTES,) if self.route_shape else ()))

    @property
    def refused_fields(self) -> dict[str, str]:
        """A start beyond 0 would leave rows out that nothing else tells."""
        return {"routed_experts_start_len": "the recorded routes would be incomplete"}

    def common(self, answer: bytes) -> bytes:
        """See ``EngineAdapter``. One of ``UNREADABLE`` where it is no answer."""
        fields = _ANSWER.decode(answer)
        choices = _CHOICES.decode(fields.get("choices", b"[]"))
        ext = fields.get("sglext")
        for choice in choices:
            meta = _meta(choice.get("meta_info"))
            if "token_ids" not in choice and meta.output_token_logprobs is not None:
                ids = [token_id for _, token_id, _ in meta.output_token_logprobs]
                choice["token_ids"] = _raw(ids)
            routes = meta.routed_experts
            if routes is None and ext is not None and len(choices) == 1:
                routes = msgspec.json.decode(ext, type=_Meta).routed_experts
            if routes is not None:
                choice["routed_experts"] = _raw(routes)
            if (versions := _spans(meta)) is not None:
                choice["weight_spans"] = _raw(versions)
            choice["stop_reason"] = choice.pop("matched_stop", Raw(b"null"))
        fields["choices"] = _raw(choices)
        return msgspec.json.encode(fields)

    def decode_routes(self, encoded: bytes, *, prompt_len: int, response_len: int) -> Routes:
        """See ``EngineAdapter``."""
        if self.route_shape is None:
            raise ValueError("the model's layers and experts per token are not known")
        if len(encoded) // 4 * 3 > MAX_ROUTES_BYTES:
            raise ValueError(f"{len(encoded)} characters are over {MAX_ROUTES_BYTES} bytes")
        data = pybase64.b64decode(encoded, validate=True)
        layers, k = self.route_shape
        rows = prompt_len + response_len - 1
        if len(data) != 4 * rows * layers * k:
            raise ValueError(
                f"{len(data)} bytes came for {prompt_len} + {response_len} tokens, expected "
                f"{4 * rows * layers * k}: int32 [{rows}, {layers}, {k}]"
            )
        return narrow_routes(np.frombuffer(data, "<i4").reshape(rows, layers, k))

    def advice(self, what: str) -> str:
        """See ``EngineAdapter``."""
        return {
            "ids": "token ids need an SGLang with return_meta_info in chat completions (0.5.13)",
            "logprobs": "logprobs need an SGLang whose chat completions take logprobs",
            "routes": "for a MoE model start SGLang with --enable-return-routed-experts and let "
            "the gateway read the model's config.json (a dense model has no routes)",
            "streaming_routes": "SGLang's streams carry none; the gateway asks for JSON instead",
        }[what]


def _meta(raw: Raw | None) -> _Meta:
    return _Meta() if raw is None else msgspec.json.decode(raw, type=_Meta | None) or _Meta()


def _spans(meta: _Meta) -> list[dict[str, Any]] | None:
    """As ``trace.WeightSpan``; older servers say one version, that of the last token, which hides a
    change: it is not taken."""
    if not meta.weight_versions or meta.weight_versions == [_Span("default", 0)]:
        return None
    return [{"first": span.start, "version": span.version} for span in meta.weight_versions]


def _raw(value: object) -> Raw:
    return Raw(msgspec.json.encode(value))

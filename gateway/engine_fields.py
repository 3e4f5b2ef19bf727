"""Fields that mean the same in every API and go to the engine as they were spelled. Pure.

Beside the names that OpenAI's and Anthropic's APIs share with chat completions these are the
engine's own, which agents send as ``extra_body``. Anything else of another API is translated by its
module, or does not reach the engine.
"""

from __future__ import annotations

from msgspec import Raw

from driftgate.gateway.openai import Fields, read

__all__ = ["object_of", "passed"]

SHARED = (
    "model",
    "stream",
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "metadata",
    "user",
)

ENGINES = (
    "allowed_token_ids",
    "bad_words",
    "cache_salt",
    "chat_template_kwargs",
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "priority",
    "repetition_penalty",
    "seed",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stop",
    "stop_token_ids",
    "structured_outputs",
    "thinking_token_budget",
    "top_k",
)
"""Of vLLM's chat completions: what shapes sampling or the prompt."""

_NAMES = frozenset(SHARED + ENGINES)


def passed(fields: Fields) -> Fields:
    """The request's shared fields; a stream also asks for its usage, which both APIs tell."""
    out = {name: value for name, value in fields.items() if name in _NAMES}
    if bytes(out.get("stream", b"")) == b"true":
        out["stream_options"] = Raw(b'{"include_usage":true}')
    return out


def object_of(fields: Fields, name: str) -> Fields:
    """A field that holds an object; empty where it does not."""
    return read(fields, name, dict[str, Raw]) or {}

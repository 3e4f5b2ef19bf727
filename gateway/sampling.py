"""What an agent asked for that shapes the sampling density, as the engine reads it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from driftgate.gateway.fields import Fields, is_absent, read, read_lax
from driftgate.trace import Sampling

__all__ = ["sampling_of", "settings_sent"]

_SAMPLING: dict[str, Any] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "seed": int,
    "n": int,
    "max_completion_tokens": int,
    "max_tokens": int,
    "min_tokens": int,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "logit_bias": dict[str, float],
    "bad_words": list[str],
    "allowed_token_ids": list[int],
    "use_beam_search": bool,
}
"""Settings that shape what is sampled, by type."""


def settings_sent(fields: Fields) -> dict[str, Any]:
    """The settings that were sent, by name; None for one that cannot be read."""
    return {
        name: read_lax(fields[name], type_)
        for name, type_ in _SAMPLING.items()
        if not is_absent(fields, name)
    }


def sampling_of(fields: Fields, sent: Mapping[str, Any], n: int) -> Sampling:
    """As a trace has it; ``sent``: what `settings_sent` gave."""
    get = sent.get
    return Sampling(
        temperature=get("temperature"),
        top_p=get("top_p"),
        top_k=get("top_k"),
        min_p=get("min_p"),
        seed=get("seed"),
        n=n,
        max_tokens=get("max_completion_tokens", get("max_tokens")),
        min_tokens=get("min_tokens"),
        presence_penalty=get("presence_penalty"),
        frequency_penalty=get("frequency_penalty"),
        repetition_penalty=get("repetition_penalty"),
        logit_bias=bool(get("logit_bias")),
        bad_words=bool(get("bad_words")),
        allowed_token_ids=bool(get("allowed_token_ids")),
        structured=_structured(fields),
        beam_search=bool(get("use_beam_search")),
    )


def _structured(fields: Fields) -> str | None:
    """What forced tokens, in words."""
    forced = []
    kind = (read(fields, "response_format", dict[str, Any]) or {}).get("type", "text")
    if kind != "text":
        forced.append(f"response_format={kind}")
    named = read(fields, "tool_choice", dict[str, Any])
    choice = "named" if named else read(fields, "tool_choice", str)
    if choice in ("required", "named"):
        forced.append(f"tool_choice={choice}")
    names = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
    forced += [name for name in names if not is_absent(fields, name)]
    return ", ".join(forced) or None

"""What a trace and the two fingerprints declare, as reasons; no numbers are looked at.

Settings keys that are read. Engine: ``dtype``, ``quantization``, ``tokenizer``, ``chat_template``
(digests), ``speculative``, and ``default_temperature``, ``default_top_p``, … for each of
`NEUTRAL_DEFAULTS`: what the engine samples with where a request does not say. Trainer:
``quantization``, ``train_dtype`` (of the training job), ``tokenizer``, ``chat_template``,
``weight_version``. A key that is missing gives no reason, but for the defaults.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from driftgate.codes import reason
from driftgate.trace import Engine, Reason, Sampling, TraceMeta, Trainer
from driftgate.weights import is_mixed

__all__ = ["NEUTRAL_DEFAULTS", "Parent", "as_sampled", "constraints", "declared", "unsent"]

NEUTRAL_DEFAULTS = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""Fields that vLLM and SGLang fill from the model's ``generation_config.json`` where a request does
not send them, and the value of each that changes nothing."""

PRECISIONS = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "float64": "fp64",
}

NOT_SAID = ("", "auto", "none")
"""Settings that leave the class to the checkpoint."""


class Parent(NamedTuple):
    """The trace that another one continues."""

    trace_id: str
    prompt_len: int
    weight_version: str


def declared(
    meta: TraceMeta, trainer: Trainer, trainer_version: str | None, parent: Parent | None = None
) -> list[Reason]:
    """Reasons from the facts of one trace and its trainer, before any number."""
    return [*_sides(meta, trainer, trainer_version), *_stale(meta, parent), *_trace(meta)]


def _stale(meta: TraceMeta, parent: Parent | None) -> list[Reason]:
    """Tokens that only the parent can have put into the prefix cache, under other weights.

    What stands before the parent's own answer, a common system prompt for instance, another run may
    have cached again since; the parent's answer is its own.
    """
    cached = meta.proof.usage_cached or 0
    if parent is None or cached <= parent.prompt_len or meta.prefix_len <= parent.prompt_len:
        return []
    if "unknown" in (versions := (parent.weight_version, meta.weight_version)):
        return []
    if versions[0] == versions[1]:
        return []
    detail = (
        f"{cached} prompt tokens came from the prefix cache, {cached - parent.prompt_len} of them "
        f"answered by {parent.trace_id} under {versions[0]}, while the weights are {versions[1]}"
    )
    return [reason("prefix_cache_stale", detail, "reset the prefix cache with each weight update")]


def as_sampled(engine: Engine, sampling: Sampling) -> Sampling:
    """``sampling`` as the engine runs it: unsent fields take its default, where that is known."""
    filled = {
        name: int(value) if name == "top_k" else value
        for name in NEUTRAL_DEFAULTS
        if getattr(sampling, name) is None and (value := _default(engine, name)) is not None
    }
    return msgspec.structs.replace(sampling, **filled)


def unsent(engine: Engine, sampling: Sampling) -> list[str]:
    """Names of the fields that were not sent and whose default in the engine is not known."""
    filled = as_sampled(engine, sampling)
    return [name for name in NEUTRAL_DEFAULTS if getattr(filled, name) is None]


def _default(engine: Engine, name: str) -> float | None:
    try:
        value = float(engine.settings.get(f"default_{name}", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def constraints(sampling: Sampling) -> dict[str, list[str]]:
    """What shapes the sampling density besides temperature, by the code it has when processed."""
    s = sampling
    truncation = [
        f"{name}={value:g}"
        for name, value, active in (
            ("top_p", s.top_p, s.top_p is not None and s.top_p < 1.0),
            ("top_k", s.top_k, s.top_k is not None and s.top_k > 0),
            ("min_p", s.min_p, s.min_p is not None and s.min_p > 0.0),
        )
        if active and value is not None
    ]
    penalties = [
        f"{name}={value:g}"
        for name, value, neutral in (
            ("presence_penalty", s.presence_penalty, 0.0),
            ("frequency_penalty", s.frequency_penalty, 0.0),
            ("repetition_penalty", s.repetition_penalty, 1.0),
        )
        if value is not None and value != neutral
    ]
    banned = [name for name in ("logit_bias", "bad_words", "allowed_token_ids") if getattr(s, name)]
    found = {
        "processed_truncation": truncation,
        "processed_penalties": penalties,
        "processed_logit_bias": banned,
        "processed_min_tokens": [f"min_tokens={s.min_tokens}"] if s.min_tokens else [],
    }
    return {code: what for code, what in found.items() if what}


def _sides(meta: TraceMeta, trainer: Trainer, trainer_version: str | None) -> list[Reason]:
    """What both fingerprints declare."""
    engine, out = meta.engine, []
    mine, theirs = engine.settings, trainer.settings
    if engine.checkpoint and trainer.checkpoint and engine.checkpoint != trainer.checkpoint:
        detail = f"engine {engine.checkpoint}, trainer {trainer.checkpoint}"
        fix = "load the trainer from the checkpoint that the engine serves"
        out.append(reason("checkpoint_mismatch", detail, fix))
    for key, code in (("tokenizer", "tokenizer_mismatch"), ("chat_template", "template_mismatch")):
        if mine.get(key) and theirs.get(key) and mine[key] != theirs[key]:
            detail = f"{key}: engine {mine[key]}, trainer {theirs[key]}"
            out.append(reason(code, detail, "take both from one model folder"))
    out += _precision(mine, trainer)
    if mine.get("speculative"):
        detail = f"speculative={mine['speculative']}"
        out.append(reason("speculative_decoding", detail, "measure the engine's noise floor"))
    version = trainer_version or theirs.get("weight_version")
    if is_mixed(meta):
        spans = ", ".join(f"{span.version} from token {span.first}" for span in meta.weight_spans)
        detail = f"sampled under {spans}; scored under {version or 'unknown'}"
        fix = "pause the engine while its weights change, or read this answer's drift per span"
        out.append(reason("weight_versions_mixed", detail, fix))
    elif meta.weight_version == "unknown" or version is None:
        detail = f"engine {meta.weight_version}, trainer {version or 'unknown'}"
        fix = "pass the policy version with the call and to the teacher, to separate lag from drift"
        out.append(reason("weight_version_unknown", detail, fix))
    elif meta.weight_version != version:
        detail = f"sampled under {meta.weight_version}, scored under {version}"
        fix = "read it as policy lag, or score with the version that sampled"
        out.append(reason("weight_version_differs", detail, fix))
    return out


def _precision(mine: dict[str, str], trainer: Trainer) -> list[Reason]:
    out = []
    engine_class = _said(mine, "quantization") or _said(mine, "dtype")
    trainer_class = _said(trainer.settings, "quantization") or _class(trainer.dtype)
    if engine_class and engine_class != trainer_class:
        detail = f"engine {engine_class}, trainer {trainer_class}"
        fix = "score in the engine's precision as well to see what the precision alone does"
        out.append(reason("precision_class_differs", detail, fix))
    trains_in = trainer.settings.get("train_dtype")
    if trains_in and _class(trains_in) != _class(trainer.dtype):
        detail = f"scored in {trainer.dtype}, trains in {trains_in}"
        fix = "start the teacher with the dtype of the training job"
        out.append(reason("scored_at_wrong_precision", detail, fix))
    return out


def _said(settings: dict[str, str], key: str) -> str | None:
    value = settings.get(key, "").lower()
    return None if value in NOT_SAID else _class(value)


def _class(dtype: str) -> str:
    bare = dtype.removeprefix("torch.").lower()
    return PRECISIONS.get(bare, bare)


def _trace(meta: TraceMeta) -> list[Reason]:
    out = []
    if meta.parent is not None and not meta.prefix_exact:
        detail = (
            f"the first {meta.prefix_len} prompt tokens continue {meta.parent}, the rest do not"
        )
        fix = "keep reasoning and tool calls verbatim in the history, to score a run in one pass"
        out.append(reason("prefix_not_exact", detail, fix))
    if meta.status == "partial":
        detail = "; ".join(meta.missing) or "the answer did not end"
        out.append(reason("capture_partial", detail, "see `driftgate probe`"))
    return out

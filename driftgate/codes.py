"""The reasons a comparison can carry: stable identifiers, what they mean and how much they weigh.

``no``: the numbers do not measure engine against trainer; do not average them. ``converted``: they
do, under the transform or across the difference that the reason names. ``note``: worth knowing, the
verdict stands.
"""

from __future__ import annotations

from typing import Literal

from driftgate.trace import Reason

__all__ = ["CODES", "MASKABLE", "PASSING", "SEVERITY", "SPOILS_ROUTES", "Severity", "reason"]

Severity = Literal["no", "converted", "note"]

_TABLE: dict[str, tuple[Severity, str]] = {
    # what could not be compared at all
    "nothing_to_compare": ("no", "No token has a usable log-probability on both sides."),
    "incomplete_capture": ("no", "The trace lacks the ids or logprobs that scoring needs."),
    "trace_unreadable": ("no", "The stored trace could not be read."),
    "sequence_too_long": ("no", "More tokens than this trainer takes."),
    "scoring_failed": ("no", "The trainer failed on this trace, scored alone."),
    "scoring_crashed": ("no", "Workers ended, one after the other, while they scored this run."),
    "reason_unknown": ("no", "Not comparable, for no reason that this driftgate knows."),
    # which density the recorded logprobs are of
    "logprob_convention_mismatch": (
        "no",
        "The engine's logprobs fit another temperature convention than the declared one.",
    ),
    "logprobs_mode_unknown": (
        "no",
        "It is not known whether the logprobs are raw or processed, and here it matters.",
    ),
    "logprobs_mode_inferred": (
        "converted",
        "The logprobs mode was not declared; the one that fits both temperatures was taken.",
    ),
    "logits_not_logprobs": ("no", "The engine returns logits where logprobs are needed."),
    "not_sampling_density": (
        "no",
        "The mean importance weight is not 1: the recorded logprob is not what was sampled from.",
    ),
    "logodds_slope_off": (
        "no",
        "The log-odds of both sides are proportional, but not equal: a temperature fingerprint.",
    ),
    "raw_logprobs_not_sampling_density": (
        "converted",
        "Raw logprobs at T = 1, while sampling used something else: drift holds at T = 1 only.",
    ),
    "scored_at_temperature": (
        "converted",
        "Processed logprobs: both sides are compared at the requested temperature.",
    ),
    "greedy": ("converted", "Temperature 0 has no sampling density: KL names do not apply."),
    "not_scored_at_temperature": (
        "no",
        "Processed logprobs at a temperature that the trainer was not scored at.",
    ),
    "sampling_default_assumed": (
        "converted",
        "Settings were not sent and the engine's defaults are not known: neutral ones are assumed.",
    ),
    "sampling_default_unknown": (
        "note",
        "Raw logprobs, no temperature sent, the engine's default not known: drift holds at T = 1.",
    ),
    "grammar_masked": (
        "no",
        "A grammar or forced tool choice masked the logits before the logprobs were taken.",
    ),
    # what processed logprobs have been through that the trainer has not
    "processed_truncation": (
        "no",
        "Processed logprobs with top-p, top-k or min-p and no sampling mask.",
    ),
    "scaled_before_truncation": (
        "converted",
        "SGLang scales by T and truncates later: compared at T, not under the sampling density.",
    ),
    "processed_penalties": ("no", "Processed logprobs include penalties."),
    "processed_logit_bias": (
        "no",
        "Processed logprobs include logit_bias, bad_words or allowed_token_ids.",
    ),
    "processed_min_tokens": ("no", "Processed logprobs while min_tokens bans the end token."),
    "beam_search": ("no", "Beam search does not sample: importance weights mean nothing."),
    "speculative_decoding": ("note", "The engine decodes speculatively; see its noise floor."),
    # whether both sides are the same policy
    "checkpoint_mismatch": ("no", "The two sides' weights have different digests."),
    "checkpoint_digest_differs": (
        "note",
        "The two sides' weights have different digests, and the numbers agree all the same.",
    ),
    "checkpoint_mismatch_suspected": (
        "no",
        "Huge drift without correlation: the trainer does not hold the engine's weights.",
    ),
    "weight_version_differs": (
        "converted",
        "The tokens were sampled under another weight version: drift includes policy lag.",
    ),
    "weight_versions_mixed": (
        "converted",
        "The weights changed while the answer was sampled: its tokens are of several policies.",
    ),
    "weight_version_unknown": ("note", "The weight version of one side is not known."),
    "prefix_cache_stale": ("no", "The engine's prefix cache is older than its weights."),
    "tokenizer_digest_differs": (
        "note",
        "The two sides' tokenizers have different digests, and the numbers agree all the same.",
    ),
    "tokenizer_mismatch": ("no", "The two sides number tokens differently."),
    "template_mismatch": (
        "note",
        "Chat templates differ; token ids were scored as the engine rendered them.",
    ),
    "precision_class_differs": (
        "converted",
        "Engine and trainer compute in different precision: drift includes that difference.",
    ),
    "scored_at_wrong_precision": (
        "no",
        "The trainer scored in another precision than it trains in.",
    ),
    "rotary_inv_freq_cast": (
        "no",
        "The trainer's rotary frequencies went through a narrow type: its numbers are damaged.",
    ),
    # the rest
    "bad_logprobs": ("converted", "NaN, sentinel or impossible logprobs were left out."),
    "routes_misaligned": ("no", "The two sides' routes are not of the same tokens or layers."),
    "prefix_not_exact": (
        "note",
        "The prompt does not extend the previous step's tokens: scored on its own.",
    ),
    "capture_partial": ("note", "Something is missing in this trace, though not what is scored."),
    "samples_diverged": ("note", "Two runs with one seed differ; the common prefix is compared."),
    "low_power": ("note", "Too few tokens, or too uneven weights, for a test: not applied."),
}

CODES: dict[str, str] = {code: meaning for code, (_, meaning) in _TABLE.items()}
"""Meaning of every code, one sentence."""

SEVERITY: dict[str, Severity] = {code: severity for code, (severity, _) in _TABLE.items()}
"""What a reason does to the verdict."""

SPOILS_ROUTES = frozenset(
    {
        "routes_misaligned",
        "checkpoint_mismatch",
        "checkpoint_mismatch_suspected",
        "prefix_cache_stale",
        "tokenizer_mismatch",
        "rotary_inv_freq_cast",
        "scored_at_wrong_precision",
    }
)
"""Reasons after which router drift says nothing either; every other one concerns logprobs only."""

MASKABLE = frozenset(
    {
        "grammar_masked",
        "processed_truncation",
        "processed_penalties",
        "processed_logit_bias",
        "processed_min_tokens",
        "beam_search",
        "logprobs_mode_unknown",
        "not_scored_at_temperature",
        "sequence_too_long",
        "scoring_failed",
        "scoring_crashed",
        "nothing_to_compare",
    }
)
"""Reasons of severity ``no`` that lie in what one answer was asked with, or in its size: its tokens
cannot be judged and can be masked, and the rest of the run stands. Every other one doubts a side of
the pair, and with it what looks sound too (docs/design/0007-what-cannot-be-compared.md)."""


PASSING = frozenset({"scoring_failed", "sequence_too_long", "trace_unreadable"})
"""Why a trace has no numbers, where that may have passed: memory is free or a limit is higher, a
file is back. A teacher that starts takes such traces up once more."""


def reason(code: str, detail: str, fix: str) -> Reason:
    """A reason with a known code."""
    assert code in CODES, code
    return Reason(code=code, detail=detail, fix=fix)

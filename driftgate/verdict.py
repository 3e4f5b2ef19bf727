"""May this rollout be trained on? METRICS 5: a verdict with typed reasons, or null and why.

Pure: sums and coverage in, verdict out. A verdict is only given of something whole: while calls
are open, or while traces that can be scored are not, it is null. A gap in the capture ends in
quarantine, whatever the numbers say; so does a comparison whose reason doubts a side. An answer
that only cannot be compared, for what it was asked with, is named to be masked, and the rest is
judged (docs/design/0007-what-cannot-be-compared.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from driftgate.codes import MASKABLE
from driftgate.gates import GATES, Gate
from driftgate.lag import Lag
from driftgate.mismatch import Bucket
from driftgate.profiles import BUT_WORST, NOT_COMPARABLE, TIERS, Code, Limit, Profile, Tier
from driftgate.subject import Refused, Subject, measure
from driftgate.words import listed

__all__ = [
    "Brief",
    "GateShare",
    "Lag",
    "Subject",
    "Verdict",
    "VerdictReason",
    "brief",
    "judge",
]

FIXES: dict[Code, str] = {
    "WITHIN_BUDGET": "train on it as it is",
    "HIGH_CLIPPED_FRACTION": "truncate the weights (TIS) or drop the tokens (IcePop); `driftgate "
    "explain` says where the ratios come from",
    "LOW_ESS": "use importance weights; below the replay limit find the cause first: `driftgate "
    "explain`",
    "STALE_POLICY_LAG": "sample with newer weights, or correct for the lag with importance weights",
    "REPLAY_TIER_LAG": "use it as off-policy data only, or sample with newer weights",
    "REPLAY_TIER_ESS": "use it as off-policy data only: importance weights leave too few samples",
    "VETO_THRESHOLD_EXCEEDED": "look at the worst token (`driftgate show`): such a ratio is a "
    "fault, not noise; drop the response",
    "NOT_COMPARABLE": "mend what the codes name, then score again; until then these numbers are "
    "not drift",
    "INCOMPLETE_CAPTURE": "leave it out of training; `driftgate show` lists what is missing",
    "ROUTER_FLIP": "train under the rollout's routes (routing replay, R3)",
    "SYSTEMATIC_SHIFT": "look for another temperature, other weights or another adapter: "
    "importance weights do not see what all tokens share",
}
"""What to do about each."""

MASK_FIX = (
    "mask these tokens out of the loss (`driftgate export` masks the whole of their answers); they "
    "stay as context"
)
"""For ``NOT_COMPARABLE`` where the rest can be trained on."""


class VerdictReason(msgspec.Struct, frozen=True, kw_only=True):
    """Why a verdict is as it is."""

    code: Code
    verdict: Tier
    """What this reason asks for; the verdict is the most severe of all."""
    metric: str | None = None
    observed: float | None = None
    threshold: float | None = None
    detail: str
    fix: str


class GateShare(msgspec.Struct, frozen=True, kw_only=True):
    """What a trainer's own gate would do to this."""

    gate: Gate
    share: float | None
    """Of its tokens or responses; null where the scores are older than the gate."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """May it be trained on, under which budget, and why."""

    verdict: Tier | None
    why_null: str | None = None
    profile: Profile
    reasons: list[VerdictReason] = []
    """Most severe first."""
    measured: dict[str, float | None] = {}
    """Every number that a limit of the profile looks at."""
    undefined: dict[str, str] = {}
    """Why one of them is null; a limit on it is then not tested."""
    gates: list[GateShare] = []
    not_comparable: list[Refused] = []
    """Answers that nothing here speaks for: mask their tokens, or leave them out."""


class Brief(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict in a line."""

    verdict: Tier | None
    codes: list[Code] = []
    why_null: str | None = None
    profile: str


def brief(verdict: Verdict) -> Brief:
    """Verdict and codes, most severe first, each once."""
    codes = list(dict.fromkeys(reason.code for reason in verdict.reasons))
    return Brief(
        verdict=verdict.verdict,
        codes=codes,
        why_null=verdict.why_null,
        profile=verdict.profile.name,
    )


def judge(subject: Subject, profile: Profile) -> Verdict:
    """The verdict on ``subject`` under ``profile``."""
    measured, undefined = measure(subject, profile)
    if why := _unfinished(subject):
        return Verdict(
            verdict=None,
            why_null=why,
            profile=profile,
            measured=measured,
            undefined=undefined,
            gates=_gates(subject.bucket),
            not_comparable=list(subject.refused),
        )
    reasons = [*_invalid(subject), *_broken(subject, profile.limits, measured)]
    reasons.sort(key=lambda reason: -TIERS.index(reason.verdict))
    if not reasons:
        tested = sum(measured[name] is not None for name in measured)
        detail = (
            f"within all limits of {profile.name} over {subject.compared} tokens; "
            f"{tested} of {len(measured)} numbers known"
        )
        reasons = [_reason("WITHIN_BUDGET", "train", detail)]
    return Verdict(
        verdict=reasons[0].verdict,
        profile=profile,
        reasons=reasons,
        measured=measured,
        undefined=undefined,
        gates=_gates(subject.bucket),
        not_comparable=list(subject.refused),
    )


def _unfinished(subject: Subject) -> str | None:
    """Why it is too early for a verdict."""
    if subject.open_calls:
        return f"calls that have not ended: {subject.open_calls}"
    if subject.gaps:
        return None
    if not subject.captured:
        return "nothing is captured"
    if subject.scored < subject.scorable or not subject.scored:
        return f"{subject.scored} of {subject.scorable} traces that can be scored are scored"
    if not subject.tokens:
        return "no token was sampled"
    return None


def _invalid(subject: Subject) -> list[VerdictReason]:
    """Reasons that stand before any number."""
    out = []
    if subject.gaps:
        more = f" and {len(subject.gaps) - 1} more" if len(subject.gaps) > 1 else ""
        out.append(
            _reason(
                "INCOMPLETE_CAPTURE",
                "quarantine",
                f"{subject.gaps[0]}{more}",
                metric="gaps",
                observed=float(len(subject.gaps)),
                threshold=0.0,
            )
        )
    if faults := _faults(subject):
        answers = f"{len(faults)} of {subject.scored} answers ({_steps(faults)})"
        out.append(
            _reason(
                "NOT_COMPARABLE",
                "quarantine",
                f"{answers}: {_codes(faults)}; that doubts the whole run",
                metric=NOT_COMPARABLE,
                observed=subject.not_compared_share,
                threshold=0.0,
            )
        )
    if subject.lag.steps is None and subject.lag.differs:
        detail = f"{subject.lag.reason}; they differ"
        out.append(_reason("STALE_POLICY_LAG", "train_with_correction", detail))
    return out


def _faults(subject: Subject) -> list[Refused]:
    """Answers whose reasons doubt a side of the pair, and not only the answer."""
    return [refused for refused in subject.refused if not MASKABLE.issuperset(refused.codes)]


def _broken(
    subject: Subject, limits: Sequence[Limit], measured: Mapping[str, float | None]
) -> Iterable[VerdictReason]:
    """One reason for each broken limit; of one code on one metric only the most severe."""
    seen = {("NOT_COMPARABLE", NOT_COMPARABLE)} if _faults(subject) else set[tuple[str, str]]()
    for limit in sorted(limits, key=lambda limit: -TIERS.index(limit.verdict)):
        value, key = measured[limit.metric], (limit.code, limit.metric.removesuffix(BUT_WORST))
        at_least = ""
        if value is None and limit.metric == "policy_lag" and subject.lag.at_least:
            value, at_least = float(subject.lag.at_least), "at least "
        if value is None or key in seen:
            continue
        if limit.least > 1 and round(value * subject.compared) < limit.least:
            continue
        sign, threshold = _threshold(limit)
        if (value > threshold) if sign == ">" else (value < threshold):
            seen.add(key)
            masked = limit.metric == NOT_COMPARABLE
            yield _reason(
                limit.code,
                limit.verdict,
                _uncompared(subject)
                if masked
                else f"{limit.metric} {at_least}{value:.4g} {sign} {threshold:g}",
                metric=limit.metric,
                observed=value,
                threshold=threshold,
                fix=MASK_FIX if masked and limit.verdict == "train_with_correction" else None,
            )


def _uncompared(subject: Subject) -> str:
    """In words, what cannot be compared and why."""
    count = subject.tokens - subject.compared
    named = f": {_codes(subject.refused)} in {_steps(subject.refused)}" if subject.refused else ""
    bad = count - sum(refused.tokens for refused in subject.refused)
    words = f"; bad logprobs: {bad}" if bad else ""
    return f"{count} of {subject.tokens} tokens ({count / subject.tokens:.1%}){named}{words}"


def _codes(refused: Iterable[Refused]) -> str:
    return ", ".join(sorted({code for one in refused for code in one.codes}))


def _steps(refused: Iterable[Refused]) -> str:
    return f"step {listed(sorted({one.step for one in refused}))}"


def _threshold(limit: Limit) -> tuple[Literal[">", "<"], float]:
    if limit.above is not None:
        return ">", limit.above
    assert limit.below is not None
    return "<", limit.below


def _reason(
    code: Code,
    verdict: Tier,
    detail: str,
    *,
    metric: str | None = None,
    observed: float | None = None,
    threshold: float | None = None,
    fix: str | None = None,
) -> VerdictReason:
    return VerdictReason(
        code=code,
        verdict=verdict,
        metric=metric,
        observed=observed,
        threshold=threshold,
        detail=detail,
        fix=fix or FIXES[code],
    )


def _gates(bucket: Bucket | None) -> list[GateShare]:
    if bucket is None or not bucket.n_tokens:
        return []
    values = bucket.metrics()
    return [GateShare(gate=gate, share=values[name]) for name, gate in GATES.items()]

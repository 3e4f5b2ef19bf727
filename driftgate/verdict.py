"""May this rollout be trained on? METRICS 5: a verdict with typed reasons, or null and why.

Pure: sums and coverage in, verdict out. A verdict is only given of something whole: while calls
are open, or while traces that can be scored are not, it is null. A gap in the capture and a
comparison that is not valid end in quarantine, whatever the numbers say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from driftgate.gates import GATES, Gate
from driftgate.mismatch import Bucket
from driftgate.profiles import CLAMPED, TIERS, Code, Limit, Profile, Tier
from driftgate.router import RouterBucket
from driftgate.sums import bin_value

__all__ = [
    "Brief",
    "GateShare",
    "Lag",
    "Subject",
    "Verdict",
    "VerdictReason",
    "brief",
    "judge",
    "policy_lag",
]

CLAMP = 20.0
"""nats; the observatory's clamp."""

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
}
"""What to do about each."""


class Lag(msgspec.Struct, frozen=True, kw_only=True):
    """Policy versions between sampling and scoring, the largest of several; null with a reason."""

    steps: int | None
    reason: str | None = None


def policy_lag(pairs: Iterable[tuple[str, str | None]]) -> Lag:
    """The largest distance over (version that sampled, version that scored) of each trace.

    Only whole numbers have a distance; one pair without makes it null.
    """
    steps = 0
    for sampled, scored in pairs:
        if not _whole(sampled) or scored is None or not _whole(scored):
            seen = f"sampled under {sampled!r}, scored under {scored or 'unknown'!r}"
            return Lag(steps=None, reason=f"{seen}: a lag needs two whole numbers")
        steps = max(steps, abs(int(scored) - int(sampled)))
    return Lag(steps=steps)


def _whole(version: str) -> bool:
    return version.isascii() and version.isdigit() and len(version) <= 18


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What is judged: the traces of one engine, scored by one trainer, of one run or of a group."""

    captured: int
    scorable: int
    scored: int
    open_calls: int = 0
    gaps: Sequence[str] = ()
    bucket: Bucket | None = None
    """Over the scores that are comparable."""
    comparable: int = 0
    """Of ``scored``, those behind ``bucket``."""
    codes: Sequence[str] = ()
    """Why the others are not."""
    router: RouterBucket | None = None
    router_reason: str | None = None
    lag: Lag = Lag(steps=None, reason="no weight versions")


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
    measured, undefined = _measure(subject, profile)
    if why := _unfinished(subject):
        return Verdict(
            verdict=None,
            why_null=why,
            profile=profile,
            measured=measured,
            undefined=undefined,
            gates=_gates(subject.bucket),
        )
    reasons = [*_invalid(subject), *_broken(profile.limits, measured)]
    reasons.sort(key=lambda reason: -TIERS.index(reason.verdict))
    if not reasons:
        tested = sum(measured[name] is not None for name in measured)
        detail = f"within all limits of {profile.name}; {tested} of {len(measured)} numbers known"
        reasons = [_reason("WITHIN_BUDGET", "train", detail)]
    return Verdict(
        verdict=reasons[0].verdict,
        profile=profile,
        reasons=reasons,
        measured=measured,
        undefined=undefined,
        gates=_gates(subject.bucket),
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
    refused = subject.scored - subject.comparable
    if refused:
        codes = ", ".join(subject.codes) or "no comparable token"
        out.append(
            _reason(
                "NOT_COMPARABLE",
                "quarantine",
                f"{refused} of {subject.scored} scores: {codes}",
                metric="not_comparable_frac",
                observed=refused / subject.scored,
                threshold=0.0,
            )
        )
    return out


def _broken(
    limits: Sequence[Limit], measured: Mapping[str, float | None]
) -> Iterable[VerdictReason]:
    """One reason for each broken limit; of one code on one metric only the most severe."""
    seen = set[tuple[str, str]]()
    for limit in sorted(limits, key=lambda limit: -TIERS.index(limit.verdict)):
        value, key = measured[limit.metric], (limit.code, limit.metric)
        if value is None or key in seen:
            continue
        sign, threshold = _threshold(limit)
        if (value > threshold) if sign == ">" else (value < threshold):
            seen.add(key)
            yield _reason(
                limit.code,
                limit.verdict,
                f"{limit.metric} {value:.4g} {sign} {threshold:g}",
                metric=limit.metric,
                observed=value,
                threshold=threshold,
            )


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
) -> VerdictReason:
    return VerdictReason(
        code=code,
        verdict=verdict,
        metric=metric,
        observed=observed,
        threshold=threshold,
        detail=detail,
        fix=FIXES[code],
    )


def _measure(subject: Subject, profile: Profile) -> tuple[dict[str, float | None], dict[str, str]]:
    """Each number that the profile looks at, and why one is not known."""
    values: dict[str, float | None] = {}
    why: dict[str, str] = {}
    values["policy_lag"] = None if subject.lag.steps is None else float(subject.lag.steps)
    if subject.lag.reason is not None:
        why["policy_lag"] = subject.lag.reason
    if subject.bucket is not None:
        values |= subject.bucket.metrics()
        values[CLAMPED] = _clamped(subject.bucket)
        why |= subject.bucket.undefined()
    if subject.router is not None:
        values |= {
            name: value
            for name, value in subject.router.metrics().items()
            if isinstance(value, (int, float))
        }
        why |= subject.router.undefined()
    measured: dict[str, float | None] = {}
    undefined: dict[str, str] = {}
    for name in dict.fromkeys(limit.metric for limit in profile.limits):
        measured[name] = values.get(name)
        if measured[name] is None:
            absent = subject.router_reason if name.startswith("router_") else None
            undefined[name] = why.get(name) or absent or "nothing comparable to measure it on"
    return measured, undefined


def _clamped(bucket: Bucket) -> float | None:
    """Share of tokens with |D| > CLAMP, from the sketch: its edge is within 0.5 % of it."""
    if not bucket.n_tokens:
        return None
    above = sum(count for at, count in bucket.sketch.bins.items() if bin_value(at) > CLAMP)
    return above / bucket.n_tokens


def _gates(bucket: Bucket | None) -> list[GateShare]:
    if bucket is None or not bucket.n_tokens:
        return []
    values = bucket.metrics()
    return [GateShare(gate=gate, share=values[name]) for name, gate in GATES.items()]

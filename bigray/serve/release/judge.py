"""Whether a candidate that real requests reach goes on, is promoted or goes (pure; the driver asks every second).

Being asked so often, a rule that looks only at the point estimate would be broken by chance sooner or later. So there
are two answers to "is it worse?": *clearly*, beyond what chance explains, which ends the rollout at once; and *by the
numbers so far*, which only keeps it from being promoted until more requests have told, or the time is over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from bigray.serve.release.record import Comparison, VersionStats

MIN_FOR_LATENCY = 50
"""Requests of a version below which its 95th percentile says nothing."""
MIN_FOR_AGREEMENT = 50
"""Compared rows below which disagreement says nothing."""
LATENCY_MARGIN_S = 0.002
"""Slower by less is no reason: below it, scheduling is what is measured."""
Z = 1.96
"""Standard errors on either side of an estimate."""


@dataclass(frozen=True)
class JudgeLimits:
    """When a candidate is good enough, and when it is not."""

    min_requests: int = 200
    """Answers of the candidate after which it may be promoted."""
    max_seconds: float = 600
    """After which a decision is made in any case."""
    max_error_rate_increase: float = 0.01
    """Over the live version's rate of errors."""
    max_latency_ratio: float = 1.5
    """Of the 95th percentiles, candidate over live."""
    slo_ms: float | None = None
    """What the 95th percentile has to keep. Not held against a candidate that is no slower than the live version."""
    max_disagreement: float = 0.05
    """Share of the compared rows that the two answer differently."""
    min_errors: int = 5
    """Errors of the candidate below which their rate says nothing."""


@dataclass(frozen=True)
class Verdict:
    """What is to be done with the candidate."""

    action: Literal["wait", "promote", "roll back", "done"]
    """done: a shadow has been compared; whether to deploy its version is for who asked to say."""
    why: str
    """One line with the numbers."""


@dataclass(frozen=True)
class Finding:
    """Something that speaks against the candidate."""

    text: str
    is_clear: bool
    """More than chance; otherwise more requests may tell."""


def judge(kind: Literal["canary", "shadow"], comparison: Comparison, limits: JudgeLimits, elapsed_s: float) -> Verdict:
    """Decide on the totals of all replicas since the rollout began."""
    findings = find_faults(comparison, limits)
    if clear := [finding.text for finding in findings if finding.is_clear]:
        return Verdict("roll back", "; ".join(clear))
    seen, is_over = comparison.candidate.requests, elapsed_s >= limits.max_seconds
    progress = f"{seen:,} of {limits.min_requests:,} requests in {elapsed_s:.0f} s"
    doubts = "; ".join(finding.text for finding in findings)
    has_enough = seen >= limits.min_requests
    if not is_over and (not has_enough or doubts):
        return Verdict("wait", f"{progress}; not clear yet: {doubts}" if doubts else progress)
    if kind == "shadow":
        reached = "" if has_enough else f"only {progress}; "
        return Verdict("done", f"{reached}{describe(comparison)}{f'; in doubt: {doubts}' if doubts else ''}")
    if doubts:
        return Verdict("roll back", f"not clear after {elapsed_s:.0f} s and {seen:,} requests: {doubts}")
    if not has_enough:
        return Verdict("roll back", f"only {progress}, too few to judge by; give it a larger share or more time")
    return Verdict("promote", describe(comparison))


def find_faults(comparison: Comparison, limits: JudgeLimits) -> tuple[Finding, ...]:
    """All that speaks against the candidate, clear or not."""
    live, candidate = comparison.live, comparison.candidate
    found = (
        _errors(live, candidate, limits),
        _slower(live, candidate, limits.max_latency_ratio),
        _over_slo(live, candidate, limits.slo_ms),
        _disagreement(comparison, limits.max_disagreement),
    )
    return tuple(finding for finding in found if finding is not None)


def describe(comparison: Comparison) -> str:
    """The candidate beside the live version, in one line."""
    live, candidate = comparison.live, comparison.candidate
    parts = [f"{candidate.requests:,} requests", f"errors {_rate(candidate)} (live {_rate(live)})"]
    if (p95 := candidate.quantile(0.95)) is not None:
        parts.append(f"p95 {_ms(p95)} (live {_ms(live.quantile(0.95))})")
    if comparison.compared_rows:
        share = comparison.disagreeing_rows / comparison.compared_rows
        parts.append(f"{share:.1%} of {comparison.compared_rows:,} compared rows differ")
    return ", ".join(parts)


def wilson(hits: int, total: int) -> tuple[float, float]:
    """The interval that a share lies in, of which `hits` of `total` were seen; sound for small numbers too."""
    if not total:
        return 0.0, 1.0
    share, z2 = hits / total, Z * Z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _errors(live: VersionStats, candidate: VersionStats, limits: JudgeLimits) -> Finding | None:
    if candidate.error_rate <= live.error_rate + limits.max_error_rate_increase:
        return None
    text = f"errors: {candidate.errors:,} of {candidate.requests:,} requests, {_rate(candidate)}; live {_rate(live)}"
    return Finding(text, is_clear=candidate.errors >= limits.min_errors)


def _slower(live: VersionStats, candidate: VersionStats, max_ratio: float) -> Finding | None:
    if min(sum(live.latency), sum(candidate.latency)) < MIN_FOR_LATENCY:
        return None
    ours, theirs = candidate.quantile(0.95), live.quantile(0.95)
    if ours is None or theirs is None or ours <= max_ratio * theirs or ours - theirs <= LATENCY_MARGIN_S:
        return None
    text = f"latency: p95 {_ms(ours)}, {ours / theirs:.1f} times the {_ms(theirs)} of live (limit {max_ratio:g})"
    return Finding(text, is_clear=_p95_bounds(candidate)[0] > _p95_bounds(live)[1])


def _over_slo(live: VersionStats, candidate: VersionStats, slo_ms: float | None) -> Finding | None:
    if slo_ms is None or sum(candidate.latency) < MIN_FOR_LATENCY:
        return None
    ours, theirs = candidate.quantile(0.95), live.quantile(0.95)
    if ours is None or ours * 1e3 <= slo_ms:
        return None
    if theirs is not None and sum(live.latency) >= MIN_FOR_LATENCY and ours <= theirs:
        return None  # keeping the slower version would not help
    text = f"latency: p95 {_ms(ours)}, the limit is {slo_ms:g} ms (live {_ms(theirs)})"
    return Finding(text, is_clear=_p95_bounds(candidate)[0] * 1e3 > slo_ms)


def _disagreement(comparison: Comparison, limit: float) -> Finding | None:
    rows, differing = comparison.compared_rows, comparison.disagreeing_rows
    if rows < MIN_FOR_AGREEMENT or differing / rows <= limit:
        return None
    low, high = wilson(differing, rows)
    text = (
        f"answers: {differing:,} of {rows:,} compared rows differ, {differing / rows:.1%} "
        f"(95 % interval {low:.1%} to {high:.1%}, limit {limit:.1%})"
    )
    return Finding(text, is_clear=low > limit)


def _p95_bounds(stats: VersionStats) -> tuple[float, float]:
    """The interval that the 95th percentile lies in: by ranks, so whatever the latencies' distribution is."""
    spread = Z * math.sqrt(0.95 * 0.05 / sum(stats.latency))
    low, high = stats.quantile(0.95 - spread), stats.quantile(min(0.95 + spread, 1.0))
    return low or 0.0, math.inf if high is None else high


def _rate(stats: VersionStats) -> str:
    return f"{stats.error_rate:.2%}" if stats.requests else "-"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g} ms"

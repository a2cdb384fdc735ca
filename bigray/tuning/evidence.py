"""Which of the best trials wins, once each was trained again with several seeds. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any, Literal

from bigray.errors import TrainingFailed
from bigray.results import Finalist, TrialResult
from bigray.tuning.space import seed_trial_id

Mode = Literal["max", "min"]

CONFIDENCE = 0.95
LATENCY_MARGIN = 1.1
"""Latencies closer than this are the same: on a busy machine the median moves by a few per cent."""


def judge_run(
    results: Sequence[TrialResult], events: Sequence[Mapping[str, Any]], metric: str, mode: Mode
) -> tuple[Finalist, ...]:
    """`judge` for a run, from its results and its journal; none before a seed of a finalist has come to a value."""
    told = [event for event in events if event["kind"] == "finalists"]
    if not told:
        return ()
    sound = {one.trial_id: one for one in results if one.status not in ("failed", "diverged")}
    finalists = [sound[name] for name in told[-1]["trials"] if name in sound]
    values = {one.trial_id: _values_of_seeds(one.trial_id, told[-1]["seeds"], sound, metric) for one in finalists}
    if not any(values.values()):
        return ()
    return judge(
        values,
        mode=mode,
        num_parameters={one.trial_id: one.num_parameters for one in finalists},
        model_names={one.trial_id: one.model_name for one in finalists},
        latency_ms=_latencies(values, events),
    )


def _values_of_seeds(trial_id: str, seeds: int, sound: Mapping[str, TrialResult], metric: str) -> dict[str, float]:
    """By the name of the trial of each seed that came to a value."""
    names = [seed_trial_id(trial_id, number) for number in range(1, seeds + 1)]
    found = {name: sound[name].metrics.get(metric, math.nan) for name in names if name in sound}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _latencies(seeds: Mapping[str, Iterable[str]], events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Of each finalist, the median over its seeds that were timed."""
    timed = {event["trial"]: event["latency_ms"] for event in events if event["kind"] == "latency"}
    of_seeds = {name: [timed[seed] for seed in names if seed in timed] for name, names in seeds.items()}
    return {name: median(found) for name, found in of_seeds.items() if found}


def judge(
    values_by_trial: Mapping[str, Mapping[str, float]],
    *,
    mode: Mode,
    num_parameters: Mapping[str, int],
    model_names: Mapping[str, str],
    latency_ms: Mapping[str, float] | None = None,
) -> tuple[Finalist, ...]:
    """The finalists, the winner first, then by mean; those without any value last.

    `values_by_trial` holds, for each finalist in the order of its trials, the metric of each seed's trial; a seed that
    failed or diverged is left out. The winner is the cheapest of those whose interval overlaps that of the best mean:
    fewest parameters, then the faster model, then the better mean, then the earlier trial. Who has less than two values
    has no interval, and wins only where nobody has more.

    Raises:
        TrainingFailed: not one seed of any finalist reached a metric.
    """
    finite = {
        trial: {seed: value for seed, value in values.items() if math.isfinite(value)}
        for trial, values in values_by_trial.items()
    }
    most = max(map(len, finite.values()), default=0)
    if most == 0:
        raise TrainingFailed("finalists: every seed of every finalist failed or diverged; there is no winner")
    sign = 1.0 if mode == "max" else -1.0
    able = [trial for trial, values in finite.items() if len(values) >= min(2, most)]
    best = max(able, key=lambda trial: sign * fmean(finite[trial].values()))  # of equals the first
    around_best = _interval(tuple(finite[best].values()))

    def finalist(trial: str) -> Finalist:
        values = tuple(finite[trial].values())
        low, high = _interval(values)
        # with one value each nothing is known of how they vary: all are tied
        overlaps = most == 1 or (low <= around_best[1] and around_best[0] <= high)
        return Finalist(
            trial_id=trial,
            values=values,
            mean=fmean(values) if values else math.nan,
            low=low,
            high=high,
            num_parameters=num_parameters[trial],
            latency_ms=(latency_ms or {}).get(trial),
            is_tied=trial in able and overlaps,
            best_seed_trial=max(finite[trial], key=lambda seed: sign * finite[trial][seed], default=""),
        )

    finalists = [finalist(trial) for trial in finite]
    winner = _cheapest([one for one in finalists if one.is_tied], sign, model_names)
    rest = sorted((one for one in finalists if one is not winner), key=lambda one: _by_mean(one, sign))
    return (winner, *rest)


def why_it_won(finalists: Sequence[Finalist], metric: str, mode: Mode, model_names: Mapping[str, str]) -> str:
    """In one line, what decided between the winner (the first) and the runner-up."""
    winner, *others = finalists
    tied = [one for one in others if one.is_tied]
    rivals = tied or [one for one in others if one.values]
    name = winner.trial_id
    if not rivals:
        return f"{name}: the only finalist with a {metric} ({_shown(winner)})"
    sign = 1.0 if mode == "max" else -1.0
    if not tied:
        rival = rivals[0]
        told = f"{name}: {metric} {_shown(winner)} against {_shown(rival)} of {rival.trial_id}"
        if len(rival.values) < 2:
            return f"{told}, which has too few seeds to win"
        return f"{told}; the intervals do not overlap"
    rival = _cheapest(tied, sign, model_names)
    both = f"({_shown(winner)}, {_shown(rival)})"
    return f"{name}: tied with {rival.trial_id} on {metric} {both} and {_advantage(winner, rival, sign, model_names)}"


def _advantage(winner: Finalist, rival: Finalist, sign: float, model_names: Mapping[str, str]) -> str:
    if winner.num_parameters < rival.num_parameters:
        return f"has fewer parameters ({winner.num_parameters:,} < {rival.num_parameters:,})"
    slower = _slower_models([winner, rival], model_names)
    if model_names[rival.trial_id] in slower:
        return f"is faster ({winner.latency_ms:.3g} ms < {rival.latency_ms:.3g} ms a row)"
    if sign * winner.mean > sign * rival.mean:
        return "has the better mean"
    return "came first"


def _cheapest(tied: Sequence[Finalist], sign: float, model_names: Mapping[str, str]) -> Finalist:
    smallest = _smallest(tied)
    slower = _slower_models(smallest, model_names)
    fast = [one for one in smallest if model_names[one.trial_id] not in slower]
    return min(fast, key=lambda one: _by_mean(one, sign))  # of equals the first


def _smallest(tied: Sequence[Finalist]) -> list[Finalist]:
    least = min(one.num_parameters for one in tied)
    return [one for one in tied if one.num_parameters == least]


def _slower_models(finalists: Iterable[Finalist], model_names: Mapping[str, str]) -> set[str]:
    """Models that are slower than the fastest beyond the margin. Trials of one model differ by chance only."""
    latency_ms: dict[str, float] = {}
    for one in finalists:
        if one.latency_ms is not None:
            model = model_names[one.trial_id]
            latency_ms[model] = min(one.latency_ms, latency_ms.get(model, math.inf))
    fastest = min(latency_ms.values(), default=0.0)
    return {model for model, taken in latency_ms.items() if taken > LATENCY_MARGIN * fastest}


def _by_mean(one: Finalist, sign: float) -> tuple[bool, float]:
    return (not one.values, -sign * one.mean if one.values else 0.0)


def _shown(one: Finalist) -> str:
    """The mean, with as many digits as half the interval's width has meaning."""
    half = (one.high - one.low) / 2
    if len(one.values) < 2:
        return f"{one.mean:.4g}, one seed"
    if half == 0:
        return f"{one.mean:.4g} ± 0"
    digits = max(0, -math.floor(math.log10(half)))
    return f"{one.mean:.{digits}f} ± {half:.{digits}f}"


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean; of one value that value, which says nothing of how it varies."""
    if not values:
        return (math.nan, math.nan)
    mean = fmean(values)
    if len(values) == 1:
        return (mean, mean)
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return (mean - half, mean + half)


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Half the width, in standard errors, of the two-sided interval of Student's t. By bisection, to 1e-9."""
    low, high = 0.0, 1.0
    while _t_within(high, degrees) < confidence:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _t_within(middle, degrees) >= confidence else (middle, high)
    return high


def _t_within(t: float, degrees: int) -> float:
    """Probability of |T| <= t, by the finite sums of Abramowitz and Stegun (1964), 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = degrees % 2 == 1
    term = cosine if is_odd else 1.0
    total = 0.0
    for index in range(2 if is_odd else 1, degrees, 2):  # the term's denominator
        total += term
        term *= cosine**2 * index / (index + 1)
    return (2 / math.pi) * (angle + sine * total) if is_odd else sine * total

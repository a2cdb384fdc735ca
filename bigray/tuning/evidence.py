"""Which of the best trials wins, once each was trained again with several seeds. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any, Literal

from bigray.cross_validation import fold_trial_id, usual_trial_id
from bigray.errors import TrainingFailed
from bigray.intervals import mean_interval
from bigray.results import Finalist, TrialResult
from bigray.tuning.space import seed_trial_id

Mode = Literal["max", "min"]

LATENCY_MARGIN = 1.1
"""Latencies closer than this are the same: on a busy machine the median moves by a few per cent."""


def judge_run(
    results: Sequence[TrialResult], events: Sequence[Mapping[str, Any]], metric: str, mode: Mode
) -> tuple[Finalist, ...]:
    """`judge` for a run, from its results and its journal; none before a seed of a finalist has come to a value.

    With folds, what is judged is each finalist's value on each of them, and one counts only if its trial on the usual
    split is there to be deployed.
    """
    told = [event for event in events if event["kind"] == "finalists"]
    if not told:
        return ()
    sound = {one.trial_id: one for one in results if one.status not in ("failed", "diverged")}
    finalists = [sound[name] for name in told[-1]["trials"] if name in sound]
    values = {one.trial_id: _values_again(one.trial_id, told[-1], sound, metric) for one in finalists}
    if not any(values.values()):
        return ()
    judged = judge(
        values,
        mode=mode,
        num_parameters={one.trial_id: one.num_parameters for one in finalists},
        model_names={one.trial_id: one.model_name for one in finalists},
        latency_ms=_latencies(values, events),
        only_whole="folds" in told[-1],
    )
    if "folds" not in told[-1]:
        return judged
    return tuple(replace(one, best_seed_trial=usual_trial_id(one.trial_id), over="folds") for one in judged)


def _values_again(
    trial_id: str, told: Mapping[str, Any], sound: Mapping[str, TrialResult], metric: str
) -> dict[str, float]:
    """By the name of the trial of each seed, or fold, that came to a value. `told`: the event of the finalists."""
    if "folds" in told:
        usual = sound.get(usual_trial_id(trial_id))
        is_whole = usual is not None and math.isfinite(usual.metrics.get(metric, math.nan))
        names = [fold_trial_id(trial_id, fold) for fold in range(told["folds"])] if is_whole else []
    else:
        names = [seed_trial_id(trial_id, number) for number in range(1, told["seeds"] + 1)]
    found = {name: sound[name].metrics.get(metric, math.nan) for name in names if name in sound}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _latencies(seeds: Mapping[str, Iterable[str]], events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Of each finalist, the median over its seeds, or folds, that were timed."""
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
    only_whole: bool = False,
) -> tuple[Finalist, ...]:
    """The finalists, the winner first, then by mean; those without any value last.

    `values_by_trial` holds, for each finalist in the order of its trials, the metric of each seed's trial; a seed that
    failed or diverged is left out. The winner is the cheapest of those whose interval overlaps that of the best mean:
    fewest parameters, then the faster model, then the better mean, then the earlier trial. Who has less than two values
    has no interval, and wins only where nobody has more. With `only_whole` who has fewer than another cannot win:
    means over different folds cannot be compared.

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
    enough = most if only_whole else min(2, most)
    able = [trial for trial, values in finite.items() if len(values) >= enough]
    best = max(able, key=lambda trial: sign * fmean(finite[trial].values()))  # of equals the first
    around_best = mean_interval(tuple(finite[best].values()))

    def finalist(trial: str) -> Finalist:
        values = tuple(finite[trial].values())
        low, high = mean_interval(values)
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
        if len(rival.values) < (len(winner.values) if rival.over == "folds" else 2):
            return f"{told}, which has too few {rival.over} to win"
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
        return f"{one.mean:.4g}, one {one.over[:-1]}"
    if half == 0:
        return f"{one.mean:.4g} ± 0"
    digits = max(0, -math.floor(math.log10(half)))
    return f"{one.mean:.{digits}f} ± {half:.{digits}f}"

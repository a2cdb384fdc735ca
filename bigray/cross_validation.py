"""Models validated on each fold of the data in turn: their trials, and which of them is best on the average. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Literal

from bigray.errors import SpecError
from bigray.intervals import mean_interval
from bigray.results import CrossValidation, TrialResult
from bigray.specs import TrialSpec


def trials_of_folds(trials: Sequence[TrialSpec], num_folds: int) -> tuple[TrialSpec, ...]:
    """Each trial once for every fold, in the order in which they are trained.

    Raises:
        SpecError: two trials would have one name.
    """
    found = tuple(of_fold(trial, fold) for trial in trials for fold in range(num_folds))
    names = {trial.trial_id for trial in found}
    if taken := [trial.trial_id for trial in trials if trial.trial_id in names]:
        raise SpecError([f"models.{name}: is what a fold of another model is called; rename it" for name in taken])
    return found


def of_fold(trial: TrialSpec, fold: int) -> TrialSpec:
    """The trial with the rows of a fold, counted from 0, under a name of its own."""
    return trial.model_copy(update={"trial_id": fold_trial_id(trial.trial_id, fold), "fold": fold})


def fold_trial_id(trial_id: str, fold: int) -> str:
    """Its name; people count folds from 1."""
    return f"{trial_id}-fold{fold + 1}"


def on_usual_split(trial: TrialSpec) -> TrialSpec:
    """A finalist of a sweep once more, from the start to the end, beside its folds: what is exported if it wins."""
    return trial.model_copy(update={"trial_id": usual_trial_id(trial.trial_id)})


def usual_trial_id(trial_id: str) -> str:
    return f"{trial_id}-usual"


def cross_validate(
    results: Iterable[TrialResult], num_folds: int, metric: str, mode: Literal["max", "min"]
) -> tuple[CrossValidation, ...]:
    """Each model over its folds, by the metric of each fold's best epoch: the best mean first.

    A mean over some of the folds is not comparable with one over all, so a model that failed or diverged in a fold
    comes after those with more. Equals are in the order of their names, whatever that of the results is.
    """
    of_models: dict[str, list[TrialResult]] = {}
    for result in results:
        if result.fold is not None:
            of_models.setdefault(result.model_name, []).append(result)
    scores = [_score(name, found, num_folds, metric) for name, found in of_models.items()]
    sign = 1.0 if mode == "max" else -1.0

    def key(one: CrossValidation) -> tuple[int, float, str]:
        return (-len(one.values), -sign * one.mean if one.values else 0.0, one.model_name)

    return tuple(sorted(scores, key=key))


def _score(name: str, results: Iterable[TrialResult], num_folds: int, metric: str) -> CrossValidation:
    in_order = sorted(results, key=lambda result: result.fold or 0)
    found = [(result, result.metrics.get(metric, math.nan)) for result in in_order]
    values = tuple(value for _, value in found if math.isfinite(value))
    low, high = mean_interval(values)
    return CrossValidation(
        model_name=name,
        values=values,
        num_folds=num_folds,
        mean=fmean(values) if values else math.nan,
        deviation=stdev(values) if len(values) > 1 else math.nan,
        low=low,
        high=high,
        num_parameters=max((result.num_parameters for result, _ in found), default=0),
        final_trial=name,
    )

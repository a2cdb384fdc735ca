"""A search file and a job -> the trials to run: decided before anything starts, so that a plan can show them all."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from bigray.specs import JobSpec, RangeSpec, SearchSpec, TrainingSpec, TrialSpec


def search_trials(job: JobSpec, search: SearchSpec) -> tuple[TrialSpec, ...]:
    """Every trial of a search, numbered in the order they run: models take turns.

    The same job and search give the same trials: all draws come from the job's seed.
    """
    drawn = {name: _configs(job, search, number) for number, name in enumerate(job.models)}
    rounds = itertools.zip_longest(*[[(name, config) for config in configs] for name, configs in drawn.items()])
    in_turn = [pair for one_round in rounds for pair in one_round if pair is not None]
    width = len(str(len(in_turn) - 1))
    return tuple(
        _trial(job, search, f"{number:0{width}d}-{name}", name, config) for number, (name, config) in enumerate(in_turn)
    )


def rungs(search: SearchSpec, epochs: int) -> tuple[int, ...]:
    """Epochs at which a trial of that many epochs reports to the scheduler; the last is `epochs`."""
    if search.scheduler == "none":
        return (epochs,)
    milestones = []
    milestone = search.asha.grace_epochs
    while milestone < epochs:
        milestones.append(milestone)
        milestone *= search.asha.reduction_factor
    return (*milestones, epochs)


def _configs(job: JobSpec, search: SearchSpec, model_number: int) -> list[dict[str, Any]]:
    if search.search == "grid":
        return grid(search.space)
    assert search.trials is not None, "SearchSpec requires trials for a random search"
    share, extra = divmod(search.trials, len(job.models))
    generator = np.random.default_rng([job.seed, model_number])
    return [sample(search.space, generator) for _ in range(share + (model_number < extra))]


def grid(space: dict[str, RangeSpec]) -> list[dict[str, Any]]:
    """The product of all choices."""
    choices = [values.choice or () for values in space.values()]
    return [dict(zip(space, combination, strict=True)) for combination in itertools.product(*choices)]


def sample(space: dict[str, RangeSpec], generator: np.random.Generator) -> dict[str, Any]:
    """One independent draw of every key; numbers to four digits, so that what is printed is what was used."""
    return {key: _draw(values, generator) for key, values in space.items()}


def _draw(values: RangeSpec, generator: np.random.Generator) -> Any:
    if values.choice is not None:
        return values.choice[int(generator.integers(len(values.choice)))]
    if values.uniform is not None:
        return _rounded(generator.uniform(*values.uniform), *values.uniform)
    assert values.log_uniform is not None, "RangeSpec has exactly one kind"
    low, high = values.log_uniform
    return _rounded(math.exp(generator.uniform(math.log(low), math.log(high))), low, high)


def _rounded(value: float, low: float, high: float) -> float:
    """To four digits, and not beyond the bounds by that."""
    return min(max(float(f"{value:.4g}"), low), high)


def _trial(job: JobSpec, search: SearchSpec, trial_id: str, model_name: str, config: dict[str, Any]) -> TrialSpec:
    settings = {**job.training.model_dump(), **config}
    if search.metric is not None:
        settings["metric"] = search.metric
    return TrialSpec(
        trial_id=trial_id,
        model_name=model_name,
        model=job.models[model_name],
        training=TrainingSpec.model_validate(settings),
        seed=job.seed,
    )

"""A search file and a job -> trials. Pure: all draws come from one seed, so the same files give the same trials."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from bigray.specs import JobSpec, RangeSpec, SearchSpec, Space, TrainingSpec, TrialSpec

CHECKED_TRIALS = 32
"""Of a search that learns from its trials: as many are drawn at random for the checks that come before the start."""


def search_trials(job: JobSpec, search: SearchSpec) -> tuple[TrialSpec, ...]:
    """The trials of a search, numbered in the order they begin: models take turns.

    Of `search = "tpe"`, which proposes its trials later, random ones instead, for checks and plans.
    """
    if search.search == "tpe" and search.trials is not None:
        search = search.model_copy(update={"search": "random", "trials": min(search.trials, CHECKED_TRIALS)})
    drawn = {name: _configs(job, search, number) for number, name in enumerate(job.models)}
    rounds = itertools.zip_longest(*[[(name, config) for config in configs] for name, configs in drawn.items()])
    in_turn = [pair for one_round in rounds for pair in one_round if pair is not None]
    return tuple(make_trial(job, search, number, name, config) for number, (name, config) in enumerate(in_turn))


def models_in_turn(job: JobSpec) -> Iterator[str]:
    """The model of each trial of a search without a fixed list, for ever."""
    return itertools.cycle(job.models)


def make_trial(job: JobSpec, search: SearchSpec, number: int, model_name: str, config: dict[str, Any]) -> TrialSpec:
    """The job's settings with those of a point of the space."""
    settings = {**job.training.model_dump(), **config}
    if search.metric is not None:
        settings["metric"] = search.metric
    if settings["lr_scaling"] == "none":
        settings["lr_batch_size"] = None
    elif settings["lr_batch_size"] is None:
        settings["lr_batch_size"] = job.training.global_batch_size
    return TrialSpec(
        trial_id=trial_name(number, model_name),
        model_name=model_name,
        model=job.models[model_name],
        training=TrainingSpec.model_validate(settings),
        seed=job.seed,
    )


def trial_name(number: int, model_name: str) -> str:
    return f"{number:04d}-{model_name}"


def reseeded(trial: TrialSpec, number: int) -> TrialSpec:
    """The trial with other random numbers, under a name of its own: initial weights, order of samples, dropout."""
    training = trial.training.model_copy(update={"seeds": type(trial.training.seeds)()})
    seed = int(np.random.default_rng([trial.seed, number]).integers(2**31))
    return trial.model_copy(
        update={"trial_id": seed_trial_id(trial.trial_id, number), "training": training, "seed": seed}
    )


def seed_trial_id(trial_id: str, number: int) -> str:
    """The name of a trial that was trained again with another seed."""
    return f"{trial_id}-seed{number}"


def grid(space: Space) -> list[dict[str, Any]]:
    """The product of all choices."""
    choices = [values.choice or () for values in space.values()]
    return [dict(zip(space, combination, strict=True)) for combination in itertools.product(*choices)]


def sample(space: Space, generator: np.random.Generator) -> dict[str, Any]:
    """One independent draw of every key."""
    return {key: draw(values, generator) for key, values in space.items()}


def draw(values: RangeSpec, generator: np.random.Generator) -> Any:
    """One value; numbers to four digits, so that what is printed is what was used."""
    if values.choice is not None:
        return values.choice[int(generator.integers(len(values.choice)))]
    if values.uniform is not None:
        return rounded(generator.uniform(*values.uniform), *values.uniform)
    assert values.log_uniform is not None, "RangeSpec has exactly one kind"
    low, high = values.log_uniform
    return rounded(math.exp(generator.uniform(math.log(low), math.log(high))), low, high)


def rounded(value: float, low: float, high: float) -> float:
    """To four digits, and within the bounds."""
    return min(max(float(f"{value:.4g}"), low), high)


def _configs(job: JobSpec, search: SearchSpec, model_number: int) -> list[dict[str, Any]]:
    """A model's share of the trials. With more of them, those of before come first."""
    space = search.space_of(list(job.models)[model_number])
    if search.search == "grid":
        return grid(space)
    assert search.trials is not None, "SearchSpec requires trials for all but a grid"
    share, extra = divmod(search.trials, len(job.models))
    generator = np.random.default_rng([job.seed, model_number])
    return [sample(space, generator) for _ in range(share + (model_number < extra))]

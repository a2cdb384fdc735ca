from __future__ import annotations

from typing import Any

import pytest

from bigray.errors import SpecError
from bigray.specs import JobSpec
from bigray.training.request import RunRequest
from bigray.training.runner import training_trials
from bigray.verification import disturbed_request, only_models


def _job(**training: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "digits",
            "data": {"source": "table.csv", "target": "label"},
            "models": {name: {"factory": f"bigray.models:{name}"} for name in ("linear", "mlp")},
            "training": {"task": "classification", **training},
            "scaling": {"num_workers": 2},
        }
    )


def _disturbed(job: JobSpec) -> RunRequest:
    dataset: Any = None  # nothing here looks at the rows
    request = RunRequest(job, training_trials(job), dataset, None)
    return disturbed_request(request, request.trials[1], "runs/verify-1a2b3c-1/disturbed", kills=3)


def test_all_models_are_verified_unless_some_are_named() -> None:
    assert list(only_models(_job(), ()).models) == ["linear", "mlp"]
    assert list(only_models(_job(), ("mlp",)).models) == ["mlp"]


def test_a_model_that_the_job_has_not_is_told_with_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"--model mpl: no such model, did you mean 'mlp'\?"):
        only_models(_job(), ("mlp", "mpl"))


def test_the_disturbed_run_trains_the_same_and_saves_more_often() -> None:
    job = _job(exact=True)
    request = _disturbed(job)
    (trial,) = request.trials

    assert trial.training == job.training.model_copy(update={"checkpoint_every_s": 1.0})
    assert request.job.training == trial.training
    assert request.job.storage == "runs/verify-1a2b3c-1/disturbed"
    assert list(request.job.models) == [trial.model_name] == ["mlp"]


def test_a_job_that_saves_more_often_by_itself_keeps_its_interval() -> None:
    assert _disturbed(_job(checkpoint_every_s=0.2)).trials[0].training.checkpoint_every_s == 0.2


def test_the_kills_are_not_charged_to_what_the_job_survives() -> None:
    job = _job()

    assert _disturbed(job).job.scaling.max_failures == job.scaling.max_failures + 3

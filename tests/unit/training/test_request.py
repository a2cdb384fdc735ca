from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigray.errors import SpecError
from bigray.specs import JobSpec
from bigray.training.request import RunRequest, make_request
from bigray.training.runner import training_trials


@pytest.fixture
def request_of(tmp_path: Path) -> Callable[..., RunRequest]:
    """A request for a job with changes, on 100 rows of two features."""
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "rows.npz", a=generator.normal(size=100), b=generator.normal(size=100), y=np.arange(100) % 2)

    def make(*, search: dict[str, Any] | None = None, **changes: Any) -> RunRequest:
        document: dict[str, Any] = {
            "name": "job",
            "data": {"source": str(tmp_path / "rows.npz"), "target": "y"},
            "models": {"net": {"factory": "bigray.models:mlp"}},
            "training": {"task": "classification"},
        }
        job = JobSpec.model_validate({**document, **changes})
        return make_request(job, training_trials(job), search)

    return make


def test_the_same_request_finds_the_same_run(request_of: Callable[..., RunRequest]) -> None:
    assert request_of().run_id == request_of().run_id
    assert request_of().run_id.startswith("job-")


@pytest.mark.parametrize("changes", [{"storage": "/elsewhere"}, {"scaling": {"num_workers": 4}}])
def test_where_and_by_how_many_workers_is_the_same_run(
    request_of: Callable[..., RunRequest], changes: dict[str, Any]
) -> None:
    assert request_of(**changes).run_id == request_of().run_id


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"task": "classification", "lr": 0.1}},
        {"seed": 1},
        {"search": {"trials": 3}},
        {"models": {"net": {"factory": "bigray.models:mlp", "params": {"hidden": [4]}}}},
    ],
)
def test_what_decides_the_result_is_another_run(request_of: Callable[..., RunRequest], changes: dict[str, Any]) -> None:
    assert request_of(**changes).run_id != request_of().run_id


def test_other_rows_in_the_same_file_are_another_run(request_of: Callable[..., RunRequest], tmp_path: Path) -> None:
    before = request_of().run_id
    generator = np.random.default_rng(1)
    np.savez(tmp_path / "rows.npz", a=generator.normal(size=100), b=generator.normal(size=100), y=np.arange(100) % 2)

    assert request_of().run_id != before


def test_every_model_is_a_trial_of_its_own(request_of: Callable[..., RunRequest]) -> None:
    request = request_of(models={name: {"factory": f"bigray.models:{name}"} for name in ("mlp", "linear")})

    assert [trial.trial_id for trial in request.trials] == ["mlp", "linear"]


def test_faults_of_the_batch_size_and_of_every_model_are_told_together(request_of: Callable[..., RunRequest]) -> None:
    with pytest.raises(SpecError) as caught:
        request_of(
            training={"task": "classification", "global_batch_size": 1000},
            models={
                "net": {"factory": "bigray.models:mlp", "params": {"hiden": [4]}},
                "other": {"factory": "bigray.models:nothing"},
            },
        )

    batch, net, other = caught.value.faults
    assert batch == "training.global_batch_size: 1000 is more than the 68 training rows"
    assert net.startswith("models.net.params: 'bigray.models:mlp': got an unexpected keyword argument 'hiden'")
    assert other.startswith("models.other.factory: 'bigray.models:nothing'")


def test_a_users_own_model_is_built_to_see_whether_it_takes_the_data(
    request_of: Callable[..., RunRequest], user_module: Callable[[str], str]
) -> None:
    name = user_module("def make(shape, outputs): raise ValueError(f'no good: {shape} {outputs}')")

    with pytest.raises(SpecError, match=r"models\.net\.factory: .*ValueError: no good: \(2,\) 2"):
        request_of(models={"net": {"factory": f"{name}:make"}})


def test_one_of_bigrays_own_models_that_cannot_take_the_data_is_told_too(
    request_of: Callable[..., RunRequest],
) -> None:
    """A cnn on a table of numbers: told before anything starts, not by a worker."""
    with pytest.raises(SpecError, match=r"models\.net\.factory: .*cnn: expected images"):
        request_of(models={"net": {"factory": "bigray.models:cnn"}})

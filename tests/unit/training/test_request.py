from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigray.errors import SpecError
from bigray.specs import OPTIMIZERS, JobSpec, TrainingSpec
from bigray.training.optimization import optimizer_faults
from bigray.training.request import RunRequest, _only_torch_can_tell, make_request
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


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        ({"factory": "bigray.models:cnn"}, "cnn: expected images"),
        (
            {"factory": "bigray.models:transformer", "params": {"width": 30, "heads": 4}},
            "transformer: width 30 cannot be cut into 4 heads",
        ),
    ],
)
def test_one_of_bigrays_own_models_that_cannot_take_the_data_is_told_too(
    request_of: Callable[..., RunRequest], model: dict[str, Any], fault: str
) -> None:
    """A cnn on a table of numbers: told before anything starts, not by a worker."""
    with pytest.raises(SpecError, match=rf"models\.net\.factory: .*{fault}"):
        request_of(models={"net": model})


OWN_CODE = """
    import torchmetrics

    class Task:
        def __init__(self, num_outputs): ...
        def loss(self, outputs, targets): ...
        def predict(self, outputs): ...
        def metrics(self, num_outputs):
            return {"val_top": torchmetrics.SumMetric()}

    class Half:
        def __init__(self, num_outputs): ...
        def loss(self, outputs, targets): ...
        def metrics(self, num_outputs): ...

    def net(shape, outputs):
        import torch
        return torch.nn.Linear(shape[0], outputs)

    def train(context): ...
"""


def _own(task: str, **training: Any) -> dict[str, Any]:
    return {"task": task, "targets": "classification", "metric": "val_top", "metric_mode": "max", **training}


def _faults(request_of: Callable[..., RunRequest], **changes: Any) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        request_of(**changes)
    return caught.value.faults


def test_a_task_and_a_loop_of_ones_own_are_taken(
    request_of: Callable[..., RunRequest], user_module: Callable[[str], str]
) -> None:
    name = user_module(OWN_CODE)

    assert request_of(training=_own(f"{name}:Task")).trials
    assert request_of(training=_own(f"{name}:Task", loop=f"{name}:train", metric="val_of_the_loop")).trials


def test_a_task_without_a_method_is_told_before_anything_starts(
    request_of: Callable[..., RunRequest], user_module: Callable[[str], str]
) -> None:
    name = user_module(OWN_CODE)

    assert _faults(request_of, training=_own(f"{name}:Half")) == (
        f"training.task: '{name}:Half' has no method 'predict' (needs loss, metrics, predict)",
    )


def test_a_metric_that_the_task_does_not_report_is_told(
    request_of: Callable[..., RunRequest], user_module: Callable[[str], str]
) -> None:
    name = user_module(OWN_CODE)

    assert _faults(request_of, training=_own(f"{name}:Task", metric="val_f1")) == (
        f"training.metric: 'val_f1' is not one that '{name}:Task' reports: val_loss, val_top",
    )


def test_a_loop_that_cannot_be_called_is_told(
    request_of: Callable[..., RunRequest], user_module: Callable[[str], str]
) -> None:
    name = user_module(OWN_CODE)
    training = {"task": "classification", "metric": "val_loss", "loop": f"{name}:trian"}

    (fault,) = _faults(request_of, training=training)

    assert fault == f"training.loop: '{name}:trian': '{name}' has no callable 'trian', did you mean 'train'?"


def test_changed_code_of_a_task_or_a_loop_is_another_run(
    request_of: Callable[..., RunRequest], user_module: Callable[[str], str], tmp_path: Path
) -> None:
    name = user_module(OWN_CODE)
    requests = [
        request_of(training=_own(f"{name}:Task")),
        request_of(training={"task": "classification", "metric": "val_loss", "loop": f"{name}:train"}),
    ]
    before = [request.run_id for request in requests]
    assert [request.run_id for request in requests] == before
    (file,) = tmp_path.rglob(f"{name}.py")
    file.write_text(file.read_text() + "# changed\n")

    assert not set(before) & {request.run_id for request in requests}


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            {"optimizer_params": {"beta": [0.9, 0.99]}},
            "training.optimizer_params.beta: not an argument of adamw, did you mean 'betas'?",
        ),
        ({"momentum": 0.9}, "training.momentum: adamw has no momentum; remove it, or use another optimizer"),
        ({"class_weights": [1.0, 2.0, 3.0]}, "training.class_weights: 3 weights for 2 classes"),
        (
            {"param_groups": [{"match": "haed.*"}]},
            "training.param_groups.0.match: 'haed.*' matches no parameter; they are 1.weight, 1.bias (model 'net')",
        ),
        ({"micro_batch_size": 65}, "training.micro_batch_size: 65 is more than the 64 rows of a global batch"),
        (
            {"epochs": 3, "schedule": {"kind": "cosine", "warmup_steps": 6}},
            "training.schedule.warmup_steps: 6 steps, but the whole trial has 6",
        ),
    ],
)
def test_settings_that_the_model_or_the_data_refuses_are_told(
    request_of: Callable[..., RunRequest], settings: dict[str, Any], fault: str
) -> None:
    faults = _faults(
        request_of,
        training={"task": "classification", **settings},
        models={"net": {"factory": "bigray.models:linear"}},
    )

    assert faults == (fault,)


def test_a_pattern_is_tried_on_every_model_of_the_job(
    request_of: Callable[..., RunRequest], user_module: Callable[[str], str]
) -> None:
    name = user_module(OWN_CODE)
    models = {"ours": {"factory": "bigray.models:linear"}, "own": {"factory": f"{name}:net"}}
    training = {"task": "classification", "param_groups": [{"match": "1.weight", "lr_scale": 0.1}]}

    (fault,) = _faults(request_of, training=training, models=models)

    assert fault.endswith("matches no parameter; they are weight, bias (model 'own')")


def test_a_fault_that_many_trials_share_is_told_once(request_of: Callable[..., RunRequest]) -> None:
    models = {name: {"factory": f"bigray.models:{name}"} for name in ("mlp", "linear")}

    assert len(_faults(request_of, training={"task": "classification", "class_weights": [1.0]}, models=models)) == 1


@pytest.mark.parametrize(("optimizer", "momentum"), [("sgd", 0.9), ("rmsprop", 0.9), ("adamw", 0.0), ("sgd", 0.0)])
def test_settings_taken_for_granted_are_such_as_torch_takes(optimizer: str, momentum: float) -> None:
    training = TrainingSpec(task="classification", optimizer=optimizer, momentum=momentum, weight_decay=0.1)

    assert not _only_torch_can_tell(training)
    assert optimizer_faults(training) == []


def test_every_optimizer_taken_for_granted_can_decay_and_be_sharded() -> None:
    for optimizer in OPTIMIZERS:
        training = TrainingSpec(task="classification", optimizer=optimizer, weight_decay=0.1, strategy="fsdp")
        assert _only_torch_can_tell(training) or optimizer_faults(training) == [], optimizer


def test_fewer_training_rows_than_workers_are_told(request_of: Callable[..., RunRequest], tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", a=np.arange(8.0), y=np.arange(8) % 2)
    settings = {
        "data": {"source": str(tmp_path / "rows.npz"), "target": "y", "split": {"validation": 0.3, "holdout": 0}}
    }
    training = {"task": "classification", "global_batch_size": 2}
    rows = request_of(**settings, training=training).dataset.num_rows["train"]

    with pytest.raises(SpecError) as caught:
        request_of(**settings, training=training, scaling={"num_workers": [1, rows + 1]})

    expected = f"scaling.num_workers: {rows + 1} workers, but only {rows} training rows; use {rows} or fewer"
    assert caught.value.faults == (expected,)


def test_models_are_told_which_inputs_are_categories_to_embed(
    request_of: Callable[..., RunRequest], tmp_path: Path
) -> None:
    np.savez(tmp_path / "rows.npz", a=np.arange(100.0), b=np.arange(100) % 7, y=np.arange(100) % 2)
    data = {"source": str(tmp_path / "rows.npz"), "target": "y", "categories": "embedding"}
    data["columns"] = {"b": {"kind": "category"}}

    request = request_of(data=data)

    assert request.trials[0].model.params == {"embeddings": [[1, 7]]}
    assert request.job.models["net"].params == {"embeddings": [[1, 7]]}
    with pytest.raises(
        SpecError, match=r"^models\.net\.factory: 'bigray.models:linear' takes no embeddings, which data"
    ):
        request_of(data=data, models={"net": {"factory": "bigray.models:linear"}})

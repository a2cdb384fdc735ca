from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchmetrics.functional.text import perplexity

from bigray.errors import SpecError, TrainingFailed
from bigray.specs import METRICS, TrainingSpec
from bigray.training.tasks import (
    Task,
    balanced_weights,
    load_task,
    metric_collection,
    metrics_of_loss,
    output_shape,
    sample_losses,
    total_weight,
    validation_losses,
)

UserModule = Callable[[str], str]

Y = np.array([0, 0, 0, 2, 1, 0, 2, 0])
MARKS = np.stack([Y > 0, Y > 1, Y == 0], axis=1).astype(np.int8)
LOGITS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))

OWN = """
    import torch
    import torchmetrics

    class Pinball:
        def __init__(self, num_outputs):
            self.num_outputs = num_outputs

        def loss(self, outputs, targets):
            error = targets - outputs[:, 0]
            return torch.maximum(0.9 * error, -0.1 * error)

        def metrics(self, num_outputs):
            return {"val_mae": torchmetrics.MeanAbsoluteError()}

        def predict(self, outputs):
            return outputs[:, 0]
"""


def _spec(**settings: Any) -> TrainingSpec:
    return TrainingSpec.model_validate({"task": "classification", **settings})


def _own(path: str, **settings: Any) -> TrainingSpec:
    return _spec(task=path, **{"targets": "regression", "metric": "val_mae", "metric_mode": "min", **settings})


def _faults(spec: TrainingSpec, num_outputs: int = 3) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        load_task(spec, num_outputs, Y)
    return caught.value.faults


def _step_loss(task: Task, rows: slice = slice(None)) -> torch.Tensor:
    """The loss of a step on some rows as the training loop puts it together."""
    return sample_losses(task, LOGITS[rows], torch.from_numpy(Y[rows])).sum() / total_weight(task, Y[rows])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", ["none", "balanced", [0.5, 2.0, 1.0]], ids=str)
def test_the_loss_of_a_step_is_torchs_own_mean_over_the_batch(weights: Any, smoothing: float) -> None:
    task = load_task(_spec(label_smoothing=smoothing, class_weights=weights), 3, Y)
    as_numbers = {"none": [1.0, 1.0, 1.0], "balanced": [8 / 15, 8 / 3, 8 / 6]}.get(str(weights), weights)
    expected = functional.cross_entropy(
        LOGITS, torch.from_numpy(Y), weight=torch.tensor(as_numbers), label_smoothing=smoothing
    )

    torch.testing.assert_close(_step_loss(task), expected)


def test_the_losses_of_parts_of_a_batch_add_up_to_that_of_the_whole() -> None:
    """Whatever the shares of the workers, when each is divided by the weight of the global batch."""
    task = load_task(_spec(class_weights="balanced"), 3, Y)
    parts = [slice(0, 3), slice(3, 4), slice(4, 8)]
    summed = sum(_step_loss(task, part) * total_weight(task, Y[part]) for part in parts)

    torch.testing.assert_close(summed / total_weight(task, Y), _step_loss(task))


def test_balanced_weights_give_every_class_the_same_share_of_the_loss() -> None:
    weights = balanced_weights(Y, 4)

    np.testing.assert_allclose(weights[Y][Y == 0].sum(), weights[Y][Y == 1].sum())
    np.testing.assert_allclose(weights[:3], [8 / (4 * 5), 8 / 4, 8 / (4 * 2)])
    assert weights[3] == 0.0


def test_the_validation_loss_is_plain_so_that_trials_can_be_compared() -> None:
    task = load_task(_spec(class_weights="balanced", label_smoothing=0.1), 3, Y)
    plain = functional.cross_entropy(LOGITS, torch.from_numpy(Y), reduction="none")

    torch.testing.assert_close(validation_losses(task, LOGITS, torch.from_numpy(Y)), plain)


def test_regression_is_the_squared_error_of_each_sample() -> None:
    task = load_task(_spec(task="regression"), 1, Y.astype(np.float32))
    outputs, targets = LOGITS[:, :1], torch.from_numpy(Y).float()

    torch.testing.assert_close(sample_losses(task, outputs, targets), (outputs[:, 0] - targets) ** 2)
    torch.testing.assert_close(validation_losses(task, outputs, targets), (outputs[:, 0] - targets) ** 2)
    assert total_weight(task, Y) == 8.0


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_losses_are_float32_whatever_autocast_left(task: str) -> None:
    made = load_task(_spec(task=task), 3 if task == "classification" else 1, Y)
    outputs = (LOGITS if task == "classification" else LOGITS[:, :1]).bfloat16()
    targets = torch.from_numpy(Y) if task == "classification" else torch.from_numpy(Y).float()

    assert sample_losses(made, outputs, targets).dtype == torch.float32
    assert metric_collection(made, 3)(made.predict(outputs), targets)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", ["none", "balanced", [0.5, 2.0]], ids=str)
def test_binary_is_classification_by_one_logit(weights: Any, smoothing: float) -> None:
    settings = {"label_smoothing": smoothing, "class_weights": weights}
    numbers = (Y > 0).astype(np.int64)
    logits, targets = LOGITS[:, :1], torch.from_numpy(numbers)
    binary, two = load_task(_spec(task="binary", **settings), 1, numbers), load_task(_spec(**settings), 2, numbers)
    both = torch.cat([torch.zeros_like(logits), logits], dim=1)

    torch.testing.assert_close(sample_losses(binary, logits, targets), sample_losses(two, both, targets))
    torch.testing.assert_close(validation_losses(binary, logits, targets), validation_losses(two, both, targets))
    assert total_weight(binary, numbers) == pytest.approx(total_weight(two, numbers))
    torch.testing.assert_close(binary.predict(logits), both.softmax(dim=1)[:, 1])


def test_the_loss_of_labels_is_the_mean_over_them() -> None:
    task = load_task(_spec(task="multilabel"), 3, MARKS)
    targets = torch.from_numpy(MARKS)
    each = functional.binary_cross_entropy_with_logits(LOGITS, targets.float(), reduction="none")

    torch.testing.assert_close(sample_losses(task, LOGITS, targets), each.mean(dim=1))
    assert output_shape(task, 3, MARKS) == (3,)


def test_the_loss_of_a_language_is_the_mean_over_positions_and_gives_the_perplexity() -> None:
    logits = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(1))
    tokens = np.arange(30).reshape(6, 5) % 7
    task, targets = load_task(_spec(task="language"), 7, tokens), torch.from_numpy(tokens)
    losses = sample_losses(task, logits, targets)
    metrics = metric_collection(task, 7)
    metrics.update(task.predict(logits), targets)

    torch.testing.assert_close(losses.mean(), functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    assert metrics_of_loss(task, losses.mean().item()) == {
        "val_perplexity": pytest.approx(perplexity(logits, targets).item(), rel=1e-5)
    }
    assert metrics_of_loss(task, 1e4) == {"val_perplexity": math.inf}
    assert metrics.compute()["val_token_accuracy"] == (logits.argmax(dim=2) == targets).float().mean()
    assert output_shape(task, 7, tokens) == (5, 7)


@pytest.mark.parametrize("task", list(METRICS))
def test_the_built_in_metrics_are_those_that_job_files_may_name(task: str) -> None:
    made = load_task(_spec(task=task), 3, Y)
    metrics = metric_collection(made, 3)

    assert {*metrics.keys(), *metrics_of_loss(made, 1.0), "val_loss"} == set(METRICS[task])
    assert not any(metric.sync_on_compute for metric in metrics.values())


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"class_weights": [1.0, 2.0]}, "training.class_weights: 2 weights for 3 classes"),
        ({"class_weights": [1.0, 2.0, 3.0, 4.0]}, "training.class_weights: 4 weights for 3 classes"),
        ({"task": "binary", "class_weights": [1.0]}, "training.class_weights: 1 weights for 2 classes"),
    ],
)
def test_weights_that_are_not_one_a_class_are_told(settings: dict[str, Any], fault: str) -> None:
    assert _faults(_spec(**settings)) == (fault,)


# --- a task of one's own


def test_a_task_of_ones_own_gives_loss_metrics_and_predictions(user_module: UserModule) -> None:
    task = load_task(_own(f"{user_module(OWN)}:Pinball"), 1, Y)
    outputs, targets = LOGITS[:, :1], torch.from_numpy(Y).float()
    error = targets - outputs[:, 0]

    torch.testing.assert_close(sample_losses(task, outputs, targets), torch.maximum(0.9 * error, -0.1 * error))
    torch.testing.assert_close(validation_losses(task, outputs, targets), sample_losses(task, outputs, targets))
    assert total_weight(task, Y) == 8.0
    metrics = metric_collection(task, 1)
    metrics.update(task.predict(outputs), targets)
    assert metrics.compute()["val_mae"].item() == pytest.approx(error.abs().mean().item())
    assert not metrics["val_mae"].sync_on_compute


def test_it_may_weight_samples_and_have_another_validation_loss(user_module: UserModule) -> None:
    more = """
        def validation_loss(self, outputs, targets):
            return (targets - outputs[:, 0]).abs()

        def total_weight(self, targets):
            return 2 * len(targets)
    """
    task = load_task(_own(f"{user_module(OWN + more)}:Pinball"), 1, Y)
    targets = torch.from_numpy(Y).float()

    torch.testing.assert_close(validation_losses(task, LOGITS, targets), (targets - LOGITS[:, 0]).abs())
    assert total_weight(task, Y) == 16.0


def test_a_function_that_makes_the_task_will_do(user_module: UserModule) -> None:
    name = user_module(OWN + "\n    def make(num_outputs): return Pinball(num_outputs)\n    def wrong(n): return 3\n")

    assert load_task(_own(f"{name}:make"), 5, Y).num_outputs == 5
    assert _faults(_own(f"{name}:wrong")) == (
        f"training.task: '{name}:wrong' has no method 'loss' and no method 'metrics' and no method 'predict' "
        "(needs loss, metrics, predict)",
    )


def test_a_task_without_a_method_is_told_before_it_is_made(user_module: UserModule) -> None:
    name = user_module(
        """
        class Half:
            def __init__(self): raise AssertionError("made")
            def loss(self, outputs, targets): ...
            def metrics(self, num_outputs): ...
        """
    )

    assert _faults(_own(f"{name}:Half")) == (
        f"training.task: '{name}:Half' has no method 'predict' (needs loss, metrics, predict)",
    )


def test_a_task_that_cannot_be_imported_or_made_is_told(user_module: UserModule) -> None:
    name = user_module(OWN.replace("self, num_outputs):\n            self", "self):\n            self"))

    assert _faults(_own("no_such_module:Task"))[0].startswith("training.task: 'no_such_module:Task': cannot import")
    assert _faults(_own(f"{name}:Pinbal")) == (
        f"training.task: '{name}:Pinbal': '{name}' has no callable 'Pinbal', did you mean 'Pinball'?",
    )
    assert _faults(_own(f"{name}:Pinball"))[0].startswith(
        f"training.task: '{name}:Pinball': failed for num_outputs=3: TypeError: "
    )


def test_settings_of_the_built_in_loss_are_not_passed_over_in_silence(user_module: UserModule) -> None:
    path = f"{user_module(OWN)}:Pinball"

    assert _faults(_own(path, targets="classification", label_smoothing=0.1, class_weights="balanced")) == (
        f"training.label_smoothing: '{path}' has a loss of its own; remove it",
        f"training.class_weights: '{path}' has a loss of its own; remove it",
    )


@pytest.mark.parametrize("losses", ["outputs.mean()", "outputs", "outputs[:1, 0]"])
def test_a_loss_that_is_not_one_a_sample_is_told(user_module: UserModule, losses: str) -> None:
    source = OWN.replace("torch.maximum(0.9 * error, -0.1 * error)", losses)
    task = load_task(_own(f"{user_module(source)}:Pinball"), 1, Y)

    with pytest.raises(TrainingFailed, match=r"task Pinball: loss returned shape \(.*\) for 8 rows, expected \(8,\)"):
        sample_losses(task, LOGITS, torch.from_numpy(Y).float())


@pytest.mark.parametrize(
    ("metrics", "fault"),
    [
        ('{"mae": torchmetrics.MeanAbsoluteError()}', "'mae': a name must start with 'val_'"),
        ('{"val_loss": torchmetrics.MeanAbsoluteError()}', "'val_loss': a name must start with 'val_'"),
        ('{"val_all": torchmetrics.CatMetric()}', "'val_all': state 'value' of CatMetric is not a sum over samples"),
        ('{"val_max": torchmetrics.MaxMetric()}', "'val_max': state 'max_value' of MaxMetric is not a sum"),
        (
            '{"val_b": torchmetrics.BootStrapper(torchmetrics.MeanSquaredError())}',
            "'val_b': BootStrapper has no states of its own",
        ),
    ],
    ids=["name", "reserved", "list", "maximum", "wrapper"],
)
def test_a_metric_that_workers_cannot_add_up_is_told(user_module: UserModule, metrics: str, fault: str) -> None:
    source = OWN.replace('{"val_mae": torchmetrics.MeanAbsoluteError()}', metrics)
    task = load_task(_own(f"{user_module(source)}:Pinball"), 1, Y)

    with pytest.raises(SpecError) as caught:
        metric_collection(task, 1)
    assert caught.value.faults[0].startswith(f"training.task: Pinball.metrics: {fault}")

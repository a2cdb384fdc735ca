"""What a task minimises and reports: the loss and the torchmetrics of classification and regression (worker)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigray.specs import BuiltInTask

if TYPE_CHECKING:
    import torch
    import torchmetrics


_NO_SYNC: dict[str, Any] = {"sync_on_compute": False}


def summed_loss(task: BuiltInTask, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over the samples: cross-entropy of logits (rows, classes), or squared error of (rows, 1)."""
    from torch.nn import functional

    if task == "classification":
        return functional.cross_entropy(outputs.float(), targets, reduction="sum")
    return functional.mse_loss(outputs.float().squeeze(-1), targets, reduction="sum")


def make_metrics(task: BuiltInTask, num_outputs: int) -> torchmetrics.MetricCollection:
    """The task's validation metrics under the names of `bigray.specs.METRICS`.

    Every state of each is a sum over samples, which the loop adds up over the ranks; so they must not sync themselves.
    """
    from torchmetrics import MetricCollection, classification, regression

    if task == "classification":
        return MetricCollection(
            {
                "val_accuracy": classification.MulticlassAccuracy(num_outputs, average="micro", **_NO_SYNC),
                "val_macro_recall": classification.MulticlassRecall(num_outputs, average="macro", **_NO_SYNC),
                "val_macro_f1": classification.MulticlassF1Score(num_outputs, average="macro", **_NO_SYNC),
            }
        )
    return MetricCollection(
        {
            "val_mse": regression.MeanSquaredError(**_NO_SYNC),
            "val_mae": regression.MeanAbsoluteError(**_NO_SYNC),
            "val_r2": regression.R2Score(**_NO_SYNC),
        }
    )


def to_predictions(task: BuiltInTask, outputs: torch.Tensor) -> torch.Tensor:
    """Model outputs -> what the metrics compare with the targets."""
    return outputs.argmax(dim=1) if task == "classification" else outputs.float().squeeze(-1)

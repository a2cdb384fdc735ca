"""Which epoch of a trial is its best: the same rule for a trial alone and for a lane of a stack. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bigray.errors import TrainingFailed
from bigray.specs import TrainingSpec
from bigray.training.checkpoint import Progress


def validated(progress: Progress, metrics: dict[str, float], spec: TrainingSpec) -> Progress:
    """The progress after a validation at its epoch and step; the best epoch is this one where `best_step` is `step`."""
    progress = replace(progress, metrics=metrics)
    if not is_better(metrics, progress.best_metrics, spec):
        return replace(progress, validations_since_best=progress.validations_since_best + 1)
    return replace(
        progress,
        best_epoch=progress.epoch,
        best_step=progress.step,
        best_metrics=metrics,
        validations_since_best=0,
        improvements=(*progress.improvements, (progress.epoch, metrics[spec.selection_metric])),
    )


def is_better(metrics: Mapping[str, float], best: Mapping[str, float], spec: TrainingSpec) -> bool:
    """By the selection metric, and by the loss where that is equal (small validation sets tie often).

    Raises:
        TrainingFailed: the selection metric is not among them.
    """
    name = spec.selection_metric
    if name not in metrics:
        raise TrainingFailed(
            f"training.metric: '{name}' is not reported by task '{spec.task}'; it has {', '.join(metrics)}"
        )
    if not best:
        return True
    sign = 1.0 if spec.selection_mode == "max" else -1.0
    now, then = sign * metrics[name], sign * best[name]
    return now > then or (now == then and metrics["val_loss"] < best["val_loss"])

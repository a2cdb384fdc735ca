"""The tasks that a job file names: what each minimises, reports and predicts (worker)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    import torchmetrics

BINS = 200
"""Thresholds between 0 and 1 at which the areas under curves are computed after an epoch: counts at each are sums over
samples, which workers can add up. The model card has the exact areas."""
_NO_SYNC: dict[str, Any] = {"sync_on_compute": False}


class Classification:
    """Cross-entropy of logits (rows, classes) against class indices.

    With `class_weights` (one for each class) a batch's loss is divided by the weights of its samples, as torch does.
    """

    def __init__(self, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None) -> None:
        self._label_smoothing = label_smoothing
        self._class_weights = None if class_weights is None else np.asarray(class_weights, dtype=np.float32)
        self._weights_on_device: torch.Tensor | None = None

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        return functional.cross_entropy(
            outputs.float(),
            targets,
            weight=self._weights_beside(outputs),
            reduction="none",
            label_smoothing=self._label_smoothing,
        )

    def validation_loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Without smoothing and weights, so that trials that differ in them can be compared."""
        from torch.nn import functional

        return functional.cross_entropy(outputs.float(), targets, reduction="none")

    def total_weight(self, targets: NDArray[np.int64]) -> float:
        if self._class_weights is None:
            return float(len(targets))
        return float(self._class_weights[targets].sum(dtype=np.float64))

    def metrics(self, num_outputs: int) -> dict[str, torchmetrics.Metric]:
        from torchmetrics import classification

        return {
            "val_accuracy": classification.MulticlassAccuracy(num_outputs, average="micro", **_NO_SYNC),
            "val_macro_recall": classification.MulticlassRecall(num_outputs, average="macro", **_NO_SYNC),
            "val_macro_precision": classification.MulticlassPrecision(num_outputs, average="macro", **_NO_SYNC),
            "val_macro_f1": classification.MulticlassF1Score(num_outputs, average="macro", **_NO_SYNC),
        }

    def predict(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.argmax(dim=1)

    def _weights_beside(self, outputs: torch.Tensor) -> torch.Tensor | None:
        import torch

        if self._class_weights is None:
            return None
        if self._weights_on_device is None or self._weights_on_device.device != outputs.device:
            self._weights_on_device = torch.from_numpy(self._class_weights).to(outputs.device)
        return self._weights_on_device


class Regression:
    """Squared error of outputs (rows, 1) against numbers."""

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        return functional.mse_loss(self.predict(outputs), targets, reduction="none")

    def metrics(self, num_outputs: int) -> dict[str, torchmetrics.Metric]:
        from torchmetrics import regression

        from bigray.training.r2 import R2

        return {
            "val_mse": regression.MeanSquaredError(**_NO_SYNC),
            "val_mae": regression.MeanAbsoluteError(**_NO_SYNC),
            "val_r2": R2(**_NO_SYNC),
        }

    def predict(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.float().squeeze(-1)


class Binary:
    """Cross-entropy of one logit a row (rows, 1) against 0 and 1, the positive class.

    It is the loss of `Classification` with the logits (0, x), smoothing and weights included.
    """

    def __init__(self, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None) -> None:
        weights = np.ones(2) if class_weights is None else np.asarray(class_weights, dtype=np.float64)
        self._class_weights = weights
        table = ((1 - label_smoothing) * np.eye(2) + label_smoothing / 2) * weights
        self._shares = table.astype(np.float32)
        """In row i the weights that log(1 - p) and log(p) have for a sample of class i."""
        self._shares_on_device: torch.Tensor | None = None

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        logits, shares = outputs.float().squeeze(-1), self._shares_beside(outputs)[targets]
        return shares[..., 0] * functional.softplus(logits) + shares[..., 1] * functional.softplus(-logits)

    def validation_loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Without smoothing and weights, so that trials that differ in them can be compared."""
        from torch.nn import functional

        logits = outputs.float().squeeze(-1)
        return functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")

    def total_weight(self, targets: NDArray[np.int64]) -> float:
        return float(self._class_weights[targets].sum())

    def metrics(self, num_outputs: int) -> dict[str, torchmetrics.Metric]:
        """Of probabilities; those that need a decision take the positive class from 0.5 on."""
        from torchmetrics import classification

        return {
            "val_f1": classification.BinaryF1Score(**_NO_SYNC),
            "val_accuracy": classification.BinaryAccuracy(**_NO_SYNC),
            "val_precision": classification.BinaryPrecision(**_NO_SYNC),
            "val_recall": classification.BinaryRecall(**_NO_SYNC),
            "val_roc_auc": classification.BinaryAUROC(thresholds=BINS, **_NO_SYNC),
            "val_pr_auc": classification.BinaryAveragePrecision(thresholds=BINS, **_NO_SYNC),
        }

    def predict(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.float().squeeze(-1).sigmoid()

    def _shares_beside(self, outputs: torch.Tensor) -> torch.Tensor:
        import torch

        if self._shares_on_device is None or self._shares_on_device.device != outputs.device:
            self._shares_on_device = torch.from_numpy(self._shares).to(outputs.device)
        return self._shares_on_device


class Multilabel:
    """Binary cross-entropy of each label's logit (rows, labels) against 0 and 1; a row's loss is the mean over them."""

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        logits = outputs.float()
        losses = functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
        return losses.mean(dim=-1)

    def metrics(self, num_outputs: int) -> dict[str, torchmetrics.Metric]:
        """With each label from a probability of 0.5 on."""
        from torchmetrics import classification

        return {
            "val_macro_f1": classification.MultilabelF1Score(num_outputs, average="macro", **_NO_SYNC),
            "val_micro_f1": classification.MultilabelF1Score(num_outputs, average="micro", **_NO_SYNC),
            "val_exact_match": classification.MultilabelExactMatch(num_outputs, **_NO_SYNC),
        }

    def predict(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.float().sigmoid()


class Language:
    """Cross-entropy of logits (rows, T, tokens) against the token that follows each of T; a row's loss is their mean.

    In nats a token.
    """

    def output_shape(self, num_outputs: int, target_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*target_shape, num_outputs)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        losses = functional.cross_entropy(outputs.float().flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).mean(dim=1)

    def metrics(self, num_outputs: int) -> dict[str, torchmetrics.Metric]:
        from torchmetrics import classification

        return {"val_token_accuracy": classification.MulticlassAccuracy(num_outputs, average="micro", **_NO_SYNC)}

    def metrics_of_loss(self, loss: float) -> dict[str, float]:
        """All rows have the same number of tokens, so that the mean over rows is the mean over tokens."""
        return {"val_perplexity": math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf}

    def predict(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.argmax(dim=-1)


_LARGEST_EXPONENT = 700.0
"""Of e, in a double."""

"""What the reports of a loop of one's own add up to: the best of them, and where the trial stands. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bigray.training.checkpoint import Progress


@dataclass
class TrialRecord:
    """The best-metric bookkeeping of one trial. It changes in place: thousands of reports a second come by."""

    metric: str
    """The selection metric."""
    mode: Literal["max", "min"]
    epoch: int = 0
    """Of the newest report, from 1."""
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the newest report; empty where its selection metric was NaN or infinite."""
    best_epoch: int = 0
    best_step: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    is_diverged: bool = False
    """The newest report's selection metric was NaN or infinite."""
    _improvements: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, progress: Progress, metric: str, mode: Literal["max", "min"]) -> TrialRecord:
        """The record as a checkpoint holds it."""
        return cls(
            metric=metric,
            mode=mode,
            epoch=progress.epoch,
            step=progress.step,
            metrics=progress.metrics,
            best_epoch=progress.best_epoch,
            best_step=progress.best_step,
            best_metrics=progress.best_metrics,
            is_diverged=progress.ended == "diverged",
            _improvements=dict(progress.improvements),
        )

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever reported."""
        return not self.metrics and not self.best_metrics and not self.is_diverged

    def add(self, epoch: int, step: int, metrics: dict[str, float]) -> bool:
        """Take a report, which holds the selection metric; says whether it is the best so far.

        Other values that are not finite are left out: no table or JSON document can show them.
        """
        self.epoch, self.step = epoch, step
        self.is_diverged = not math.isfinite(metrics[self.metric])
        if self.is_diverged:
            self.metrics = {}
            return False
        if not all(map(math.isfinite, metrics.values())):
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.metrics = metrics
        if not self._is_better(metrics, self.best_metrics):
            return False
        self.best_epoch, self.best_step, self.best_metrics = epoch, step, metrics
        self._improvements.pop(epoch, None)  # an epoch that is reported again comes last
        self._improvements[epoch] = metrics[self.metric]
        return True

    def is_stale(self, patience: int) -> bool:
        """Whether that many epochs came after the best one without a better."""
        return bool(self.best_metrics) and self.epoch - self.best_epoch >= patience

    def to_progress(self, ended: str | None = None) -> Progress:
        return Progress(
            epoch=self.epoch,
            step=self.step,
            ended=ended,
            metrics=self.metrics,
            best_epoch=self.best_epoch,
            best_step=self.best_step,
            best_metrics=self.best_metrics,
            validations_since_best=max(0, self.epoch - self.best_epoch),
            improvements=tuple(self._improvements.items()),
        )

    def _is_better(self, metrics: Mapping[str, float], best: Mapping[str, float]) -> bool:
        """By the selection metric, and by the loss where both report one and the metric is equal."""
        if not best:
            return True
        now, then = metrics[self.metric], best[self.metric]
        if now == then:
            return metrics.get("val_loss", math.inf) < best.get("val_loss", math.inf)
        return now > then if self.mode == "max" else now < then

"""The DDP training loop of one trial on one worker.

Exactness: the rows of a step are a function of (seed, epoch, batch); each worker computes its share, and gradients are
averaged by sample, so any number of workers takes the same step (design: exactness; Goyal et al. 2017, arXiv
1706.02677, section 2.2 for losses under data parallelism).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bigray.data.batches import epoch_order, global_batch, step_seed, steps_per_epoch, worker_share
from bigray.data.dataset import TrainingArrays
from bigray.errors import TrainingFailed
from bigray.models import build_model
from bigray.specs import TrialSpec
from bigray.training.checkpoint import (
    Checkpoint,
    Progress,
    StateDict,
    pack_optimizer,
    pack_weights,
    unpack_optimizer,
    unpack_weights,
)
from bigray.training.tasks import make_metrics, summed_loss, to_predictions

EVALUATION_ROWS = 4096
"""Rows of one forward pass in validation; bounds memory, does not change results."""


@dataclass(frozen=True)
class Worker:
    """Who this process is in its group."""

    rank: int
    world_size: int
    device: torch.device


class _Clock:
    """Says once every `interval_s` that it is time."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s, self._last = interval_s, time.monotonic()

    def is_due(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._interval_s:
            return False
        self._last = now
        return True


class TrialTraining:
    """One trial in this worker's memory: module, optimizer and progress.

    Every rank makes the same calls in the same order. Only rank 0 keeps the best weights and makes checkpoints.
    """

    def __init__(self, trial: TrialSpec, data: TrainingArrays, num_outputs: int, worker: Worker) -> None:
        self.trial, self.data, self.worker = trial, data, worker
        self.progress = Progress()
        self.best_weights: StateDict | None = None
        self._num_outputs = num_outputs
        _seed(worker.device, trial.seed)
        self.module = build_model(trial.model.factory, trial.model.params, data.x_train.shape[1:], num_outputs).to(
            worker.device
        )
        self._replica = _wrap(self.module, worker)
        self._optimizer = _make_optimizer(trial, self.module)
        self._metrics = make_metrics(trial.training.target_kind, num_outputs).to(worker.device)

    def train_to(
        self, until_epoch: int, on_epoch: Callable[[dict[str, Any]], None], on_checkpoint: Callable[[Checkpoint], None]
    ) -> None:
        """Train until `until_epoch` epochs are complete, or the trial ends before.

        `on_epoch` gets each epoch's report and `on_checkpoint` each timed checkpoint, both on rank 0 only.
        """
        spec, worker = self.trial.training, self.worker
        num_rows = len(self.data.x_train)
        num_steps = steps_per_epoch(num_rows, spec.batch_size)
        clock = _Clock(spec.checkpoint_every_s)

        while self.progress.ended is None and self.progress.epoch < until_epoch:
            started, first_batch = time.perf_counter(), self.progress.batch
            epoch = self.progress.epoch
            order = epoch_order(self.trial.seed, epoch, num_rows)
            loss_sum = torch.zeros((), dtype=torch.float64, device=worker.device)
            num_samples = 0
            self._replica.train()
            for batch in range(first_batch, num_steps):
                rows = global_batch(order, batch, spec.batch_size)
                share = worker_share(rows, worker.rank, worker.world_size)
                _seed(worker.device, step_seed(self.trial.seed, epoch, batch, worker.rank))
                if len(share):
                    loss = self._summed_loss(self._replica, share)
                else:  # a rank without samples still takes part in the gradient average
                    loss = self._summed_loss(self._replica, rows[:1]) * 0.0
                # DDP divides by the world size; this makes it the mean over the samples of the global batch
                (loss * (worker.world_size / len(rows))).backward()  # type: ignore[no-untyped-call]
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)
                loss_sum += loss.detach()
                num_samples += len(rows)
                self.progress = replace(self.progress, batch=batch + 1, step=self.progress.step + 1)
                # the last step's checkpoint waits for the validation that belongs to it
                if worker.rank == 0 and batch + 1 < num_steps and clock.is_due():
                    on_checkpoint(self.to_checkpoint())

            _sum_over_ranks(loss_sum, worker)
            train_seconds = time.perf_counter() - started
            train_loss = float(loss_sum) / num_samples
            self._end_epoch(train_loss)
            if worker.rank == 0 and self.progress.ended is None and clock.is_due():
                on_checkpoint(self.to_checkpoint())
            if worker.rank == 0:
                on_epoch(
                    {
                        "epoch": self.progress.epoch,
                        "step": self.progress.step,
                        "train_loss": train_loss,
                        "samples_per_s": num_samples / train_seconds,
                        "epoch_s": time.perf_counter() - started,
                        "metrics": self.progress.metrics,
                        "best_epoch": self.progress.best_epoch,
                        "best_metrics": self.progress.best_metrics,
                        "ended": self.progress.ended,
                    }
                )

    def evaluate(self) -> dict[str, float]:
        """Validation metrics of the current weights, over all ranks; the same dict on each."""
        task, worker = self.trial.training.target_kind, self.worker
        rows = np.arange(len(self.data.x_val), dtype=np.int64)
        share = worker_share(rows, worker.rank, worker.world_size)
        loss = torch.zeros((), dtype=torch.float64, device=worker.device)
        self._metrics.reset()
        if worker.world_size > 1:  # the checkpoint holds rank 0's BatchNorm statistics: validate those, on every rank
            for buffer in self.module.buffers():
                dist.broadcast(buffer, src=0)
        self.module.eval()
        with torch.inference_mode():
            for start in range(0, len(share), EVALUATION_ROWS):
                x, y = self._load(self.data.x_val, self.data.y_val, share[start : start + EVALUATION_ROWS])
                outputs = self._forward(self.module, x)
                loss += summed_loss(task, outputs, y)
                self._metrics.update(to_predictions(task, outputs), y)
        self._sum_metrics_over_ranks(loss)
        values = {name: float(value) for name, value in self._metrics.compute().items()}
        return {"val_loss": float(loss) / len(rows), **values}

    def to_checkpoint(self) -> Checkpoint:
        """Everything needed to go on from here (rank 0)."""
        best_is_older = self.best_weights is not None and self.progress.best_step != self.progress.step
        return Checkpoint(
            progress=self.progress,
            model=pack_weights(self.module.state_dict()),
            optimizer=pack_optimizer(self._optimizer),
            best=pack_weights(self.best_weights) if best_is_older and self.best_weights is not None else None,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint of the same trial (every rank)."""
        self.module.load_state_dict(unpack_weights(checkpoint.model))
        unpack_optimizer(self._optimizer, checkpoint.optimizer)
        self.progress = checkpoint.progress
        if self.progress.best_metrics and self.worker.rank == 0:
            self.best_weights = unpack_weights(checkpoint.best_weights)

    def _end_epoch(self, train_loss: float) -> None:
        """Validate where it is due, remember the best weights, decide whether the trial has ended (every rank)."""
        spec = self.trial.training
        after = replace(self.progress, epoch=self.progress.epoch + 1, batch=0)
        if not math.isfinite(train_loss):  # summed over ranks, so all of them see it
            self.progress = replace(after, ended="diverged", metrics={})
            return
        is_last = after.epoch >= spec.epochs
        if is_last or after.epoch % spec.val_every == 0:
            after = self._record_validation(after, self.evaluate())
        if is_last:
            after = replace(after, ended="finished")
        elif spec.patience is not None and after.validations_since_best >= spec.patience:
            after = replace(after, ended="stopped early")
        self.progress = after

    def _record_validation(self, progress: Progress, metrics: dict[str, float]) -> Progress:
        if not all(math.isfinite(value) for value in metrics.values()):
            return replace(progress, ended="diverged", metrics={})
        progress = replace(progress, metrics=metrics)
        if not self._is_better(metrics, progress.best_metrics):
            return replace(progress, validations_since_best=progress.validations_since_best + 1)
        if self.worker.rank == 0:
            self.best_weights = {name: t.detach().cpu().clone() for name, t in self.module.state_dict().items()}
        return replace(
            progress,
            best_epoch=progress.epoch,
            best_step=progress.step,
            best_metrics=metrics,
            validations_since_best=0,
            improvements=(*progress.improvements, (progress.epoch, metrics[self.trial.training.selection_metric])),
        )

    def _is_better(self, metrics: dict[str, float], best: dict[str, float]) -> bool:
        """By the selection metric, and by the loss where that is equal (small validation sets tie often)."""
        if not best:
            return True
        spec = self.trial.training
        sign = 1.0 if spec.selection_mode == "max" else -1.0
        now, then = sign * metrics[spec.selection_metric], sign * best[spec.selection_metric]
        return now > then or (now == then and metrics["val_loss"] < best["val_loss"])

    def _sum_metrics_over_ranks(self, loss: torch.Tensor) -> None:
        """Add up the loss and the metrics' states over the ranks, in place and in one collective.

        torchmetrics would gather each state by itself: 36 collectives an epoch for what is a sum.
        """
        if self.worker.world_size == 1:
            return
        metrics = list(self._metrics.values(copy_state=False))
        states = [(metric, name, value) for metric in metrics for name, value in metric.metric_state.items()]
        flat = torch.cat([loss.reshape(1), *(value.reshape(-1).double() for _, _, value in states)])
        dist.all_reduce(flat)
        loss.copy_(flat[0])
        sums = torch.split(flat[1:], [value.numel() for _, _, value in states])
        for (metric, name, value), total in zip(states, sums, strict=True):
            setattr(metric, name, total.reshape(value.shape).to(value.dtype))

    def _summed_loss(self, network: torch.nn.Module, rows: np.ndarray[Any, Any]) -> torch.Tensor:
        x, y = self._load(self.data.x_train, self.data.y_train, rows)
        return summed_loss(self.trial.training.target_kind, self._forward(network, x), y)

    def _forward(self, network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        enabled = self.trial.training.precision == "bf16"
        with torch.autocast(self.worker.device.type, dtype=torch.bfloat16, enabled=enabled):
            outputs: torch.Tensor = network(x)
        if outputs.shape != (len(x), self._num_outputs):
            raise TrainingFailed(
                f"model '{self.trial.model_name}': returned shape {tuple(outputs.shape)} for {len(x)} rows, "
                f"expected {(len(x), self._num_outputs)}"
            )
        return outputs

    def _load(
        self, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy rows out of the shared read-only arrays and onto the device."""
        device = self.worker.device
        inputs, targets = torch.from_numpy(x[rows]), torch.from_numpy(y[rows])
        if device.type == "cpu":
            return inputs, targets
        return (
            inputs.pin_memory().to(device, non_blocking=True),
            targets.pin_memory().to(device, non_blocking=True),
        )


def _wrap(module: torch.nn.Module, worker: Worker) -> torch.nn.Module:
    has_parameters = any(parameter.requires_grad for parameter in module.parameters())
    if worker.world_size == 1 or not has_parameters:
        return module
    device_ids = [worker.device] if worker.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=device_ids)


def _make_optimizer(trial: TrialSpec, module: torch.nn.Module) -> torch.optim.Optimizer:
    spec = trial.training
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    common: dict[str, Any] = {"lr": spec.lr, "weight_decay": spec.weight_decay, "fused": True}
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    extra = {"momentum": spec.momentum} if spec.optimizer == "sgd" else {}
    made: torch.optim.Optimizer = kinds[spec.optimizer](parameters, **common, **extra)
    return made


def _seed(device: torch.device, seed: int) -> None:
    """Seed the one generator this worker draws from.

    `torch.manual_seed` seeds those of every kind of accelerator, present or not: 1 ms, and a queue entry each time.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _sum_over_ranks(values: torch.Tensor, worker: Worker) -> None:
    if worker.world_size > 1:
        dist.all_reduce(values)

"""Loops of one's own: what `loop = "package.module:train"` is called with, in every worker of the group.

The loop gets launch, sweeps, checkpoints, resume and deployment; bigray asks for two things: that it reports the metric
trials are compared by, and that it hands over the weights that go with it.

It may be called more than once for a trial: after a lost worker, after a preemption, and at each rung of a sweep that
stops bad trials early (ASHA). Each time it is called from the top with `context.epochs` set to where it may go, and
finds what it last saved with `context.restore()`. A loop that never saves starts again from its first epoch: right, but
slower.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bigray.data.batches import epoch_order, global_batch, step_seed, steps_per_epoch, worker_share
from bigray.data.dataset import TrainingArrays
from bigray.errors import SpecError, TrainingFailed
from bigray.models import build_model
from bigray.models.resolve import load_factory
from bigray.models.transfer import start_from
from bigray.specs import TrainingSpec, TrialSpec
from bigray.training.checkpoint import Checkpoint, Progress, Snapshot, SnapshotBuffers, StateDict, weights_sha256
from bigray.training.loop import LoopHooks, TrialTraining, Worker
from bigray.training.record import TrialRecord
from bigray.training.replica import seed_generator
from bigray.training.state_tree import pack_tree, unpack_tree

LOOP_STATE = "loop"
"""Stem of the file in a checkpoint that holds what the loop saved besides its weights."""


@dataclass(frozen=True)
class SavedState:
    """What the loop last saved, as `LoopContext.restore` gives it. All tensors are on the CPU."""

    epoch: int
    """Epochs that were complete."""
    step: int
    model: StateDict
    extra: dict[str, Any]
    """The keyword arguments of `save`, by name; an object with a `state_dict()` comes back as its state dict."""


class LoopContext:
    """One call of a loop of one's own, on one worker. Epochs count from 1 everywhere, as in bigray's tables.

    What is marked collective has to be called by every rank, in the same order.
    """

    def __init__(self, training: LoopTraining, until_epoch: int) -> None:
        self._training, self._hooks = training, training.hooks
        self._trial, self._worker = training.trial, training.worker
        self._metric, self._is_first = training.trial.training.selection_metric, training.worker.rank == 0
        self._first_epoch, self._until_epoch = 1, until_epoch
        self._batches_taken, self._rows_taken, self._rows_of_step = 0, 0, 0
        self._num_checks = 0
        self._has_news = False
        """A report has come since the last `should_stop` (rank 0)."""
        self.is_resting = False
        """Whether the call is to end here, at a report; as of the last `should_stop`."""
        self._rest_is_due = False
        self._started_epoch_at = self._reported_at = time.perf_counter()
        self._epoch_s: float | None = None
        self.is_stopping = False
        """Whether the workers are wanted back; as of the last `should_stop`."""
        self.save_is_due = False
        """Whether `training.checkpoint_every_s` has passed without a `save`; as of the last `should_stop`."""

    @property
    def rank(self) -> int:
        return self._worker.rank

    @property
    def world_size(self) -> int:
        return self._worker.world_size

    @property
    def local_rank(self) -> int:
        """Rank among the workers of this node."""
        return int(os.environ.get("LOCAL_RANK", self._worker.rank))

    @property
    def device(self) -> torch.device:
        return self._worker.device

    @property
    def spec(self) -> TrainingSpec:
        """The trial's settings: `lr`, `batch_size` (over all workers) and the rest; which of them count is the loop's
        choice."""
        return self._trial.training

    @property
    def lr(self) -> float:
        """The learning rate for this batch size: `spec.lr`, scaled where the job asks for it (`lr_scaling`)."""
        return self._trial.training.scaled_lr

    @property
    def params(self) -> dict[str, Any]:
        """`training.loop_params` of the job file."""
        return self._trial.training.loop_params

    @property
    def seed(self) -> int:
        return self._trial.seed

    @property
    def data(self) -> TrainingArrays:
        """All training and validation rows, read-only and shared by the workers of a node."""
        return self._training.data

    @property
    def num_outputs(self) -> int:
        """Columns of the model's output: the number of classes, or 1."""
        return self._training.num_outputs

    @property
    def epochs(self) -> int:
        """The last epoch to train in this call: the job's `epochs`, or the sweep's next rung."""
        return self._until_epoch

    @property
    def remaining_epochs(self) -> range:
        """From the first epoch that `restore` did not bring back, up to `epochs`."""
        return range(self._first_epoch, self._until_epoch + 1)

    @property
    def step(self) -> int:
        """Optimizer steps so far, where the batches come from `batches` and each makes one."""
        return self._batches_taken

    def build_model(self) -> nn.Module:
        """The trial's model on the CPU, with initial weights that are the same on every rank and in every run."""
        seed_generator(self.device, _or(self.spec.seeds.weights, self.seed))
        return _built(self._trial, self.data, self.num_outputs)

    def prepare(self, module: nn.Module) -> nn.Module:
        """On the device, and in `DistributedDataParallel` where there are several workers. Collective."""
        module = module.to(self.device)
        if self.world_size == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        return DistributedDataParallel(module, device_ids=[self.device] if self.device.type == "cuda" else None)

    def batches(self, epoch: int, *, skip: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This worker's share (inputs, targets) of each global batch of an epoch, on the device, in bigray's order.

        Together the workers see each row once an epoch, in an order that depends on seed and epoch alone. Every rank
        gets as many batches, so that their collectives match: the share of a small last batch can be empty. See `mean`
        for the loss. torch's generator is seeded before each batch, so dropout is the same when a run is resumed.
        `skip` leaves out the first batches of an epoch that was broken off.
        """
        self._check_epoch(epoch, "batches")
        x, y, size, worker = self.data.x_train, self.data.y_train, self.spec.batch_size, self._worker
        seeds, num_steps = self.spec.seeds, steps_per_epoch(len(x), size)
        order = epoch_order(_or(seeds.order, self.seed), epoch - 1, len(x))
        for batch in range(skip, num_steps):
            self._hooks.tick("data")
            rows = global_batch(order, batch, size)
            share = worker_share(rows, worker.rank, worker.world_size)
            seed_generator(self.device, step_seed(_or(seeds.steps, self.seed), epoch - 1, batch, worker.rank))
            self._rows_of_step = len(rows)
            self._rows_taken += len(rows)
            self._batches_taken = (epoch - 1) * num_steps + batch + 1
            inputs, targets = torch.from_numpy(x[share]).to(self.device), torch.from_numpy(y[share]).to(self.device)
            self._hooks.tick("loop")
            yield inputs, targets

    def mean(self, losses: torch.Tensor) -> torch.Tensor:
        """Losses (rows,) of the newest batch's share -> the loss to call `backward` on.

        DDP averages gradients over the workers, whose shares can differ by a row; so scaled, the average is the mean
        over the rows of the global batch, and any number of workers takes the same step.
        """
        return losses.sum() * (self.world_size / self._rows_of_step)

    def report(
        self,
        metrics: Mapping[str, float],
        *,
        epoch: int,
        step: int | None = None,
        model: nn.Module | Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Tell the metrics of the weights after `epoch`; rank 0's count, the others' are ignored. Never blocks.

        `metrics` holds the selection metric (`training.metric`) and any other numbers; those named `train_loss` and
        `val_...` are shown. With `model`, or its state dict, a copy of the weights is kept when it is the best report
        so far: that is what is exported and served. An epoch may be reported more than once. `step`: the optimizer
        step, where the batches do not come from `batches`.

        Raises:
            TrainingFailed: the selection metric is missing, a value is not a number, or `epoch` is below 1.
        """
        self._hooks.tick("report")
        if self._is_first:
            self._report(metrics, epoch, step, model)
        self._hooks.tick("loop")

    def _report(
        self,
        metrics: Mapping[str, float],
        epoch: int,
        step: int | None,
        model: nn.Module | Mapping[str, torch.Tensor] | None,
    ) -> None:
        self._check_epoch(epoch, "report")
        training, record = self._training, self._training.record
        is_new_epoch = epoch != record.epoch
        is_best = record.add(epoch, self._step_of(epoch, step), self._numbers(metrics, epoch))
        if is_best:
            training.best_weights = None if model is None else training.copy_weights(model)
        now = time.perf_counter()
        if is_new_epoch:
            self._epoch_s, self._started_epoch_at = now - self._started_epoch_at, now
        self._hooks.on_epoch(
            {
                "epoch": epoch,
                "step": record.step,
                "train_loss": record.metrics.get("train_loss"),
                "samples_per_s": self._rows_taken / (now - self._reported_at) if self._rows_taken else None,
                "epoch_s": self._epoch_s,
                "metrics": record.metrics,
                "best_epoch": record.best_epoch,
                "best_metrics": record.best_metrics,
                "ended": None,
            }
        )
        self._rows_taken, self._reported_at, self._has_news = 0, now, True

    def save(
        self, *, epoch: int, model: nn.Module | Mapping[str, torch.Tensor], step: int | None = None, **extra: Any
    ) -> None:
        """Commit a checkpoint of the state after `epoch` complete epochs (0: none yet); `restore` gives it back.

        The loop waits while tensors are copied, not while they are written. `extra` holds whatever else the loop needs
        to go on: state dicts, objects that have one (optimizers, schedulers), tensors, JSON values. Call it on every
        rank, after the epoch's `report`; rank 0's state is what is saved.

        Raises:
            TrainingFailed: something in `extra` can only be kept by pickle, which bigray does not use; or the best
                report came without its weights.
            StorageError: an earlier checkpoint could not be written.
        """
        self._hooks.tick("save")
        self.save_is_due = False
        if self._is_first:
            self._save(epoch, model, step, extra)
        self._hooks.tick("loop")

    def _save(
        self, epoch: int, model: nn.Module | Mapping[str, torch.Tensor], step: int | None, extra: dict[str, Any]
    ) -> None:
        training, record = self._training, self._training.record
        step = self._step_of(epoch, step)
        state = {name: _state_of(value) for name, value in extra.items()}
        try:
            loop_state = pack_tree({"epoch": epoch, "step": step, "extra": state})
        except TypeError as error:
            raise TrainingFailed(f"{training.name}: context.save: {error}") from error
        weights = _weights_of(model)
        if training.best_weights is None and record.best_metrics and record.best_epoch == record.epoch == epoch:
            training.best_weights = training.copy_weights(model)
        if fault := training.missing_weights():
            raise TrainingFailed(f"{training.name} saves {fault}")
        training.saved_epoch, training.saved_step = epoch, step

        def take(buffers: SnapshotBuffers) -> Snapshot:
            tensors = {"model": buffers.copy("model", weights), LOOP_STATE: buffers.copy(LOOP_STATE, loop_state)}
            best = training.best_weights  # replaced by a better one, never changed: needs no copy
            if best is not None and not (record.best_step == step and _are_equal(best, tensors["model"])):
                tensors["best"] = best
            return Snapshot(replace(record.to_progress(), step=step), tensors)

        self._hooks.on_checkpoint(take)

    def restore(self) -> SavedState | None:
        """What was last saved, on every rank; None where this trial starts. Collective: call it first."""
        self._hooks.tick("loading")
        saved = self._training.load_saved()
        self._hooks.tick("loop")
        if saved is not None:
            self._first_epoch, self._batches_taken = saved.epoch + 1, saved.step
        return saved

    def should_stop(self) -> bool:
        """Whether to save and return now, the same on every rank: the workers are wanted back, or `patience` is over.

        Where the run's budget is used up, it is so at the first call after a report: nothing is lost then.

        Collective, and cheap enough for every step. Every call on the context also tells that this worker is alive; a
        loop that makes none for `training.hang_timeout_s` is taken for a hanging one.
        """
        self._num_checks += 1
        self._hooks.tick("report")
        must_stop = self._must_stop()
        self._hooks.tick("loop")
        return must_stop

    def _must_stop(self) -> bool:
        wish = self._hooks.exchange(self._num_checks)
        self.is_stopping, self.save_is_due = self.is_stopping or wish.stop, self.save_is_due or wish.save
        self._rest_is_due = self._rest_is_due or wish.rest
        has_news, self._has_news = self._has_news, False
        patience = self.spec.patience
        if patience is None and not self._rest_is_due:
            return self.is_stopping
        is_stale = patience is not None and self._training.record.is_stale(patience)
        is_stale, self.is_resting = self._training.of_rank_0((is_stale, self._rest_is_due and has_news))
        return self.is_stopping or self.is_resting or is_stale

    def _numbers(self, metrics: Mapping[str, float], epoch: int) -> dict[str, float]:
        try:
            numbers = {name: float(value) for name, value in metrics.items()}
        except (TypeError, ValueError) as error:
            raise TrainingFailed(
                f"{self._training.name}: the report of epoch {epoch} holds a value that is not a number: {error}"
            ) from error
        if self._metric not in numbers:
            raise TrainingFailed(
                f"{self._training.name}: the report of epoch {epoch} has no '{self._metric}', by which trials are "
                f"compared; it has {', '.join(numbers) or 'nothing'}. Report it, or name another in training.metric"
            )
        return numbers

    def _step_of(self, epoch: int, step: int | None) -> int:
        """A loop with batches of its own that counts no steps is taken to make at least one each epoch."""
        return max(self._batches_taken, epoch) if step is None else step

    def _check_epoch(self, epoch: int, call: str) -> None:
        if epoch < 1:
            raise TrainingFailed(
                f"{self._training.name}: context.{call} got epoch {epoch}; epochs count from 1: "
                "for epoch in context.remaining_epochs"
            )


class LoopTraining:
    """One trial of a job with a `loop` of its own, in this worker's memory; the counterpart of `TrialTraining`.

    Every rank makes the same calls in the same order. Only rank 0 keeps the record, the best weights and checkpoints.
    """

    def __init__(
        self, trial: TrialSpec, data: TrainingArrays, num_outputs: int, worker: Worker, hooks: LoopHooks
    ) -> None:
        self.trial, self.data, self.num_outputs, self.worker, self.hooks = trial, data, num_outputs, worker, hooks
        self.name = f"loop '{trial.training.loop}'"
        self.progress = Progress()
        """As of the last restore or the end of `train_to`; the same on every rank."""
        self.best_weights: StateDict | None = None
        self.saved_epoch = self.saved_step = 0
        """Where the loop's own state was last saved (rank 0)."""
        self.record = self._record_of(self.progress)
        self._checkpoint: Checkpoint | None = None
        """The newest one on storage, where this worker has just read it."""
        self._shapes: dict[str, torch.Size] | None = None
        self._num_parameters: int | None = None

    @property
    def num_parameters(self) -> int:
        if self._num_parameters is None:
            self._num_parameters = sum(parameter.numel() for parameter in self._build_model().parameters())
        return self._num_parameters

    def weights_sha256(self) -> str:
        """Of the weights that the loop is about to be given by `restore`."""
        saved = None if self._checkpoint is None else self._checkpoint.tensors("model")
        return weights_sha256(saved or {})

    def train_to(self, until_epoch: int) -> None:
        """Call the loop, which may train until `until_epoch` epochs are complete.

        Raises:
            TrainingFailed: the loop returned without a report, or without the weights of its best one.
        """
        if self.progress.ended is not None or self.progress.epoch >= until_epoch:
            return
        train = _load_loop(self.trial.training.loop)
        context = LoopContext(self, until_epoch)
        with _threads_as_found():
            _seed_everything(self.trial.seed)
            self.hooks.tick("loop")
            train(context)
        self.hooks.tick("report")
        fault = self._fault(context)
        progress = self.record.to_progress(self._ended(context))
        # the newest checkpoint is the one of the highest step
        progress = replace(progress, step=max(progress.step, self.saved_step))
        # rank 0's view is everybody's: all go on, or all raise the same
        self.progress, fault = self.of_rank_0((progress, fault))
        if fault is not None:
            raise TrainingFailed(f"{self.name} {fault}")
        if self.progress.ended is None:
            self._checkpoint = self.hooks.restore_last()

    def snapshot(self, buffers: SnapshotBuffers) -> Snapshot:
        """The record with the best weights, beside the state the loop last saved (rank 0).

        A trial that ended needs no more than the best weights: they are its model then.
        """
        tensors: dict[str, StateDict] = {}
        if self.progress.ended is None and self._checkpoint is not None:
            for stem in ("model", LOOP_STATE):
                if (saved := self._checkpoint.tensors(stem)) is not None:
                    tensors[stem] = saved
        if self.best_weights is not None:
            tensors["best" if "model" in tensors else "model"] = self.best_weights
        elif "model" not in tensors:  # diverged at its first report
            tensors["model"] = self._build_model().state_dict()
        return Snapshot(self.progress, tensors)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up the record and the best weights; the loop itself asks for its own state."""
        self._checkpoint = checkpoint
        self.progress = checkpoint.progress
        self.record = self._record_of(checkpoint.progress)
        is_needed = self.worker.rank == 0 and not checkpoint.is_record
        self.best_weights = checkpoint.tensors(checkpoint.best_file()) if is_needed else None

    def rebuild(self, worker: Worker) -> None:
        """A new process group: the loop was broken off, and the next `train_to` calls it again.

        It cannot go on from memory: `restore` what was last saved. Until then all is forgotten, on every rank alike.
        """
        self.worker = worker
        self.progress, self.best_weights, self._checkpoint = Progress(), None, None
        self.record, self.saved_epoch, self.saved_step = self._record_of(self.progress), 0, 0

    def load_saved(self) -> SavedState | None:
        """The loop's own state in the newest checkpoint; None where it never saved. Collective."""
        # a worker that has just joined may have read it already: all have, or all read it together
        if not self._all_have(self._checkpoint):
            self._checkpoint = self.hooks.restore_last()
            if self._checkpoint is not None:
                self.restore(self._checkpoint)
        checkpoint, self._checkpoint = self._checkpoint, None
        packed = None if checkpoint is None else checkpoint.tensors(LOOP_STATE)
        if checkpoint is None or packed is None:
            return None
        state = unpack_tree(packed)
        self.saved_epoch, self.saved_step = state["epoch"], state["step"]
        return SavedState(state["epoch"], state["step"], checkpoint.tensors("model") or {}, state["extra"])

    def copy_weights(self, model: nn.Module | Mapping[str, torch.Tensor]) -> StateDict:
        """The weights on the CPU, in memory of their own, checked to fit the trial's model."""
        weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _weights_of(model).items()}
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        if self._shapes is None:
            self._shapes = {name: tensor.shape for name, tensor in self._build_model().state_dict().items()}
        if wrong := sorted(shapes.items() ^ self._shapes.items()):
            name, factory = wrong[0][0], self.trial.model.factory
            expected, found = _shape(self._shapes.get(name)), _shape(shapes.get(name))
            raise TrainingFailed(
                f"{self.name}: model: '{name}' is {found}, expected {expected} as '{factory}' makes it; "
                "hand over the module of context.build_model()"
            )
        return weights

    def missing_weights(self) -> str | None:
        """That the best report came without its weights, as the end of a sentence (rank 0)."""
        if not self.record.best_metrics or self.best_weights is not None:
            return None
        epoch = self.record.best_epoch
        return f"without the weights of its best report (epoch {epoch}); call context.report(..., model=module)"

    def of_rank_0(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Collective."""
        if self.worker.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.worker.device)
        return box[0]

    def _all_have(self, value: object) -> bool:
        if self.worker.world_size == 1:
            return value is not None
        count = torch.tensor([0 if value is None else 1], device=self.worker.device)
        dist.all_reduce(count, op=dist.ReduceOp.MIN)
        return bool(count.item())

    def _fault(self, context: LoopContext) -> str | None:
        """What the loop left out, as the end of a sentence about it (rank 0)."""
        metric = self.trial.training.selection_metric
        if self.record.is_empty:
            if context.is_stopping:
                return None
            return f"returned without a report; call context.report(...) with '{metric}'"
        fault = self.missing_weights()
        return None if fault is None else f"returned {fault}"

    def _ended(self, context: LoopContext) -> str | None:
        """Why the trial cannot go on, or None (rank 0)."""
        done = max(self.record.epoch, self.saved_epoch)
        if self.record.is_diverged:
            return "diverged"
        if done >= self.trial.training.epochs:
            return "finished"
        if context.is_stopping or context.is_resting or done >= context.epochs:
            return None
        return "stopped early"

    def _record_of(self, progress: Progress) -> TrialRecord:
        spec = self.trial.training
        return TrialRecord.of(progress, spec.selection_metric, spec.selection_mode)

    def _build_model(self) -> nn.Module:
        """As the factory makes it; the loop's own draws go on as if this had not been."""
        with torch.random.fork_rng(devices=[]):
            return _built(self.trial, self.data, self.num_outputs)


def _built(trial: TrialSpec, data: TrainingArrays, num_outputs: int) -> nn.Module:
    """As the factory makes it, with the weights it is to start from."""
    model = trial.model
    module = build_model(model.factory, model.params, data.x_train.shape[1:], num_outputs)
    start_from(module, model)
    return module


def make_training(
    trial: TrialSpec, data: TrainingArrays, num_outputs: int, worker: Worker, hooks: LoopHooks
) -> TrialTraining | LoopTraining:
    """The trial in this worker's memory: in bigray's loop, or in the job's own."""
    kind = TrialTraining if trial.training.loop is None else LoopTraining
    return kind(trial, data, num_outputs, worker, hooks)


def _load_loop(path: str | None) -> Callable[[LoopContext], object]:
    assert path is not None, "make_training looks at it"
    try:
        return load_factory(path)
    except SpecError as error:
        raise SpecError([f"training.loop: {fault}" for fault in error.faults]) from error


def _weights_of(model: nn.Module | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The state dict under the names the factory gave, whatever was wrapped around the module."""
    if not isinstance(model, nn.Module):
        return model
    wrapped: Any = model
    while isinstance(wrapped, DistributedDataParallel) or hasattr(wrapped, "_orig_mod"):
        wrapped = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped._orig_mod  # compiled
    weights: dict[str, torch.Tensor] = wrapped.state_dict()
    return weights


def _state_of(value: Any) -> Any:
    return value.state_dict() if hasattr(value, "state_dict") else value


def _are_equal(some: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def _shape(size: torch.Size | None) -> str:
    return "absent" if size is None else str(tuple(size))


def _or(seed: int | None, default: int) -> int:
    return default if seed is None else seed


def _seed_everything(seed: int) -> None:
    """Whatever the loop draws from is as in every other run of this trial, and on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def _threads_as_found() -> Iterator[None]:
    """Libraries that think they own the process set torch's threads (Accelerate does, where the variable is unset)."""
    num_threads, before = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)

"""The training loop of one trial on one worker.

Exactness: the rows of a step are a function of (seed, epoch, batch); each worker computes its share, and gradients are
averaged by sample, so any number of workers takes the same step (design: exactness; Goyal et al. 2017, arXiv
1706.02677, section 2.2 for losses under data parallelism). With `exact` the shares are logical shards and the order of
additions is fixed too (`bigray.training.exact`).
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from bigray.data.batches import (
    IndexArray,
    epoch_order,
    global_batch,
    rows_of_shard,
    step_seed,
    steps_per_epoch,
    worker_share,
)
from bigray.data.dataset import TrainingArrays
from bigray.data.row_file import RowFile
from bigray.errors import OutOfMemory
from bigray.specs import TrialSpec
from bigray.training import fsdp
from bigray.training.augmentation import Augmentation
from bigray.training.batchnorm import uncounted_rows
from bigray.training.best_epoch import validated
from bigray.training.checkpoint import Checkpoint, Progress, Snapshot, SnapshotBuffers, StateDict, weights_sha256
from bigray.training.commands import Wish
from bigray.training.exact import ExactGradients
from bigray.training.optimization import lr_factor
from bigray.training.out_of_memory import is_out_of_memory
from bigray.training.replica import Replica, seed_generator
from bigray.training.samples import Counts, SampleLedger, lost_and_repeated
from bigray.training.sharded import Shard
from bigray.training.tasks import load_task, output_shape, sample_losses, total_weight
from bigray.training.validation import Validation

_TIMED_ROWS = 50


@dataclass(frozen=True)
class Worker:
    """Who this process is in its group."""

    rank: int
    world_size: int
    device: torch.device


class LoopHooks(Protocol):
    """What the loop tells and asks of the process it runs in."""

    def tick(self, phase: str) -> None:
        """This rank begins "data", "forward", "backward", "step", "report", "validation" or "save".

        Cheap: called several times a step. The time up to the next mark is the phase's (`stopwatch.PARTS`).
        """

    def exchange(self, step: int) -> Wish:
        """After each optimizer step, on every rank; the answer is the same on all."""

    def on_epoch(self, report: dict[str, Any]) -> None:
        """An epoch is complete, or the trial has ended inside it (rank 0)."""

    def on_checkpoint(self, take: Callable[[SnapshotBuffers], Snapshot]) -> None:
        """Have a checkpoint made; `take` is called before this returns (rank 0; with fsdp every rank)."""

    def restore_last(self) -> Checkpoint | None:
        """The newest good checkpoint of the trial, on every rank; collective."""

    def warn(self, text: str) -> None:
        """Tell the user a line (rank 0)."""


class TrialTraining:
    """One trial in this worker's memory: the model's replica and the progress.

    Every rank makes the same calls in the same order. Only rank 0 keeps the best weights and makes checkpoints; with
    fsdp every rank writes its part.
    """

    def __init__(
        self, trial: TrialSpec, data: TrainingArrays, num_outputs: int, worker: Worker, hooks: LoopHooks
    ) -> None:
        self.trial, self.data, self.worker, self.hooks = trial, data, worker, hooks
        self._spec = spec = trial.training
        self._weights_seed, self._order_seed, self._steps_seed = (
            trial.seed if seed is None else seed for seed in (spec.seeds.weights, spec.seeds.order, spec.seeds.steps)
        )
        self._num_rows, self._num_outputs = len(data.x_train), num_outputs
        self._steps_per_epoch = steps_per_epoch(self._num_rows, spec.batch_size)
        self._task = load_task(spec, num_outputs, data.y_train)
        self._augment = Augmentation(spec.augment, data.x_train)
        self._validation = Validation(self._task, num_outputs, data, worker.device)
        self._is_resting = False
        """An end of this call was wished for at the end of the epoch."""
        self._begin()

    def _begin(self) -> None:
        """A trial that has taken no step."""
        shape = output_shape(self._task, self._num_outputs, self.data.y_train)
        self._replica = Replica(
            self.trial, self.data.x_train.shape[1:], self._num_outputs, self._weights_seed, self.worker, shape
        )
        self._record, self._batch, self._step = Progress(), 0, 0
        self.best_weights: StateDict | None = None
        # of this epoch so far: the rows of this rank; the losses of all ranks, with fsdp those of this one
        self._ledger = SampleLedger(self._num_rows)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.worker.device)
        # for a snapshot, as of the last `_agree_on_totals`
        self._samples: Counts | None = None
        self._shard: Shard | None = None

    @property
    def module(self) -> torch.nn.Module:
        """The model, not wrapped."""
        return self._replica.module

    @property
    def progress(self) -> Progress:
        """The cursor. Inside an epoch its loss so far is that of the last checkpoint."""
        now: Progress = replace(self._record, batch=self._batch, step=self._step)
        return now

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def steps_per_epoch(self) -> int:
        return self._steps_per_epoch

    def weights_sha256(self) -> str:
        """Of the weights in the module now (`checkpoint.weights_sha256`); with fsdp collective, and rank 0's counts."""
        state = self.module.state_dict()
        return weights_sha256(fsdp.full_tensors(state) if self._replica.is_sharded else state)

    @property
    def has_buffers(self) -> bool:
        """Whether a step cut short by the loss of a peer may have changed the state: `restore` then, after `rebuild`.

        Batch norm counts a batch in its forward pass, before the step is sure to be taken; and with fsdp a part of the
        weights is lost with its rank.
        """
        return self._replica.is_sharded or any(buffer.is_floating_point() for buffer in self.module.buffers())

    def train_to(self, until_epoch: int) -> None:
        """Train until `until_epoch` epochs are complete, the trial ends before, or the hooks wish to stop.

        A wish to rest ends the call with the epoch under way. Returns with everything agreed that a `snapshot` of this
        moment needs.
        """
        self._replica.connect()
        self._is_resting = False
        if self.worker.rank == 0 and self._step == 0 and self._replica.misfits is not None:
            self.hooks.warn(self._replica.misfits)
        while self._record.ended is None and self._record.epoch < until_epoch and not self._is_resting:
            self.hooks.tick("data")
            if not self._train_epoch():
                break
        self.hooks.tick("report")
        self._agree_on_totals()

    def _train_epoch(self) -> bool:
        """From the cursor to the end of the epoch; False where a stop was wished before that."""
        spec, replica = self._spec, self._replica
        started, num_samples, save_at_end = time.perf_counter(), 0, False
        order = epoch_order(self._order_seed, self._record.epoch, self._num_rows)
        replica.train()
        for batch in range(self._batch, self._steps_per_epoch):
            self.hooks.tick("data")
            rows = global_batch(order, batch, spec.batch_size)
            weight = total_weight(self._task, self.data.y_train[rows])
            if replica.exact is None:
                loss = self._gradients(batch, rows, weight)
            else:
                loss = self._exact_gradients(replica.exact, batch, rows, weight)
            self.hooks.tick("step")
            rate = lr_factor(spec.schedule, self._step, spec.epochs * self._steps_per_epoch)
            with self._naming_the_rows():
                fault = replica.take_step(loss, rate * self._record.lr_scale)
            if fault is not None:
                self._on_non_finite(f"step {self._step + 1}: {fault} is not finite")
                return True
            self._ledger.commit()
            self._loss_sum += loss
            num_samples += len(rows)
            self._batch, self._step = batch + 1, self._step + 1

            self.hooks.tick("report")
            wish = self.hooks.exchange(self._step)
            self._is_resting = self._is_resting or wish.rest
            # the last step's checkpoint waits for the validation that belongs to it; who must go waits for nothing
            save_at_end = wish.save and self._batch == self._steps_per_epoch
            if wish.save and (wish.stop or not save_at_end):
                self.save()
            if wish.stop:
                return False
        self._end_epoch(num_samples, started)
        if save_at_end and self._record.ended is None:
            self.save()
        return True

    def _gradients(self, batch: int, rows: IndexArray, weight: float) -> torch.Tensor:
        """Leave the gradient of a global batch in `.grad`; returns its summed losses, with fsdp those of this rank."""
        worker, most = self.worker, self._spec.micro_batch_size
        share = worker_share(rows, worker.rank, worker.world_size)
        # the ranks' gradients are averaged; this makes it the mean over the global batch
        scale = worker.world_size / weight
        num_passes = 1
        if most is not None:  # from the largest share: all ranks make as many forward passes, some talk in them
            num_passes = math.ceil(len(worker_share(rows, 0, worker.world_size)) / most)
        *first, last = [share] if num_passes == 1 else np.array_split(share, num_passes)
        losses = []
        with self._replica.unsynchronised() if first else contextlib.nullcontext():
            for micro, part in enumerate(first):
                losses.append(self._pass(part, rows, scale, batch, worker.rank, micro))
        losses.append(self._pass(last, rows, scale, batch, worker.rank, num_passes - 1))
        return self._replica.average_gradients(losses[0] if not first else torch.stack(losses).sum())

    def _exact_gradients(self, exact: ExactGradients, batch: int, rows: IndexArray, weight: float) -> torch.Tensor:
        """As `_gradients`, in the same bits at any number of workers; returns the losses of the whole batch."""
        num_shards = self._spec.logical_shards
        shards = [rows_of_shard(rows, shard, num_shards) for shard in range(num_shards)]

        def compute(shard: int) -> torch.Tensor:
            num_passes = math.ceil(len(shards[shard]) / (self._spec.micro_batch_size or len(rows)))
            parts = [shards[shard]] if num_passes == 1 else np.array_split(shards[shard], num_passes)
            losses = [self._pass(part, rows, 1 / weight, batch, shard, micro) for micro, part in enumerate(parts)]
            return torch.stack(losses).sum(dim=0, keepdim=True)

        return exact.step(compute, [len(shard) for shard in shards])[0]

    def _pass(
        self, rows: IndexArray, batch_rows: IndexArray, scale: float, batch: int, part: int, micro: int
    ) -> torch.Tensor:
        """Forward and backward over some rows of a global batch; returns their summed losses (float64 scalar)."""
        if not len(rows):  # whoever has no rows still takes part in what the others do together
            with uncounted_rows(self.module):
                return self._pass(batch_rows[:2], batch_rows, 0.0, batch, part, micro)
        if scale:
            self._ledger.load(rows)
        self.hooks.tick("data")
        seed_generator(self.worker.device, step_seed(self._steps_seed, self._record.epoch, batch, part, micro))
        with self._naming_the_rows():
            passed = self._augment(self._load(self.data.x_train, rows), self._load(self.data.y_train, rows))
        self.hooks.tick("forward")

        def compute_losses(outputs: torch.Tensor) -> torch.Tensor:
            losses = passed.losses(lambda y: sample_losses(self._task, outputs, y))
            self.hooks.tick("backward")
            return losses

        with self._naming_the_rows():
            return self._replica.forward_and_backward(passed.x, compute_losses, scale)

    @contextlib.contextmanager
    def _naming_the_rows(self) -> Iterator[None]:
        """Where there is no memory inside the block, the error says how many rows the largest forward pass has."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            rows = self._largest_pass()
            line = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise OutOfMemory(f"out of memory in a forward pass of up to {rows} rows: {line}", rows) from error

    def _largest_pass(self) -> int:
        """Rows of the largest forward pass in training, over all ranks."""
        spec = self._spec
        rows = np.arange(min(spec.batch_size, self._num_rows), dtype=np.int64)
        num_parts = spec.logical_shards if spec.exact else self.worker.world_size
        share = (rows_of_shard if spec.exact else worker_share)(rows, 0, num_parts)
        num_passes = math.ceil(len(share) / (spec.micro_batch_size or len(share)))
        return math.ceil(len(share) / num_passes)

    def _end_epoch(self, num_samples: int, started: float) -> None:
        """Add up what the ranks counted, validate where it is due, decide whether the trial has ended, and report."""
        spec = self._spec
        self.hooks.tick("report")
        train_s = time.perf_counter() - started
        train_loss = float(self._total_loss()) / total_weight(self._task, self.data.y_train)
        lost, repeated = lost_and_repeated(self._ledger.total(self.worker))
        after = replace(
            self._record,
            epoch=self._record.epoch + 1,
            step=self._step,
            samples_lost=self._record.samples_lost + lost,
            samples_repeated=self._record.samples_repeated + repeated,
            epoch_loss_sum=0.0,
            epoch_samples=0,
        )
        is_last, fault = after.epoch >= spec.epochs, None
        if is_last or after.epoch % spec.val_every == 0:
            metrics = self.evaluate()
            self.hooks.tick("save")
            fault = next((name for name, value in metrics.items() if not math.isfinite(value)), None)
            if fault is None:
                after = validated(after, metrics, spec)
                if after.best_epoch == after.epoch:
                    self.best_weights = self._replica.weights_to_keep()
        if is_last:
            after = replace(after, ended="finished")
        elif spec.patience is not None and after.validations_since_best >= spec.patience:
            after = replace(after, ended="stopped early")
        self._record, self._batch = after, 0
        self._ledger.reset()
        self._loss_sum.zero_()
        self.hooks.tick("report")
        if fault is not None:
            self._on_non_finite(f"step {self._step}: {fault} is not finite")
        else:
            self._report(train_loss, num_samples / train_s, time.perf_counter() - started)

    def _on_non_finite(self, reason: str) -> None:
        """End the trial as diverged, or go back to the last checkpoint and on from there with a lower rate."""
        policy, record = self._spec.on_non_finite, self._record
        self._ledger.discard()
        self._replica.drop_gradients()
        if policy.policy == "stop" or record.rollbacks >= policy.max_rollbacks:
            self._record = replace(record, ended="diverged", metrics={})
            self._report(math.nan, 0.0, 0.0, reason)
            return
        checkpoint = self.hooks.restore_last()
        if checkpoint is None:
            self._begin()
            self._replica.connect()
        else:
            self.restore(checkpoint)
        lr_scale = record.lr_scale * policy.lr_factor
        self._record = replace(self._record, rollbacks=record.rollbacks + 1, lr_scale=lr_scale)
        if self.worker.rank == 0:
            self.hooks.warn(f"{reason}; going back to step {self._step} with {lr_scale:g} x the learning rate")

    def _report(self, train_loss: float, samples_per_s: float, epoch_s: float, reason: str | None = None) -> None:
        """`samples_per_s` is that of training, `epoch_s` holds validation too; `reason` says why a trial diverged."""
        if self.worker.rank != 0:
            return
        progress = self.progress
        self.hooks.on_epoch(
            {
                "epoch": progress.epoch,
                "step": progress.step,
                "train_loss": train_loss,
                "samples_per_s": samples_per_s,
                "epoch_s": epoch_s,
                "metrics": progress.metrics,
                "best_epoch": progress.best_epoch,
                "best_metrics": progress.best_metrics,
                "samples_lost": progress.samples_lost,
                "samples_repeated": progress.samples_repeated,
                "ended": progress.ended,
                "reason": reason,
            }
        )

    def evaluate(self) -> dict[str, float]:
        """Validation metrics of the current weights, averaged ones where the trial has them; the same on each rank."""

        def forward(rows: IndexArray, chunk: int) -> torch.Tensor:
            self.hooks.tick("validation")
            seed_generator(self.worker.device, step_seed(self._steps_seed, chunk))
            return self._replica.predict(self._load(self.data.x_val, rows)).float()

        with self._replica.evaluating():
            return self._validation.measure(forward, self.worker, same_passes=self._replica.is_sharded)

    def seconds_a_row(self) -> float:
        """Median time to predict one row with the weights of now (every rank, since buffers are made equal first)."""
        row = self._load(self.data.x_val, np.zeros(1, dtype=np.int64))
        times = []
        with self._replica.evaluating():
            for _ in range(_TIMED_ROWS):
                started = time.perf_counter()
                self._replica.predict(row).cpu()
                times.append(time.perf_counter() - started)
        return statistics.median(times)

    def save(self) -> None:
        """Have a checkpoint of this moment made, between two steps (every rank)."""
        self.hooks.tick("save")
        self._agree_on_totals()
        if self.worker.rank == 0 or self._replica.is_sharded:
            self.hooks.on_checkpoint(self.snapshot)

    def _agree_on_totals(self) -> None:
        """What a snapshot holds and only all ranks together know; collective."""
        self._note_totals(self._ledger.total(self.worker) if self._batch else None, float(self._total_loss()))
        self._shard = fsdp.new_shard(self.worker) if self._replica.is_sharded else None

    def _note_totals(self, samples: Counts | None, loss_sum: float) -> None:
        self._samples = samples
        num_samples = min(self._batch * self._spec.batch_size, self._num_rows)
        self._record = replace(self._record, epoch_loss_sum=loss_sum, epoch_samples=num_samples)

    def snapshot(self, buffers: SnapshotBuffers) -> Snapshot:
        """Copies of everything needed to go on from here (rank 0; with fsdp each rank's part).

        No collective: call it in `LoopHooks.on_checkpoint`, after `train_to` has returned, or after `rebuild`. The
        weights of the best epoch are in it on the rank that has them.
        """
        tensors = self._replica.state()
        if self.worker.rank == 0 or not self._replica.is_sharded:
            if self.best_weights is not None and self._record.best_step != self._step:
                tensors["best"] = self.best_weights
            if self._samples is not None:
                tensors["samples"] = {"counts": torch.from_numpy(self._samples)}
        copies = {stem: buffers.copy(stem, state) for stem, state in tensors.items()}
        return Snapshot(self.progress, copies, self._shard)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint of the same trial (every rank).

        Raises:
            StorageError: its tensors are not those of this model.
        """
        self._record = checkpoint.progress
        self._batch, self._step = self._record.batch, self._record.step
        if checkpoint.is_record:  # of an ended trial: there is nothing to go on with
            return
        self._replica.load_state(checkpoint)
        is_first = self.worker.rank == 0
        self.best_weights = None
        if self._record.best_metrics and (is_first or (self.worker.rank == 1 and not self._replica.is_sharded)):
            self.best_weights = checkpoint.tensors(checkpoint.best_file())
        samples = checkpoint.tensors("samples")
        self._go_on_counting(self._planned_counts() if samples is None else samples["counts"].numpy())
        self._loss_sum.fill_(self._record.epoch_loss_sum if is_first or not self._replica.is_sharded else 0.0)

    def rebuild(self, worker: Worker) -> None:
        """Go on in a new process group, of any size, after a worker was lost (every rank that is left).

        Keeps module, optimizer and cursor: a step cut short is taken again. What the lost rank had counted in this
        epoch went with it. Its rows are in the gradients of every step that the others completed, so all rows of those
        steps count as taken once. With fsdp a part of the weights is missing: the trial begins anew, and wants a
        `restore`.
        """
        self.worker = worker
        if self._replica.is_sharded:
            self._begin()
            return
        self._replica.disconnect(worker)
        self._go_on_counting(self._planned_counts())
        self._note_totals(self._samples, float(self._loss_sum))

    def _go_on_counting(self, counts: Counts) -> None:
        """What all ranks had counted together goes on as rank 0's."""
        self._samples = counts if self._batch else None
        self._ledger.reset(counts if self.worker.rank == 0 else None)

    def _planned_counts(self) -> Counts:
        """Each row of the completed steps of this epoch once."""
        counts = np.zeros(self._num_rows, dtype=np.uint8)
        counts[self._completed_rows()] = 1
        return counts

    def _completed_rows(self) -> IndexArray:
        """Rows of the completed steps of this epoch."""
        order = epoch_order(self._order_seed, self._record.epoch, self._num_rows)
        return order[: self._batch * self._spec.batch_size]

    def _total_loss(self) -> torch.Tensor:
        """Summed losses of this epoch so far, over all ranks."""
        total = self._loss_sum.clone()
        if self._replica.is_sharded and self.worker.world_size > 1:
            dist.all_reduce(total)
        return total

    def _load(self, array: NDArray[Any] | RowFile, rows: IndexArray) -> torch.Tensor:
        """Copy rows out of the shared read-only array, or the file, and onto the device.

        Into torch's memory, not numpy's: kernels give the same bits at addresses of the same alignment.
        """
        is_on_gpu = self.worker.device.type == "cuda"
        tensor = torch.empty((len(rows), *array.shape[1:]), dtype=_DTYPES[array.dtype], pin_memory=is_on_gpu)
        array.take(rows, axis=0, out=tensor.numpy(), mode="clip")
        # torch gives pinned memory out again only once the copies from it that are under way have ended
        return tensor.to(self.worker.device, non_blocking=True) if is_on_gpu else tensor


_DTYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.int64): torch.int64, np.dtype(np.int8): torch.int8}

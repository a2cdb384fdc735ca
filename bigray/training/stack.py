"""Training several trials of one model in one process, stacked: each step is one step of all of them (worker).

The lanes of a stack differ in learning rate, weight decay and momentum only; they begin at the same weights and see the
same rows in the same order, as each trial alone does. So every lane's curve is that of its trial alone, up to the
rounding of sums taken in another order. What a lane records (epochs, best weights, patience, a divergence) is what
`loop.TrialTraining` records; it can be handed over from one to the other at the end of any epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from bigray.data.batches import IndexArray, epoch_order, global_batch, steps_per_epoch
from bigray.data.dataset import TrainingArrays
from bigray.data.row_file import RowFile
from bigray.errors import StorageError, last_line
from bigray.models import build_model
from bigray.specs import TrialSpec
from bigray.training.best_epoch import validated
from bigray.training.checkpoint import Checkpoint, Progress, StateDict
from bigray.training.commands import Wish
from bigray.training.loop import Worker
from bigray.training.optimization import lr_factor
from bigray.training.replica import seed_generator
from bigray.training.stack_checkpoint import state_of
from bigray.training.stack_key import stack_key
from bigray.training.stack_refusal import why_not_stacked
from bigray.training.stacked_loss import make_loss
from bigray.training.stacked_network import make_network
from bigray.training.stacked_optimizer import StackedOptimizer
from bigray.training.stacked_validation import StackedValidation
from bigray.training.tasks import load_task, total_weight

__all__ = ["LaneState", "StackHooks", "StackedTraining", "stack_key", "why_not_stacked"]

LaneState = dict[str, StateDict]
"""Stem of a checkpoint's file ("model", "optimizer", "best") -> tensors, as of the trial alone."""


class StackHooks(Protocol):
    """What a stack tells and asks of the process it runs in. Ranks train apart: none of these may be collective."""

    def tick(self, phase: str) -> None:
        """As `LoopHooks.tick`."""

    def exchange(self, step: int) -> Wish:
        """After each step. `stop`: leave at once, without what could be saved. `rest`: return at the epoch's end."""

    def on_epoch(self, lane: int, report: dict[str, Any]) -> None:
        """A lane has completed an epoch, or ended inside it; the report is that of `LoopHooks.on_epoch`."""


class StackedTraining:
    """The lanes of one process. It holds its own lanes only, and talks to no other rank."""

    def __init__(
        self,
        lanes: Sequence[TrialSpec],
        data: TrainingArrays,
        num_outputs: int,
        worker: Worker,
        hooks: StackHooks,
    ) -> None:
        """`lanes` have the same `stack_key`, and `why_not_stacked` has nothing against any of them."""
        assert len({stack_key(trial) for trial in lanes}) == 1, "the lanes of a stack have one stack_key"
        self.lanes, self.data, self.worker, self.hooks = tuple(lanes), data, worker, hooks
        trial = lanes[0]
        self._spec = spec = trial.training
        self._order_seed = trial.seed if spec.seeds.order is None else spec.seeds.order
        self._num_rows = len(data.x_train)
        self._steps_per_epoch = steps_per_epoch(self._num_rows, spec.batch_size)
        self._task = load_task(spec, num_outputs, data.y_train)
        self._loss = make_loss(spec, self._task, num_outputs, data.y_train)
        self._validation = StackedValidation(spec, self._task, num_outputs, data, worker.device)
        seed_generator(worker.device, trial.seed if spec.seeds.weights is None else spec.seeds.weights)
        module = build_model(trial.model.factory, trial.model.params, data.x_train.shape[1:], num_outputs)
        self._module = module.to(worker.device)
        trainable = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        self._constants = {name: t for name, t in module.state_dict().items() if name not in trainable}
        self._begin(trainable)

    def _begin(self, trainable: Mapping[str, torch.Tensor]) -> None:
        num_lanes = len(self.lanes)
        self._rows = list(range(num_lanes))
        """The lane that each row of the stacked tensors is of; ended lanes have none."""
        self._records = [Progress() for _ in self.lanes]
        self._ended: dict[int, LaneState | None] = {}
        """What is left of lanes that have ended; None where that is the record alone."""
        self._parameters = {name: _repeated(tensor, num_lanes) for name, tensor in trainable.items()}
        self._optimizer = StackedOptimizer([trial.training for trial in self.lanes], self._parameters)
        self._best = {name: torch.zeros_like(tensor) for name, tensor in self._parameters.items()}
        self._loss_sums = torch.zeros(num_lanes, dtype=torch.float64, device=self.worker.device)
        self._epoch, self._batch, self._step = 0, 0, 0
        self._connect()

    def _connect(self) -> None:
        self._network = make_network(
            self._module, self._parameters, self._optimizer.gradients, self._loss, self.data.x_train.shape[1:]
        )

    @property
    def num_parameters(self) -> int:
        """Of one lane."""
        return sum(parameter.numel() for parameter in self._module.parameters())

    @property
    def steps_per_epoch(self) -> int:
        return self._steps_per_epoch

    def progresses(self) -> list[Progress]:
        """The cursor and record of each lane. Inside an epoch those of lanes that go on lack its loss so far."""
        live = set(self._rows)
        return [
            replace(record, batch=self._batch, step=self._step) if lane in live else record
            for lane, record in enumerate(self._records)
        ]

    def lane_state(self, lane: int) -> LaneState | None:
        """A lane's tensors as the trial alone would save them, live; None where only its record is left."""
        if lane in self._ended:
            return self._ended[lane]
        return self._row_state(self._rows.index(lane))

    def restore(self, checkpoints: Sequence[Checkpoint | None]) -> None:
        """Bring each lane to its own ordinary checkpoint; None is a lane that begins. All are at one end of an epoch.

        Raises:
            StorageError: the tensors are not those of this model.
        """
        assert len(checkpoints) == len(self.lanes), "one for each lane"
        for lane, checkpoint in enumerate(checkpoints):
            if checkpoint is not None:
                self._restore_lane(lane, checkpoint)
        live = [lane for lane in self._rows if self._records[lane].ended is None]
        places = {(self._records[lane].epoch, self._records[lane].batch, self._records[lane].step) for lane in live}
        assert len(places) <= 1, f"the lanes of a stack are at one place, not at {sorted(places)}"
        self._epoch, self._batch, self._step = places.pop() if places else (0, 0, 0)
        assert self._batch == 0, "the lanes of a stack are at the end of an epoch"
        self._drop([lane for lane in self._rows if self._records[lane].ended is not None])

    def is_done(self, epoch: int) -> bool:
        """Whether `train_to` that epoch has nothing to do."""
        return not self._rows or self._epoch >= epoch

    def train_to(self, until_epoch: int) -> bool:
        """Train until `until_epoch` epochs are complete or all lanes have ended.

        Returns early at the end of an epoch where the hooks wish to rest, and at once where they wish to stop: False
        then, and there is nothing worth saving.
        """
        is_resting = False
        while not self.is_done(until_epoch) and not is_resting:
            wish = self._train_epoch()
            if wish.stop:
                return False
            is_resting = wish.rest
        self.hooks.tick("report")
        return True

    def _train_epoch(self) -> Wish:
        spec, hooks, rest = self._spec, self.hooks, False
        started = time.perf_counter()
        hooks.tick("data")
        order = epoch_order(self._order_seed, self._epoch, self._num_rows)
        for batch in range(self._batch, self._steps_per_epoch):
            hooks.tick("data")
            rows = global_batch(order, batch, spec.batch_size)
            weight = total_weight(self._task, self.data.y_train[rows])
            x, y = self._load(self.data.x_train, rows), self._load(self.data.y_train, rows)
            hooks.tick("forward")
            losses = self._network.gradients(x, y, 1 / weight)
            hooks.tick("step")
            self._take_step(losses)
            if not self._rows:
                return Wish()
            self._batch, self._step = batch + 1, self._step + 1
            hooks.tick("report")
            wish = hooks.exchange(self._step)
            if wish.stop:
                return wish
            rest = rest or wish.rest
        self._end_epoch(started)
        return Wish(rest=rest)

    def _take_step(self, losses: torch.Tensor) -> None:
        """Change the weights. A lane whose loss or gradient is not finite ends instead, with the weights it has."""
        if not self._is_all_finite(losses):
            losses = self._end_diverged(losses)
            if not self._rows:
                return
        if self._spec.clip_norm is not None:
            self._clip(self._gradient_norms(), self._spec.clip_norm)
        factor = lr_factor(self._spec.schedule, self._step, self._spec.epochs * self._steps_per_epoch)
        self._optimizer.step([factor * self._records[lane].lr_scale for lane in self._rows])
        self._loss_sums += losses

    def _is_all_finite(self, losses: torch.Tensor) -> bool:
        """Whether no loss and no gradient is NaN or infinite, of all lanes at once; False too where a sum overflows."""
        norms = torch._foreach_norm(self._optimizer.gradients)
        return math.isfinite(torch.stack([losses.sum(), *norms]).sum().item())

    def _gradient_norms(self) -> torch.Tensor:
        """(parameters, lanes)"""
        gradients = self._optimizer.gradients
        return torch.stack([torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients])

    def _clip(self, norms: torch.Tensor, most: float) -> None:
        factors = (most / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
        for gradient in self._optimizer.gradients:
            gradient.mul_(factors.view(-1, *(1 for _ in gradient.shape[1:])))

    def _end_diverged(self, losses: torch.Tensor) -> torch.Tensor:
        """End the lanes whose step cannot be taken, where there are any; returns the losses of the others."""
        are_finite, names = losses.isfinite().tolist(), list(self._parameters)
        diverged: dict[int, str] = {}
        for row, norms in enumerate(self._gradient_norms().isfinite().t().tolist()):
            if not are_finite[row]:
                diverged[self._rows[row]] = "loss"
            elif not all(norms):
                diverged[self._rows[row]] = f"gradient of '{names[norms.index(False)]}'"
        kept = [row for row, lane in enumerate(self._rows) if lane not in diverged]
        for lane in diverged:
            self._records[lane] = replace(
                self._records[lane],
                batch=self._batch,
                step=self._step,
                epoch_loss_sum=float(self._loss_sums[self._rows.index(lane)]),
                epoch_samples=min(self._batch * self._spec.batch_size, self._num_rows),
                ended="diverged",
                metrics={},
            )
        self._drop(list(diverged))
        for lane, fault in diverged.items():
            self._report(lane, math.nan, 0.0, 0.0, f"step {self._step + 1}: {fault} is not finite")
        return losses[kept]

    def _end_epoch(self, started: float) -> None:
        """Validate where it is due, decide which lanes have ended, and report."""
        spec, hooks = self._spec, self.hooks
        hooks.tick("report")
        train_s = time.perf_counter() - started
        train_losses = (self._loss_sums / total_weight(self._task, self.data.y_train)).tolist()
        self._loss_sums.zero_()
        self._epoch, self._batch = self._epoch + 1, 0
        measured: list[dict[str, float]] | None = None
        if self._epoch >= spec.epochs or self._epoch % spec.val_every == 0:
            hooks.tick("validation")
            measured = self._validation.measure(self._network, len(self._rows))
        hooks.tick("save")
        faults = self._record_epoch(measured)
        hooks.tick("report")
        rows = self._rows
        self._drop([lane for lane in rows if self._records[lane].ended is not None])
        epoch_s = time.perf_counter() - started
        for lane, train_loss in zip(rows, train_losses, strict=True):
            if lane in faults:
                self._report(lane, math.nan, 0.0, 0.0, f"step {self._step}: {faults[lane]} is not finite")
            else:
                self._report(lane, train_loss, self._num_rows / train_s, epoch_s)

    def _record_epoch(self, measured: list[dict[str, float]] | None) -> dict[int, str]:
        """Bring the records of all lanes that go on to the end of the epoch; returns those with an odd metric."""
        faults, improved = {}, []
        for row, lane in enumerate(self._rows):
            after = replace(
                self._records[lane],
                epoch=self._epoch,
                batch=0,
                step=self._step,
                epoch_loss_sum=0.0,
                epoch_samples=0,
            )
            if measured is not None:
                fault = next((name for name, value in measured[row].items() if not math.isfinite(value)), None)
                if fault is None:
                    after = validated(after, measured[row], self._spec)
                    if after.best_epoch == self._epoch:
                        improved.append(row)
                else:
                    faults[lane] = fault
            self._records[lane] = self._ended_if_due(after, lane in faults)
        self._keep_best(improved)
        return faults

    def _ended_if_due(self, progress: Progress, has_fault: bool) -> Progress:
        spec = self._spec
        if has_fault:
            return replace(progress, ended="diverged", metrics={})
        if progress.epoch >= spec.epochs:
            return replace(progress, ended="finished")
        if spec.patience is not None and progress.validations_since_best >= spec.patience:
            return replace(progress, ended="stopped early")
        return progress

    def _keep_best(self, rows: list[int]) -> None:
        if len(rows) == len(self._rows):
            for name, tensor in self._parameters.items():
                self._best[name].copy_(tensor)
        elif rows:
            index = torch.tensor(rows, device=self.worker.device)
            for name, tensor in self._parameters.items():
                self._best[name].index_copy_(0, index, tensor.index_select(0, index))

    def _drop(self, lanes: Sequence[int]) -> None:
        """Take lanes that have ended out of the stacked tensors, and put aside what is left of them."""
        if not lanes:
            return
        for lane in lanes:
            if lane not in self._ended:
                state = self._row_state(self._rows.index(lane))
                self._ended[lane] = {stem: _copied(tensors) for stem, tensors in state.items()}
        gone = set(lanes)
        kept = [row for row, lane in enumerate(self._rows) if lane not in gone]
        index = torch.tensor(kept, dtype=torch.int64, device=self.worker.device)
        self._rows = [self._rows[row] for row in kept]
        self._parameters = {name: tensor.index_select(0, index) for name, tensor in self._parameters.items()}
        self._best = {name: tensor.index_select(0, index) for name, tensor in self._best.items()}
        self._loss_sums = self._loss_sums.index_select(0, index)
        self._optimizer.keep(index, self._parameters)
        if self._rows:
            self._connect()

    def _row_state(self, row: int) -> LaneState:
        record = self._records[self._rows[row]]
        state = {
            "model": {name: tensor[row] for name, tensor in self._parameters.items()} | self._constants,
            "optimizer": self._optimizer.state(row),
        }
        step = self._step if record.ended is None else record.step
        if record.best_metrics and record.best_step != step:
            state["best"] = {name: tensor[row] for name, tensor in self._best.items()} | self._constants
        return state

    def _restore_lane(self, lane: int, checkpoint: Checkpoint) -> None:
        row = self._rows.index(lane)
        self._records[lane] = progress = checkpoint.progress
        if progress.ended is not None:
            self._ended[lane] = state_of(checkpoint)
            return
        try:
            self._load_weights(self._parameters, row, checkpoint.tensors("model") or {})
            self._optimizer.load(row, checkpoint.tensors("optimizer") or {})
            if progress.best_metrics:
                self._load_weights(self._best, row, checkpoint.tensors(checkpoint.best_file()) or {})
        except (RuntimeError, LookupError, ValueError, StorageError) as error:
            place = checkpoint.place or f"checkpoint of step {progress.step}"
            name = self.lanes[lane].model_name
            raise StorageError(f"{place}: does not fit model '{name}': {last_line(error)}") from error

    def _load_weights(self, stacked: Mapping[str, torch.Tensor], row: int, weights: StateDict) -> None:
        if odd := set(weights) ^ (set(stacked) | set(self._constants)):
            raise StorageError(f"tensor '{min(odd)}' is only on one side")
        for name, tensor in weights.items():
            if name in stacked:
                if stacked[name].shape[1:] != tensor.shape:
                    raise StorageError(
                        f"'{name}': expected {tuple(stacked[name].shape[1:])}, found {tuple(tensor.shape)}"
                    )
                stacked[name][row].copy_(tensor)
            elif not torch.equal(self._constants[name].cpu(), tensor):
                raise StorageError(f"'{name}' is the same in all lanes of a stack, and here another")

    def _report(
        self, lane: int, train_loss: float, samples_per_s: float, epoch_s: float, reason: str | None = None
    ) -> None:
        """`samples_per_s` and `epoch_s` are by the clock, in which all lanes were trained."""
        record = self._records[lane]
        self.hooks.on_epoch(
            lane,
            {
                "epoch": record.epoch,
                "step": record.step,
                "train_loss": train_loss,
                "samples_per_s": samples_per_s,
                "epoch_s": epoch_s,
                "metrics": record.metrics,
                "best_epoch": record.best_epoch,
                "best_metrics": record.best_metrics,
                "samples_lost": record.samples_lost,
                "samples_repeated": record.samples_repeated,
                "ended": record.ended,
                "reason": reason,
            },
        )

    def _load(self, array: NDArray[Any] | RowFile, rows: IndexArray) -> torch.Tensor:
        """Rows of a shared read-only array or of a file, on the device."""
        tensor = torch.from_numpy(array.take(rows, axis=0, mode="clip"))
        return tensor if self.worker.device.type == "cpu" else tensor.pin_memory().to(self.worker.device)


def _repeated(tensor: torch.Tensor, num_lanes: int) -> torch.Tensor:
    return tensor.expand(num_lanes, *tensor.shape).clone(memory_format=torch.contiguous_format)


def _copied(tensors: StateDict) -> StateDict:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

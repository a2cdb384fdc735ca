"""A worker's copy of the model in training: module, optimizer, averaged weights, loss scale.

Also how its gradients meet those of the other workers: DDP, sharded parameters (`fsdp.py`) or `exact.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bigray.errors import StorageError, TrainingFailed, last_line
from bigray.models import build_model
from bigray.models.transfer import start_from
from bigray.specs import TrialSpec
from bigray.training import fsdp
from bigray.training.averaging import AveragedGradients, fit_in_one_message
from bigray.training.batchnorm import convert_sync_batchnorm
from bigray.training.checkpoint import Checkpoint, StateDict, pack_optimizer, unpack_optimizer
from bigray.training.exact import ExactGradients
from bigray.training.optimization import (
    Ema,
    clip_gradients,
    first_non_finite,
    load_scaler,
    make_optimizer,
    make_scaler,
    scaler_state,
    set_lr,
)
from bigray.training.recomputation import recompute_blocks

if TYPE_CHECKING:
    from bigray.training.loop import Worker

_LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


class _WithBatchLoss(torch.nn.Module):
    """A network for DDP with one parameter more, whose gradient is the loss: DDP then averages that too."""

    def __init__(self, network: torch.nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.loss = torch.nn.Parameter(torch.zeros(1, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.network(x)
        return outputs


class Replica:
    """Every rank makes the same calls in the same order."""

    exact: ExactGradients | None
    """Set while connected, where the trial is exact."""

    def __init__(
        self,
        trial: TrialSpec,
        input_shape: tuple[int, ...],
        num_outputs: int,
        seed: int,
        worker: Worker,
        output_shape: tuple[int, ...] | None = None,
    ) -> None:
        """With fsdp this is collective; otherwise `connect` is the first call that other ranks take part in.

        `output_shape` is what the model has to return for a row; default: (num_outputs,).
        """
        self._trial, self._spec, self._worker = trial, trial.training, worker
        self._output_shape = (num_outputs,) if output_shape is None else output_shape
        self.is_sharded = self._spec.strategy == "fsdp"
        seed_generator(worker.device, seed)
        module = build_model(trial.model.factory, trial.model.params, input_shape, num_outputs)
        # a trial that goes on takes its checkpoint's weights after this
        self.misfits = start_from(module, trial.model)
        """A line about what of the file of weights does not fit, where something does not."""
        if not self.is_sharded:
            module = module.to(worker.device)
        if self._spec.sync_batchnorm:
            module = convert_sync_batchnorm(module)
        if self._spec.gradient_checkpointing:
            recompute_blocks(module)
        if self.is_sharded:
            module = fsdp.shard_module(module, worker, self._spec.precision)
        self.module = module
        self._network = _compiled(module, trial) if self._spec.compile else module
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._optimizer = make_optimizer(self._spec, module)
        self._scaler = make_scaler(self._spec.precision, worker.device)
        self._ema = None if self._spec.ema_decay is None else Ema(module, self._spec.ema_decay)
        self._wrapped: torch.nn.Module | None = None
        self._batch_loss: torch.nn.Parameter | None = None
        self._averaging: AveragedGradients | None = None
        self.exact = None

    def connect(self) -> None:
        """Join the process group of now, once. All ranks get the weights of rank 0."""
        if self._wrapped is not None:
            return
        spec, worker = self._spec, self._worker
        self._wrapped = self._network
        if worker.world_size > 1 and not self.is_sharded:
            _copy_from_rank_0(self.module)
        if spec.exact:
            self.exact = ExactGradients(self.module, spec.logical_shards, worker.rank, worker.world_size, worker.device)
        elif worker.world_size > 1 and not self.is_sharded:
            if fit_in_one_message(self.module):
                self._averaging = AveragedGradients(self._parameters, worker.world_size)
            else:
                self._wrap_in_ddp()

    def _wrap_in_ddp(self) -> None:
        device = self._worker.device
        network = _WithBatchLoss(self._network, device)
        self._batch_loss = network.loss
        device_ids = [device] if device.type == "cuda" else None
        self._wrapped = DistributedDataParallel(
            network, device_ids=device_ids, gradient_as_bucket_view=True, init_sync=False
        )

    def disconnect(self, worker: Worker) -> None:
        """Leave a process group that is no more; `connect` joins the new one as `worker`."""
        self._worker, self._wrapped, self.exact = worker, None, None
        self._batch_loss, self._averaging = None, None
        self.drop_gradients()

    def train(self) -> None:
        assert self._wrapped is not None, "connect first"
        self._wrapped.train()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Validation mode, with the weights that count: averaged ones, and rank 0's batch norm statistics."""
        if self._worker.world_size > 1 and not self._spec.exact:  # with exact they are equal
            for buffer in self.module.buffers():
                dist.broadcast(buffer, src=0)
        self.module.eval()
        averaged = contextlib.nullcontext() if self._ema is None else self._ema.applied()
        with averaged, torch.no_grad() if self.is_sharded else torch.inference_mode():
            yield

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, *output_shape) without gradients, in `evaluating`. Not compiled: it would be compiled once more."""
        return self._forward(self.module, x)

    def forward_and_backward(
        self, x: torch.Tensor, compute_losses: Callable[[torch.Tensor], torch.Tensor], scale: float
    ) -> torch.Tensor:
        """Add the gradient of `scale` times the sum of these rows' losses to `.grad`; returns that sum, in float64.

        `compute_losses` gives (rows,) from the outputs. With a scale of 0 this takes part in what the other ranks do,
        and nothing more.
        """
        assert self._wrapped is not None, "connect first"
        try:
            losses = compute_losses(self._forward(self._wrapped, x))
            total = losses.detach().sum()
            # times 0, a loss that is NaN or infinite is NaN: it then reaches every gradient, and with them every rank
            gradient = total.mul(0.0).add_(scale).expand_as(losses)
            roots, gradients = [losses], [self._scaler.scale(gradient)]
            if self._batch_loss is not None:
                roots.append(self._batch_loss)
                gradients.append(total.float().reshape(1) if scale else torch.zeros_like(self._batch_loss))
            torch.autograd.backward(roots, gradients)
        except Exception as error:
            if not _is_compiler_error(error):
                raise
            raise TrainingFailed(_no_compile(self._trial, error)) from error
        return total.double() if scale else total.new_zeros((), dtype=torch.float64)

    def unsynchronised(self) -> contextlib.AbstractContextManager[None]:
        """For all micro-batches but the last: their gradients stay on this rank (sharded ones are added up sharded)."""
        if isinstance(self._wrapped, DistributedDataParallel):
            return self._wrapped.no_sync()
        return contextlib.nullcontext()

    def average_gradients(self, own_loss: torch.Tensor) -> torch.Tensor:
        """After the last backward pass of a step, where DDP or fsdp has not done it already.

        Returns the summed losses of the global batch, with fsdp those of this rank.
        """
        if self._averaging is not None:
            return self._averaging.average(own_loss)
        if self._batch_loss is not None and self._batch_loss.grad is not None:
            return self._batch_loss.grad[0].double() * self._worker.world_size
        return own_loss

    def take_step(self, loss: torch.Tensor, lr_factor: float) -> str | None:
        """Change the weights. Where the loss or a gradient is not finite, change nothing and name it, on all ranks.

        `loss` is that of the global batch, with fsdp this rank's part of it.
        """
        scaler = self._scaler
        scaler.unscale_(self._optimizer)
        fault = self._non_finite(loss)
        if fault is not None and not self._is_overflow(fault):
            return fault
        if fault is None and self._spec.clip_norm is not None:
            clip_gradients(self._parameters, self._spec.clip_norm)
        set_lr(self._optimizer, lr_factor)
        scaler.step(self._optimizer)  # leaves the step out after an overflow
        scaler.update()
        self.drop_gradients()
        if self._ema is not None and fault is None:
            self._ema.update()
        return None

    def drop_gradients(self) -> None:
        """Forget those of a step, taken or not."""
        if self._averaging is not None:
            self._averaging.clear()
            return
        for parameter in self._parameters:
            parameter.grad = None
        if self._batch_loss is not None:
            self._batch_loss.grad = None

    def state(self) -> dict[str, StateDict]:
        """Live tensors by file of a checkpoint; with fsdp this rank's part. No collective."""
        if self.is_sharded:
            model, optimizer = fsdp.local_tensors(self.module, self._optimizer)
        else:
            model, optimizer = self.module.state_dict(), pack_optimizer(self._optimizer)
        tensors = {"model": model, "optimizer": optimizer}
        if self._ema is not None:
            tensors["ema"] = fsdp.local_parts(self._ema.state()) if self.is_sharded else self._ema.state()
        scale = scaler_state(self._scaler)
        if scale and (self._worker.rank == 0 or not self.is_sharded):
            tensors["scaler"] = scale
        return tensors

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Take back what `state` gave. With fsdp collective, from any number of parts.

        Raises:
            StorageError: the tensors are not those of this model.
        """
        self.drop_gradients()
        try:
            if self.is_sharded:
                self._load_sharded(checkpoint)
            else:
                self._load_whole(checkpoint)
        except (RuntimeError, LookupError, ValueError) as error:
            place = checkpoint.place or f"checkpoint of step {checkpoint.progress.step}"
            raise StorageError(f"{place}: does not fit model '{self._trial.model_name}': {last_line(error)}") from error
        load_scaler(self._scaler, checkpoint.tensors("scaler") or {})

    def weights_to_keep(self) -> StateDict | None:
        """A copy of the weights that count, whole, on the CPU of ranks 0 and 1, so that one may be lost.

        None on the others. With fsdp collective, and on rank 0 alone.
        """
        weights = self.module.state_dict() if self._ema is None else self._ema.state()
        if self.is_sharded:
            return fsdp.full_tensors(weights) or None
        if self._worker.rank > 1:
            return None
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}

    def _load_whole(self, checkpoint: Checkpoint) -> None:
        self.module.load_state_dict(checkpoint.tensors("model") or {})
        unpack_optimizer(self._optimizer, checkpoint.tensors("optimizer") or {})
        if self._ema is not None:
            self._ema.load(checkpoint.tensors("ema") or {})

    def _load_sharded(self, checkpoint: Checkpoint) -> None:
        fsdp.load_tensors(self.module, self._optimizer, checkpoint.files)
        if self._ema is not None:
            fsdp.load_into(self._ema.state(), checkpoint.files, "ema")

    def _non_finite(self, loss: torch.Tensor) -> str | None:
        """What is NaN or infinite. The gradients are equal on all ranks, or sharded."""
        if self.is_sharded:
            found = first_non_finite(self.module, torch.zeros_like(loss))
        else:
            found = None if self._are_gradients_finite() else "norm of the gradients"
        if found is None:
            return None
        if self.is_sharded and self._worker.world_size > 1:  # seldom: ask all ranks whose loss it was
            loss = loss.clone()
            dist.all_reduce(loss)
        return first_non_finite(self.module, loss) or found

    def _are_gradients_finite(self) -> bool:
        if self._averaging is not None:
            return self._averaging.are_finite()
        norms = torch._foreach_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._worker.device.type != "cpu":  # wait for the device once
            norms = (torch.stack(list(norms)).sum(),)
        return math.isfinite(sum(norm.item() for norm in norms))

    def _is_overflow(self, fault: str) -> bool:
        """Whether the scaled gradients of fp16 were too large: to be expected, the scaler then scales less."""
        return self._scaler.is_enabled() and fault != "loss" and self._scaler.get_scale() > 1.0

    def _forward(self, network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            outputs: torch.Tensor = network(x)
        if outputs.shape != (len(x), *self._output_shape):
            raise TrainingFailed(
                f"model '{self._trial.model_name}': returned shape {tuple(outputs.shape)} for {len(x)} rows, "
                f"expected {(len(x), *self._output_shape)}"
            )
        return outputs

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        precision = self._spec.precision
        if precision == "fp32" or self.is_sharded:  # sharded modules have the precision in them
            return contextlib.nullcontext()
        return torch.autocast(self._worker.device.type, dtype=_LOW_PRECISION[precision])


def seed_generator(device: torch.device, seed: int) -> None:
    """Seed the one generator this worker draws from.

    `torch.manual_seed` seeds those of every kind of accelerator, present or not: 1 ms, and a queue entry each time.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _copy_from_rank_0(module: torch.nn.Module) -> None:
    """A factory may draw initial weights from a generator that nobody seeds."""
    for tensor in module.state_dict().values():
        dense = tensor.contiguous()
        dist.broadcast(dense, src=0)
        tensor.copy_(dense)


def _compiled(module: torch.nn.Module, trial: TrialSpec) -> torch.nn.Module:
    """Exact trials get kernels for any number of rows: which shards a worker has seen before must not matter."""
    try:
        network: torch.nn.Module = torch.compile(module, dynamic=True if trial.training.exact else None)  # type: ignore[assignment]
    except RuntimeError as error:  # not for this Python, or this platform
        raise TrainingFailed(_no_compile(trial, error)) from error
    return network


def _no_compile(trial: TrialSpec, error: Exception) -> str:
    """Torch says in the first lines what happened, and goes on with hints for its developers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        f"training.compile: torch.compile cannot take model '{trial.model_name}': {' '.join(lines[:2])[:300]}; "
        f"set compile = false"
    )


def _is_compiler_error(error: Exception) -> bool:
    """Whether this comes from torch.compile rather than from the model's own code."""
    places = ("torch._dynamo", "torch._inductor")
    return any(kind.__module__.startswith(places) for kind in type(error).__mro__)

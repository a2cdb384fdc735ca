"""Batch norm over the rows of all workers, on any device.

torch's SyncBatchNorm refuses tensors on the CPU, and neither it nor DDP knows of rows that are there only so that a
worker without any takes part in the collectives. Both are mended here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the rows of all workers of a group, by one differentiable all_reduce of the moments.

    Takes (rows, num_features, ...). Parameters, buffers and their names are those of torch's batch norm. In evaluation,
    and where there is one worker, it is torch's batch norm. Every worker must make the same forward passes; the
    gradients are right when DDP averages them.
    """

    process_group: dist.ProcessGroup | None = None
    counts_rows = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size(self.process_group) > 1):
            return super().forward(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, variance, count = self._moments(values)
        if self.track_running_stats:
            self._update_running(mean.detach(), variance.detach(), count)
        shape = (1, -1, *(1 for _ in range(x.dim() - 2)))
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        outputs = (values - mean.view(shape)) * scale.view(shape)
        if self.bias is not None:
            outputs = outputs + self.bias.view(shape)
        return outputs.to(x.dtype)

    def _moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Mean and biased variance of each feature over all workers, and the number of values they are from."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        variance, mean = (moment.double() for moment in torch.var_mean(x, axes, correction=0))
        own_count = x.numel() // x.shape[1] if self.counts_rows else 0
        # moments about zero, in float64 as their difference cancels; times 0, not left out, so that the backward pass
        # of a worker whose rows do not count has its all_reduce too
        squares = variance + mean.square()
        sums = torch.cat([mean * own_count, squares * own_count, mean.new_full((1,), own_count)])
        totals: torch.Tensor = all_reduce(sums, group=self.process_group)  # type: ignore[no-untyped-call]
        mean_sum, squares_sum, count = totals[: len(mean)], totals[len(mean) : -1], int(totals[-1])
        if count < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got {count} over all workers")
        mean = mean_sum / count
        return mean.to(x.dtype), (squares_sum / count - mean.square()).clamp_min(0.0).to(x.dtype), count

    def _update_running(self, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
        assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var.dtype), share)

    def _check_input_dim(self, input: torch.Tensor) -> None:  # the name torch calls it with
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 axes, got {input.dim()}")


class DeviceSyncBatchNorm(nn.SyncBatchNorm):
    """torch's own, for CUDA, which can be told that rows do not count."""

    counts_rows = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.counts_rows or not self.training:
            return super().forward(x)
        # torch leaves out a worker without rows; adding an empty sum keeps its collectives, also those of backward
        return x * 0.0 + super().forward(x[:0]).sum()


def convert_sync_batchnorm(module: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Put a synchronised batch norm in the place of each batch norm; parameters and buffers stay the same tensors.

    Returns the module, or the new layer where the module is a batch norm itself. Comes before DDP. Without a group the
    layers use the default one of the moment, so they outlast a change of the number of workers.
    """
    kind = DeviceSyncBatchNorm if any(parameter.is_cuda for parameter in module.parameters()) else SyncBatchNorm
    return _convert(module, kind, group)


@contextlib.contextmanager
def uncounted_rows(module: nn.Module) -> Iterator[None]:
    """Rows that pass through the module meanwhile are left out of all batch statistics (this worker).

    For a worker without rows in a step: it runs forward and backward on any row of the data, with the loss times 0, to
    take part in the collectives of the others. Both passes belong inside: the backward pass may compute again.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, SyncBatchNorm | DeviceSyncBatchNorm)]
    for layer in layers:
        layer.counts_rows = False
    try:
        yield
    finally:
        for layer in layers:
            layer.counts_rows = True


def _convert(
    module: nn.Module, kind: type[SyncBatchNorm] | type[DeviceSyncBatchNorm], group: dist.ProcessGroup | None
) -> nn.Module:
    for name, child in list(module._modules.items()):
        if child is not None:
            setattr(module, name, _convert(child, kind, group))
    if not isinstance(module, _BatchNorm):
        return module
    layer = kind(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    layer.process_group = group
    layer._parameters, layer._buffers = module._parameters, module._buffers
    return layer.train(module.training)

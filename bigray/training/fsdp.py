"""`strategy = "fsdp"`: parameters, gradients and optimizer state cut over the workers (torch `fully_shard`, FSDP2).

Zhao et al. 2023, arXiv 2304.11277. Each parameter is a DTensor cut along axis 0; its whole is gathered for the forward
and backward pass of its block and let go after it. Works with NCCL on GPUs and with gloo on CPUs.

For the training loop:

- Every forward pass is a collective: all ranks make the same number of them, also in validation, where a rank without
  rows passes one row and does not count it.
- Validation runs under `torch.no_grad()`. Under `torch.inference_mode()` the gathered parameters would become inference
  tensors, and the next training step would fail.
- Gradients are averaged over the ranks, as by DDP: scale the loss by world size / rows of the global batch.
- Accumulation needs no `no_sync`: each backward pass adds to the cut gradients.
- `clip_grad_norm_` gives the norm over all ranks, as a DTensor: `whole(norm)` is the number.
- The precision is in the module: no autocast around it.
- No `DistributedDataParallel` around it, and `module.state_dict()` holds DTensors: only the functions here take it in
  and out.

What torch has for it is imported in the functions: most trials do without, and it takes each worker a second of a core.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from bigray.errors import BigrayError, StorageError, TrainingFailed
from bigray.training.sharded import JoinedTensors, Shard

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from bigray.training.loop import Worker

StateDict = dict[str, torch.Tensor]
_T = TypeVar("_T")
_LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def shard_module(module: nn.Module, worker: Worker, precision: str = "fp32") -> nn.Module:
    """Cut a module over the ranks of the default process group, in place; returns it.

    Collective. Takes the module whole on the CPU, equal on all ranks, and moves it to the device block by block, so
    that it need not fit there. Blocks are the root's children, through lists and Sequentials. Make the optimizer
    after this, from the module's new parameters.

    `precision` "bf16" or "fp16" computes and gathers in it; the cut weights, the reduction of the gradients and the
    optimizer stay in fp32, and so do the layers with running statistics.

    Raises:
        TrainingFailed: a parameter has no axis to cut.
    """
    if scalars := [name for name, parameter in module.named_parameters() if parameter.dim() == 0]:
        raise TrainingFailed(
            f"strategy 'fsdp': cannot cut parameter '{scalars[0]}' of shape (); give it shape (1,), or use 'ddp'"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(worker.device.type, (worker.world_size,))
    policy = _policy(precision)
    # fully_shard works on the rows of plain contiguous tensors
    module = module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for layer in _with_statistics(module) if precision in _LOW_PRECISION else ():
        own = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=_LOW_PRECISION[precision])
        fully_shard(layer, mesh=mesh, mp_policy=own, reshard_after_forward=True)
    for block in _blocks_of_their_own(module):
        if not isinstance(block, FSDPModule):
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # the root lets its own parameters go too: outside a pass every parameter is cut, which saving relies on
    casts_inputs = not getattr(module, "reads_codes", False)  # bf16 has no number 257
    policy = replace(_policy(precision, output=torch.float32), cast_forward_inputs=casts_inputs)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return module


def new_shard(worker: Worker) -> Shard:
    """This rank's part in one save. Collective: once for each snapshot, before its tensors are taken."""
    save_id = torch.tensor([secrets.randbits(62)], device=worker.device)
    if worker.world_size > 1:
        dist.broadcast(save_id, src=0)
    return Shard(worker.rank, worker.world_size, int(save_id))


def local_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[StateDict, StateDict]:
    """What this rank writes of the model and of the optimizer. No collective, no copy: views of the live tensors.

    The optimizer's are named `<parameter number>.<slot>`, as `pack_optimizer` names them.
    """
    return local_parts(module.state_dict()), local_parts(_slots(optimizer))


def local_parts(tensors: Mapping[str, torch.Tensor]) -> StateDict:
    """This rank's part of each cut tensor; what is not cut, on rank 0 only."""
    from torch.distributed.tensor import DTensor

    keeps_whole = dist.get_rank() == 0
    parts = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) and any(placement.is_shard() for placement in tensor.placements):
            parts[name] = tensor.to_local().detach()
        elif keeps_whole:
            parts[name] = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    return parts


def load_tensors(module: nn.Module, optimizer: torch.optim.Optimizer, files: Mapping[str, bytes]) -> None:
    """Bring a sharded module and its optimizer to a checkpoint written at any world size.

    Collective. `files` (name -> bytes, `Checkpoint.files`) are read on rank 0; the others may pass an empty mapping.
    Beside them no more than one whole tensor is in memory at a time.

    Raises:
        StorageError: on every rank alike: a part is missing, or a tensor is missing or of another shape.
    """
    saved = _on_rank_0(lambda: set(JoinedTensors(files, "optimizer")))
    _keep_slots(optimizer, saved)
    load_into(_slots(optimizer), files, "optimizer")
    load_into(module.state_dict(), files, "model")


def load_into(tensors: Mapping[str, torch.Tensor], files: Mapping[str, bytes], stem: str) -> None:
    """Fill tensors, cut or whole, from the files of one stem; collective, and otherwise as `load_tensors`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    source: JoinedTensors | None = None

    def open_source() -> None:
        nonlocal source
        source = JoinedTensors(files, stem)
        _check_shapes(tensors, source, stem)

    _on_rank_0(open_source)
    with torch.no_grad():
        for name, tensor in tensors.items():
            full = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            if source is not None:
                full.copy_(source[name])
            if dist.get_world_size() > 1:
                dist.broadcast(full.reshape(-1).view(torch.uint8), src=0)  # as bytes: backends differ in their types
            if isinstance(tensor, DTensor):
                part = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
                tensor.to_local().copy_(part.to_local())
            else:
                tensor.copy_(full)


def full_tensors(tensors: Mapping[str, torch.Tensor]) -> StateDict:
    """Each tensor whole, on rank 0's CPU with memory of its own; empty on the others.

    Collective, one tensor on the device at a time.
    """
    full: StateDict = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor.detach())
        if dist.get_rank() == 0:
            full[name] = gathered.to("cpu", copy=True)
    return full


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor gathered, any other tensor as it is. Collective for the first."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _policy(precision: str, output: torch.dtype | None = None) -> MixedPrecisionPolicy:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if precision not in _LOW_PRECISION:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=_LOW_PRECISION[precision], reduce_dtype=torch.float32, output_dtype=output)


def _blocks_of_their_own(module: nn.Module) -> list[nn.Module]:
    """Blocks with parameters that no other block shares: those that share (tied weights) stay with the root."""
    blocks = [block for block in _blocks(module) if any(True for _ in block.parameters())]
    holders = Counter(id(parameter) for block in dict.fromkeys(blocks) for parameter in block.parameters())
    return [
        block for block in dict.fromkeys(blocks) if all(holders[id(parameter)] == 1 for parameter in block.parameters())
    ]


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or type(child) is nn.Sequential:
            yield from _blocks(child)
        else:
            yield child


def _with_statistics(module: nn.Module) -> list[nn.Module]:
    """Layers with running statistics (batch norm), whose weights must be of the statistics' type."""
    layers = [layer for layer in module.modules() if layer is not module and not list(layer.children())]
    return [
        layer
        for layer in layers
        if list(layer.parameters()) and any(buffer.is_floating_point() for buffer in layer.buffers())
    ]


def _slots(optimizer: torch.optim.Optimizer) -> StateDict:
    """The live tensors of an optimizer's state, named `<parameter number>.<slot>`."""
    return {
        f"{number}.{slot}": value
        for number, parameter in enumerate(_parameters(optimizer))
        for slot, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def _keep_slots(optimizer: torch.optim.Optimizer, saved: set[str]) -> None:
    """Give the optimizer state for the parameters that had some when it was saved, and for no others."""
    if not saved:
        optimizer.state.clear()
        return
    if not saved <= set(_slots(optimizer)):
        _make_slots(optimizer)
    numbers = {int(name.split(".", 1)[0]) for name in saved}
    for number, parameter in enumerate(_parameters(optimizer)):
        if number not in numbers:
            optimizer.state.pop(parameter, None)


def _make_slots(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its state, cut as it wants it: by a step with a rate of 0.

    What it does to the weights does not matter, those are loaded after it (torch.distributed.checkpoint does the same).
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check_shapes(tensors: Mapping[str, torch.Tensor], source: JoinedTensors, stem: str) -> None:
    if missing := [name for name in tensors if name not in set(source)]:
        raise StorageError(f"checkpoint/{stem}: expected tensor '{missing[0]}', found none; it is of another model")
    if extra := [name for name in source if name not in tensors]:
        raise StorageError(f"checkpoint/{stem}: found tensor '{extra[0]}', expected none; it is of another model")
    for name, tensor in tensors.items():
        if (found := source.shape(name)) != tuple(tensor.shape):
            raise StorageError(
                f"checkpoint/{stem}: tensor '{name}': expected shape {tuple(tensor.shape)}, found {found}"
            )


def _on_rank_0(make: Callable[[], _T]) -> _T:
    """Call `make` on rank 0 and give its result to all; what it raises of ours is raised on all, so that none waits."""
    box: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except BigrayError as error:
            box[1] = error
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    if isinstance(box[1], BigrayError):
        raise box[1]
    return box[0]  # type: ignore[return-value]

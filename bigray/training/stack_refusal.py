"""Which trials cannot be stacked, and why: told in one short line (worker)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from bigray.data.dataset import TrainingArrays
from bigray.data.row_file import RowFile
from bigray.errors import SpecError, last_line
from bigray.host_memory import host_memory, shown
from bigray.models import build_model
from bigray.specs import TrainingSpec, TrialSpec
from bigray.training.replica import seed_generator
from bigray.training.stacked_loss import make_loss
from bigray.training.stacked_network import make_network
from bigray.training.stacked_optimizer import STACKED
from bigray.training.tasks import load_task

_TRIED_LANES, _TRIED_ROWS = 2, 4
_COPIES = 5
"""Of a lane's weights: themselves, gradients, two of the optimizer's, those of the best epoch."""
_SHARE_OF_FREE = 0.25
_TOLERANCE = 1e-3
"""Of the tried gradients, relative to the largest: kernels differ in the order in which they add."""


def why_not_stacked(
    trial: TrialSpec, data: TrainingArrays, num_outputs: int, device: torch.device, num_lanes: int = _TRIED_LANES
) -> str | None:
    """What keeps the trial from being stacked, or None. Builds the module and tries one tiny step of it."""
    if (reason := next(_settings_against(trial.training), None)) is not None:
        return reason
    if trial.model.weights is not None or trial.model.freeze:  # keep_zeros needs weights
        return "weights, freeze and keep_zeros are of models trained alone"
    if isinstance(data.x_train, RowFile):
        return "the rows are streamed from disk, which is read once for each step of each trial"
    seed_generator(device, trial.seed)
    try:
        module = build_model(trial.model.factory, trial.model.params, data.x_train.shape[1:], num_outputs).to(device)
    except SpecError as error:  # the trial's own story, which it tells when it is trained alone
        return f"the model cannot be built: {last_line(error)}"
    return (
        next(_layers_against(module), None)
        or _memory_against(sum(p.numel() for p in module.parameters()), num_lanes, _free_bytes(device))
        or _failure_of_a_step(trial, module, data, num_outputs, device)
    )


def _memory_against(num_parameters: int, num_lanes: int, free_bytes: int) -> str | None:
    """A stack leaves most of what is free to the passes themselves, and to others."""
    needed = num_lanes * num_parameters * 4 * _COPIES
    return f"{num_lanes} lanes would need about {shown(needed)}" if needed > _SHARE_OF_FREE * free_bytes else None


def _free_bytes(device: torch.device) -> int:
    return host_memory().free_bytes if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def _settings_against(spec: TrainingSpec) -> Iterator[str]:
    flags = {
        f"task = '{spec.task}'": spec.target_kind == "language",
        "loop": spec.loop is not None,
        "augment": spec.augment is not None,
        "exact": spec.exact,
        "strategy = 'fsdp'": spec.strategy == "fsdp",
        "compile": spec.compile,
        f"precision = '{spec.precision}'": spec.precision != "fp32",
        "ema_decay": spec.ema_decay is not None,
        "param_groups": bool(spec.param_groups),
        "gradient_checkpointing": spec.gradient_checkpointing,
        "sync_batchnorm": spec.sync_batchnorm,
        "on_non_finite.policy = 'rollback'": spec.on_non_finite.policy == "rollback",
        "micro_batch_size": spec.micro_batch_size is not None,
        "global_batch_size = 'auto'": spec.global_batch_size == "auto",
    }
    yield from (f"training.{name} is of trials trained alone" for name, is_set in flags.items() if is_set)
    if spec.optimizer not in STACKED:
        yield f"training.optimizer '{spec.optimizer}' is not one of {', '.join(STACKED)}"
    elif unknown := set(spec.optimizer_params) - STACKED[spec.optimizer]:
        yield f"training.optimizer_params.{min(unknown)} is of trials trained alone"
    if spec.optimizer == "sgd" and spec.optimizer_params.get("nesterov") and not spec.momentum:
        yield "training.optimizer_params.nesterov needs a momentum"


def _layers_against(module: nn.Module) -> Iterator[str]:
    for name, layer in module.named_modules():
        kind = f"layer '{name}' ({type(layer).__name__})"
        if isinstance(layer, _DropoutNd) and layer.p > 0:
            yield f"{kind} draws random numbers"
        elif isinstance(layer, _BatchNorm) and layer.track_running_stats:
            yield f"{kind} has statistics that training changes"
    if len(list(module.parameters())) != len(list(module.named_parameters(remove_duplicate=False))):
        yield "two layers share a parameter"


def _failure_of_a_step(
    trial: TrialSpec, module: nn.Module, data: TrainingArrays, num_outputs: int, device: torch.device
) -> str | None:
    """Compare the gradients of two lanes with those of the module itself, on a few rows."""
    spec = trial.training
    x = torch.from_numpy(data.x_train[:_TRIED_ROWS].copy()).to(device)
    y = torch.from_numpy(data.y_train[:_TRIED_ROWS].copy()).to(device)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    parameters = {name: torch.stack([p.detach()] * _TRIED_LANES) for name, p in trainable.items()}
    gradients = [torch.zeros_like(tensor) for tensor in parameters.values()]
    try:
        task = load_task(spec, num_outputs, data.y_train)
        loss = make_loss(spec, task, num_outputs, data.y_train)
        network = make_network(module, parameters, gradients, loss, data.x_train.shape[1:])
        sums = network.gradients(x, y, 1.0)
        shape = network.outputs(x).shape
        losses = task.loss(module.train()(x).float(), y)
        plain = torch.autograd.grad(losses.sum(), list(trainable.values()))
    except Exception as error:  # whatever a module or a task of the user's raises: it cannot be stacked
        return f"a stacked step failed: {type(error).__name__}: {last_line(error)[:200]}"
    if shape != (_TRIED_LANES, len(x), num_outputs):
        return f"stacked outputs have shape {tuple(shape)}, expected {(_TRIED_LANES, len(x), num_outputs)}"
    if any(not torch.equal(before[name], buffer) for name, buffer in module.named_buffers()):
        return "the module has buffers that training changes"
    if not torch.allclose(sums, losses.sum().detach().expand_as(sums), rtol=_TOLERANCE):
        return "a stacked step has another loss than the trial alone"
    most = max(float(gradient.abs().max()) for gradient in plain)
    for stacked, alone in zip(gradients, plain, strict=True):
        if not torch.allclose(stacked, alone.expand_as(stacked), rtol=_TOLERANCE, atol=_TOLERANCE * most):
            return "a stacked step has other gradients than the trial alone"
    return None

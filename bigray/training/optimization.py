"""From gradients to weights: the optimizer, its rate at each step, clipping, averaged weights, loss scaling (worker).

`request.py` uses the checks in the driver, for jobs with settings that only torch can judge.
"""

from __future__ import annotations

import contextlib
import fnmatch
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bigray.errors import SpecError, TrainingFailed, did_you_mean, last_line
from bigray.specs import OPTIMIZERS, ParamGroupSpec, ScheduleSpec, TrainingSpec

StateDict = dict[str, torch.Tensor]

_FIELDS = ("lr", "momentum", "weight_decay")
"""Arguments of an optimizer that are fields of the job file."""
_FUSED = {"ddp": ("adam", "adamw", "sgd"), "fsdp": ("adam", "adamw")}
"""Optimizers with one kernel for the whole step on every device; SGD's cannot take sharded parameters."""
_NOT_SHARDED = ("adafactor", "rprop")
"""Their steps use operations that torch cannot do on sharded parameters."""

_ONE_CYCLE_START = 1 / 25
_ONE_CYCLE_END = _ONE_CYCLE_START / 1e4
_NAMES_SHOWN = 6


def make_optimizer(spec: TrainingSpec, module: nn.Module) -> torch.optim.Optimizer:
    """The job's optimizer over the trainable parameters of `module`, which is not wrapped, or sharded in place.

    Each group keeps its own rate as "initial_lr", for `set_lr`. With `weight_decay_on = "matrices"`, parameters of
    fewer than two axes do not decay, whichever group they are in.

    Raises:
        SpecError: an argument the optimizer does not take, or a group whose pattern matches no parameter.
        TrainingFailed: the module has nothing to train.
    """
    named = _trainable(module)
    faults = [*optimizer_faults(spec), *group_faults(spec.param_groups, module)]
    if faults:
        raise SpecError(faults)
    if not named:
        raise TrainingFailed("the model has no parameters to train")
    arguments = {**_arguments(spec), "lr": spec.scaled_lr, **_fused(spec, named.values())}
    optimizer: torch.optim.Optimizer = _optimizer_class(spec)(_groups(spec, named), **arguments)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def optimizer_faults(spec: TrainingSpec) -> list[str]:
    """What the optimizer would refuse, one line each; empty where it can be made."""
    accepted = _accepted(spec) - {"params"}
    faults = []
    for key in spec.optimizer_params:
        place = f"training.optimizer_params.{key}"
        if key in _FIELDS:
            faults.append(f"{place}: set training.{key} instead")
        elif key not in accepted:
            faults.append(f"{place}: not an argument of {spec.optimizer}{did_you_mean(key, accepted - set(_FIELDS))}")
    for place, value in _optional_fields(spec):
        field = place.rpartition(".")[2]
        if value and field not in accepted:
            faults.append(f"training.{place}: {spec.optimizer} has no {field}; remove it, or use another optimizer")
    if spec.strategy == "fsdp" and spec.optimizer in _NOT_SHARDED:
        faults.append(f"training.optimizer: {spec.optimizer} cannot be used with strategy = 'fsdp'; adamw and sgd can")
    return faults or _refused_values(spec)


def group_faults(groups: Sequence[ParamGroupSpec], module: nn.Module) -> list[str]:
    """A line for each parameter group that none of the module's trainable parameters would be in."""
    names = list(_trainable(module))
    faults, free = [], names
    for number, group in enumerate(groups):
        place = f"training.param_groups.{number}.match: '{group.match}'"
        if not fnmatch.filter(names, group.match):
            faults.append(f"{place} matches no parameter; they are {_shortened(names)}")
        elif not fnmatch.filter(free, group.match):
            faults.append(f"{place} matches only what an earlier group has taken; put the narrower pattern first")
        free = [name for name in free if not fnmatch.fnmatchcase(name, group.match)]
    return faults


def lr_factor(schedule: ScheduleSpec, step: int, num_steps: int) -> float:
    """The rate of step `step`, counted from 0, of a trial of `num_steps`, as a factor of its `lr`.

    The curves are those of torch's LinearLR, CosineAnnealingLR and OneCycleLR with the last step at their end. The
    warm-up of n steps rises by 1/(n + 1) a step, so that no step has the rate 0.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    last = num_steps - 1 - schedule.warmup_steps
    position = min((step - schedule.warmup_steps) / last, 1.0) if last > 0 else 0.0
    if schedule.kind == "linear":
        return 1.0 + (schedule.final_fraction - 1.0) * position
    if schedule.kind == "cosine":
        return _cosine(1.0, schedule.final_fraction, position)
    if schedule.kind == "one_cycle":
        return _one_cycle(step, num_steps, schedule.rise_fraction)
    return 1.0


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give each group `factor` times the rate it was made with."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradients down, in place, so that their norm over all parameters is `max_norm` at most.

    Returns the norm before (a scalar on the device). With sharded parameters this is a collective call.
    """
    parameters = list(parameters)
    norm = _norm(parameter.grad for parameter in parameters if parameter.grad is not None)
    clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def first_non_finite(module: nn.Module, loss: torch.Tensor) -> str | None:
    """Name of what is NaN or infinite: "loss", "gradient of 'layer.weight'", or None.

    One pass over the gradients and one wait for the device. With sharded parameters it is a collective call, and
    `loss` must be the same on every rank. Not for gradients of a scaled loss: the scaler deals with those.
    """
    if not torch.isfinite(loss).all():
        return "loss"
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    if torch.isfinite(_norm(gradients.values())):
        return None
    for name, gradient in gradients.items():
        if not torch.isfinite(_norm([gradient])):
            return f"gradient of '{name}'"
    return "norm of the gradients"  # each is finite, and the sum of their squares overflows


class Ema:
    """Exponential moving average of a module's parameters; it starts at the weights the module has when it is made.

    Buffers, such as BatchNorm's running statistics, are the module's own: they are averages already.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module = module
        self._parameters = [parameter.detach() for parameter in module.parameters()]
        self._averages = [parameter.clone() for parameter in self._parameters]
        self._move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """Move towards the module's weights: after each optimizer step."""
        self._move(self._averages, self._parameters, None)

    def state(self) -> StateDict:
        """A state dict for the module: averaged parameters, and its own buffers. The tensors are live, not copies."""
        tensors: StateDict = self._module.state_dict(keep_vars=True)
        averages = self._by_parameter()
        return {name: averages.get(id(tensor), tensor.detach()) for name, tensor in tensors.items()}

    def load(self, state: StateDict) -> None:
        """Take the averages out of what `state` gave; the module's buffers are left alone."""
        averages = self._by_parameter()
        for name, tensor in self._module.state_dict(keep_vars=True).items():
            if id(tensor) in averages:
                averages[id(tensor)].copy_(state[name])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the module has the averaged weights; no `update` or `state` there."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _by_parameter(self) -> dict[int, torch.Tensor]:
        pairs = zip(self._module.parameters(), self._averages, strict=True)
        return {id(parameter): average for parameter, average in pairs}

    def _swap(self) -> None:
        """Exchange contents, tensor by tensor: compiled and sharded modules hold on to their parameters' memory."""
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            held = parameter.clone()
            parameter.copy_(average)
            average.copy_(held)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """A loss scaler that works for fp16, whose gradients would vanish without it, and does nothing otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def scaler_state(scaler: torch.amp.GradScaler) -> StateDict:
    """Scale and steps since it changed, as tensors for a checkpoint; empty where the scaler does nothing."""
    state = scaler.state_dict()
    if not state:
        return {}
    return {
        "scale": torch.tensor(state["scale"], dtype=torch.float64),
        "growth_tracker": torch.tensor(state["_growth_tracker"], dtype=torch.int64),
    }


def load_scaler(scaler: torch.amp.GradScaler, tensors: StateDict) -> None:
    """Take back what `scaler_state` gave."""
    if tensors and scaler.is_enabled():
        restored = {"scale": tensors["scale"].item(), "_growth_tracker": int(tensors["growth_tracker"].item())}
        scaler.load_state_dict({**scaler.state_dict(), **restored})


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _optimizer_class(spec: TrainingSpec) -> Any:
    return getattr(torch.optim, OPTIMIZERS[spec.optimizer])


def _accepted(spec: TrainingSpec) -> set[str]:
    return set(inspect.signature(_optimizer_class(spec)).parameters)


def _optional_fields(spec: TrainingSpec) -> Iterator[tuple[str, float | None]]:
    """Place and value of each field that some optimizers do not have."""
    yield "momentum", spec.momentum
    yield "weight_decay", spec.weight_decay
    for number, group in enumerate(spec.param_groups):
        yield f"param_groups.{number}.weight_decay", group.weight_decay


def _arguments(spec: TrainingSpec) -> dict[str, Any]:
    """What the job file says of the whole optimizer; TOML has lists where torch documents tuples."""
    accepted = _accepted(spec)
    fields = {field: getattr(spec, field) for field in _FIELDS if field in accepted}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.optimizer_params.items()}
    return fields | given


def _refused_values(spec: TrainingSpec) -> list[str]:
    """Try the arguments on a parameter of one number: each class checks its own values."""
    try:
        _optimizer_class(spec)([nn.Parameter(torch.zeros(1))], **_arguments(spec))
    except Exception as error:  # which ones differs by class: ValueError, TypeError, RuntimeError ...
        return [f"training.optimizer_params: {spec.optimizer} refuses {spec.optimizer_params}: {last_line(error)}"]
    return []


def _fused(spec: TrainingSpec, parameters: Iterable[torch.Tensor]) -> dict[str, bool]:
    """`fused=True` where the whole step can be one kernel, and the job file says nothing about how it is computed."""
    ways = {"fused", "foreach", "differentiable", "capturable"}
    if spec.optimizer not in _FUSED[spec.strategy] or ways & set(spec.optimizer_params):
        return {}
    can = all(parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point() for parameter in parameters)
    return {"fused": True} if can else {}


def _groups(spec: TrainingSpec, named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    rules = [*spec.param_groups, ParamGroupSpec(match="*")]
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        number = next(n for n, rule in enumerate(rules) if fnmatch.fnmatchcase(name, rule.match))
        exempt = spec.weight_decay_on == "matrices" and parameter.ndim < 2
        members.setdefault((number, exempt), []).append(parameter)
    groups = []
    for (number, exempt), parameters in sorted(members.items(), key=lambda item: item[0]):
        rule = rules[number]
        group: dict[str, Any] = {"params": parameters, "lr": spec.scaled_lr * rule.lr_scale}
        if exempt:
            group["weight_decay"] = 0.0
        elif rule.weight_decay is not None:
            group["weight_decay"] = rule.weight_decay
        groups.append(group)
    return groups


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


def _cosine(start: float, end: float, position: float) -> float:
    return end + (start - end) * (1.0 + math.cos(math.pi * position)) / 2.0


def _one_cycle(step: int, num_steps: int, rise_fraction: float) -> float:
    peak, last = max(rise_fraction * num_steps - 1.0, 0.0), num_steps - 1
    if step < peak:
        return _cosine(_ONE_CYCLE_START, 1.0, step / peak)
    position = min((step - peak) / (last - peak), 1.0) if last > peak else 0.0
    return _cosine(1.0, _ONE_CYCLE_END, position)


def _norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """2-norm over all of them, whole also where each rank holds a part."""
    norm = get_total_norm(gradients)
    whole: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole

"""What a run will take on disk and to be sent, measured before anything starts (driver)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from bigray.cluster.plan import Footprint
from bigray.errors import SpecError
from bigray.models import build_model
from bigray.storage import open_storage
from bigray.training.request import RunRequest

if TYPE_CHECKING:
    from torch import nn

    from bigray.specs import TrainingSpec, TrialSpec

STEP_BYTES = 4
"""The number of its steps that Adam keeps with each parameter."""
MOST_SIZES = 32
"""Kinds of models that are looked at: a search may have thousands."""


def measure(request: RunRequest, *, to_submit: bool) -> Footprint:
    """The sizes of a request; `to_submit`: also of this folder, which `bigray submit` would send."""
    return Footprint(
        checkpoint_bytes(request), free_bytes(request.job.storage), _package_bytes() if to_submit else None
    )


def free_bytes(uri: str) -> int | None:
    """Of the local disk that a storage is on, or will be; None of an object store."""
    storage = open_storage(uri)
    if not storage.is_local:
        return None
    folder = Path(storage.root)
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _package_bytes() -> int | None:
    from bigray.cluster.package import find_package

    try:
        return find_package().size
    except SpecError:  # `bigray submit` tells what is wrong; not everybody uses it
        return None


def checkpoint_bytes(request: RunRequest) -> int | None:
    """The largest checkpoint of a trial: weights, those of the best epoch, and the optimizer's state. Takes no memory.

    None where only running the code would tell: a loop of one's own saves what it likes, and a model or an optimizer
    may need real numbers.
    """
    sizes: dict[tuple[object, ...], int | None] = {}
    for trial in request.trials:
        training = trial.training
        key = (trial.model.model_dump_json(), training.optimizer, training.momentum, training.ema_decay is not None)
        if key not in sizes and len(sizes) < MOST_SIZES:
            sizes[key] = _bytes_of(trial, request)
    known = [size for size in sizes.values() if size is not None]
    return max(known) if known and len(known) == len(sizes) else None


def _bytes_of(trial: TrialSpec, request: RunRequest) -> int | None:
    if trial.training.loop is not None:
        return None
    import torch

    model, dataset = trial.model, request.dataset
    try:
        with torch.device("meta"):  # shapes without memory
            module = build_model(model.factory, model.params, dataset.model_input_shape, dataset.outputs.num_outputs)
            state = _optimizer_bytes(trial.training, module)
    except Exception:  # the user's code, and torch's, in a place neither is made for
        return None
    weights: int = sum(tensor.nbytes for tensor in module.state_dict().values())
    copies = 3 if trial.training.ema_decay is not None else 2
    return copies * weights + state


def _optimizer_bytes(training: TrainingSpec, module: nn.Module) -> int:
    """What the optimizer keeps after a step. Of the usual ones that is known: a step imports torch's compiler first,
    which takes seconds."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    numbers: int = sum(parameter.nbytes for parameter in trained)
    if training.optimizer in ("adam", "adamw"):
        slots = 3 if training.optimizer_params.get("amsgrad") else 2
        return slots * numbers + STEP_BYTES * len(trained)
    if training.optimizer == "sgd":
        return numbers if training.momentum else 0

    import torch

    from bigray.training.checkpoint import pack_optimizer
    from bigray.training.optimization import make_optimizer

    optimizer = make_optimizer(training, module)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    return sum(tensor.nbytes for tensor in pack_optimizer(optimizer).values())

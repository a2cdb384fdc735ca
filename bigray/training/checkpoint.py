"""A trial's state on storage: safetensors and JSON in a committed folder, no pickle.

model.safetensors       weights after `step` optimizer steps
optimizer.safetensors   optimizer state, one tensor for each parameter and slot
best.safetensors        weights of the best epoch, where it is not this one
progress.json           cursor (epoch, batch, step), best epoch, and whether the trial ended
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from bigray.errors import StorageError
from bigray.paths import RunPaths
from bigray.specs import TrialSpec
from bigray.storage import MANIFEST, commit_folder, read_folder
from bigray.training.commands import TrialState

if TYPE_CHECKING:
    import torch

StateDict = dict[str, "torch.Tensor"]
KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class Progress:
    """A trial's cursor and record. `epoch` epochs are complete, and `batch` steps of the next one."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    ended: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    best_epoch: int = 0
    best_step: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    validations_since_best: int = 0
    improvements: tuple[tuple[int, float], ...] = ()

    def to_state(self) -> TrialState:
        return TrialState(
            epoch=self.epoch,
            step=self.step,
            ended=self.ended,
            metrics=self.metrics,
            best_epoch=self.best_epoch,
            best_step=self.best_step,
            best_metrics=self.best_metrics,
            improvements=self.improvements,
        )


@dataclass(frozen=True)
class Checkpoint:
    """What is saved and loaded. The tensors are serialised, so that rank 0 can send it to the others as it is."""

    progress: Progress
    model: bytes
    optimizer: bytes
    best: bytes | None
    """None where the best epoch is this one, or none was validated."""

    @property
    def best_weights(self) -> bytes:
        return self.model if self.best is None else self.best


def save_checkpoint(paths: RunPaths, trial: TrialSpec, attempt: int, checkpoint: Checkpoint) -> str:
    """Commit a checkpoint, drop all but the newest `KEPT_CHECKPOINTS` committed ones; returns its folder (rank 0).

    What has a higher step goes too: the trial went back behind it, so it did not verify.
    """
    folder = paths.checkpoint(trial.trial_id, checkpoint.progress.step)
    files = {
        "model.safetensors": checkpoint.model,
        "optimizer.safetensors": checkpoint.optimizer,
        "progress.json": json.dumps(asdict(checkpoint.progress)).encode(),
    }
    if checkpoint.best is not None:
        files["best.safetensors"] = checkpoint.best
    manifest = {"step": checkpoint.progress.step, "attempt": attempt, "config_hash": trial.config_hash}
    paths.storage.delete_folder(folder)
    commit_folder(paths.storage, folder, files, manifest)
    steps = paths.checkpoint_steps(trial.trial_id)
    usable = [s for s in steps if s <= checkpoint.progress.step and _is_committed(paths, trial, s)]
    for step in set(steps) - set(usable[:KEPT_CHECKPOINTS]):
        paths.storage.delete_folder(paths.checkpoint(trial.trial_id, step))
    return folder


def load_checkpoint(paths: RunPaths, trial: TrialSpec, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None (rank 0).

    A damaged one is skipped with a warning. One without a manifest was never finished and is passed over in silence,
    as is one that other settings made.
    """
    for step in paths.checkpoint_steps(trial.trial_id):
        folder = paths.checkpoint(trial.trial_id, step)
        if not _is_committed(paths, trial, step):
            continue
        try:
            committed = read_folder(paths.storage, folder)
        except StorageError as error:
            warn(f"{error}; going back to the checkpoint before it")
            continue
        if committed.manifest.get("config_hash") == trial.config_hash:
            return _from_files(committed.files)
    return None


def _is_committed(paths: RunPaths, trial: TrialSpec, step: int) -> bool:
    return paths.storage.exists(f"{paths.checkpoint(trial.trial_id, step)}/{MANIFEST}")


def _from_files(files: dict[str, bytes]) -> Checkpoint:
    return Checkpoint(
        progress=_progress_from_json(files["progress.json"]),
        model=files["model.safetensors"],
        optimizer=files["optimizer.safetensors"],
        best=files.get("best.safetensors"),
    )


def _progress_from_json(data: bytes) -> Progress:
    document = json.loads(data)
    document["improvements"] = tuple((epoch, value) for epoch, value in document.get("improvements", ()))
    return Progress(**document)


def pack_weights(weights: StateDict) -> bytes:
    """A module's state dict -> safetensors. Tied weights are written once for each of their names."""
    import safetensors.torch

    packed: bytes = safetensors.torch.save(_without_sharing(weights))
    return packed


def _without_sharing(weights: StateDict) -> StateDict:
    """On the CPU, each with memory of its own: safetensors refuses tensors that share it."""
    seen: set[int] = set()
    own: StateDict = {}
    for name, tensor in weights.items():
        tensor = tensor.contiguous().cpu()
        address = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return own


def unpack_weights(data: bytes) -> StateDict:
    """Safetensors -> state dict on the CPU."""
    import safetensors.torch

    weights: StateDict = safetensors.torch.load(data)
    return weights


def pack_optimizer(optimizer: torch.optim.Optimizer) -> bytes:
    """Optimizer state -> safetensors, each tensor named `<parameter number>.<slot>`. Its settings are the trial's."""
    slots = {}
    for number, state in optimizer.state_dict()["state"].items():
        for slot, value in state.items():
            if value is not None:  # SGD keeps an empty momentum buffer where it has no momentum
                slots[f"{number}.{slot}"] = value
    return pack_weights(slots)


def unpack_optimizer(optimizer: torch.optim.Optimizer, data: bytes) -> None:
    """Load what `pack_optimizer` made into an optimizer of the same settings and parameters."""
    import torch

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in unpack_weights(data).items():
        number, slot = name.split(".", 1)
        parameter = parameters[int(number)]
        if tensor.shape == parameter.shape:  # in the parameter's own memory layout, which fused optimizers rely on
            tensor = torch.empty_like(parameter, device="cpu", dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(number), {})[slot] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

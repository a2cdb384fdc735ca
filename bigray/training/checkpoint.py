"""A trial's state: what a checkpoint is, and reading it back from storage. No pickle, safetensors and JSON only.

model.safetensors       weights after `step` optimizer steps
optimizer.safetensors   optimizer state, one tensor for each parameter and slot
best.safetensors        weights of the best epoch, where it is not this one
progress.json           cursor (epoch, batch, step), best epoch, and whether the trial ended

More files are there where the training has more state (ema, samples, scaler). Writing is in `checkpoint_writer`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bigray.errors import StorageError, TrainingFailed
from bigray.paths import RunPaths
from bigray.specs import TrialSpec
from bigray.storage import MANIFEST, read_files, read_manifest
from bigray.training.commands import TrialState
from bigray.training.sharded import SHARDED_STEMS, JoinedTensors, Shard, part_names
from bigray.training.tensor_files import StateDict, check_tensor_file, unpack_tensors

if TYPE_CHECKING:
    import torch

__all__ = [
    "FORMAT",
    "PROGRESS",
    "Checkpoint",
    "Progress",
    "Snapshot",
    "SnapshotBuffers",
    "StateDict",
    "committed_steps",
    "load_checkpoint",
    "load_epoch_end",
    "load_to_go_on",
    "pack_optimizer",
    "read_checkpoint",
    "unpack_optimizer",
    "weights_sha256",
]

FORMAT = 2
"""Of the folder; in its manifest. A higher number is a newer bigray's."""
PROGRESS = "progress.json"


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
    samples_lost: int = 0
    """Over all complete epochs, in whatever attempt they were trained; as `samples_repeated`."""
    samples_repeated: int = 0
    rollbacks: int = 0
    """Times the trial went back because of a NaN or an infinity."""
    lr_scale: float = 1.0
    """What the roll-backs left of the learning rate."""
    epoch_loss_sum: float = 0.0
    """Of the current epoch so far, so that a resumed epoch reports the loss of all its batches."""
    epoch_samples: int = 0

    def to_state(self) -> TrialState:
        return TrialState(
            epoch=self.epoch,
            step=self.step,
            ended=self.ended,
            metrics=self.metrics,
            best_epoch=self.best_epoch,
            best_step=self.best_step,
            best_metrics=self.best_metrics,
            samples_lost=self.samples_lost,
            samples_repeated=self.samples_repeated,
            rollbacks=self.rollbacks,
            improvements=self.improvements,
        )


@dataclass(frozen=True)
class Snapshot:
    """A trial's state as copies that no training step touches (rank 0; with fsdp every rank)."""

    progress: Progress
    tensors: Mapping[str, StateDict]
    """Stem of the file -> its tensors: "model", "optimizer", "best" (absent where the best step is this one), ..."""
    shard: Shard | None = None
    """Set where each rank writes a part."""


class SnapshotBuffers:
    """Memory of one snapshot, allocated at its first use and used again for the next (worker).

    Fresh memory costs a page fault for each 4 KiB, more than the copy itself. From a GPU the copy goes to pinned
    memory, which the device writes by itself.
    """

    def __init__(self) -> None:
        self._held: dict[str, StateDict] = {}

    def copy(self, stem: str, tensors: Mapping[str, torch.Tensor]) -> StateDict:
        """The tensors' values, on the CPU and contiguous; valid until the next `copy` under this stem."""
        import torch

        held = self._held.get(stem, {})
        copies = {name: _buffer_like(tensor, held.get(name)) for name, tensor in tensors.items()}
        self._held[stem] = copies
        with torch.no_grad():
            for name, tensor in tensors.items():
                if tensor.is_cpu and tensor.is_contiguous() and tensor.numel() and not tensor.is_complex():
                    # torch would copy with all its threads and wait for the slowest: where other processes use the
                    # cores too that took 2 to 5 times as long as one thread, which is as fast as the memory is
                    np.copyto(_bytes_of(copies[name]), _bytes_of(tensor))
                else:
                    copies[name].copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return dict(copies)


def _bytes_of(tensor: torch.Tensor) -> NDArray[np.uint8]:
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def _buffer_like(tensor: torch.Tensor, held: torch.Tensor | None) -> torch.Tensor:
    import torch

    if held is not None and (held.shape, held.dtype) == (tensor.shape, tensor.dtype):
        return held
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


@dataclass(frozen=True)
class Checkpoint:
    """What was loaded, verified. The tensors are still bytes, so that rank 0 can send it to the others as it is."""

    progress: Progress
    files: Mapping[str, bytes]
    """Names such as "model.safetensors" -> content; of a sharded checkpoint the parts (`sharded.JoinedTensors`)."""
    is_record: bool = False
    """Only the progress was kept, the weights are gone: an ended trial that was not among the best."""
    place: str = field(default="", compare=False)
    """Its folder, for messages."""

    def tensors(self, stem: str) -> StateDict | None:
        """The tensors of one stem, whole, with memory of their own; None where the checkpoint has none of it.

        Raises:
            StorageError: only the record of this trial was kept.
        """
        self._check_has_weights()
        if (data := self.files.get(f"{stem}.safetensors")) is not None:
            return unpack_tensors(data)
        return dict(JoinedTensors(self.files, stem, self.place)) or None

    def best_file(self) -> str:
        """Stem of the weights of the best epoch, averaged ones where the trial averages.

        Raises:
            StorageError: only the record of this trial was kept.
        """
        self._check_has_weights()
        if "best.safetensors" in self.files:
            return "best"
        return "ema" if any(name.startswith("ema") for name in self.files) else "model"

    def _check_has_weights(self) -> None:
        if self.is_record:
            raise StorageError(
                f"{self.place}: expected weights, found only the record: this trial ended and was not among the best; "
                f"raise keep.best and train it in a new run"
            )


def load_checkpoint(paths: RunPaths, trial: TrialSpec, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole and of this trial, or None where none was ever committed (rank 0).

    Newest is the highest step, whatever clocks say. Where a newer one is damaged, or not of this trial, `warn` gets one
    line. One without a manifest was never finished and is passed over in silence.

    Raises:
        StorageError: there are checkpoints and none can be used: starting from scratch in silence would lose them. The
            line is about the newest.
    """
    faults: list[StorageError] = []
    for step in committed_steps(paths, trial.trial_id):
        try:
            checkpoint = read_checkpoint(paths, trial, step)
        except StorageError as error:
            faults.append(error)
            continue
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            warn(f"{faults[0]}{more}; going back to the checkpoint of step {step:,}")
        return checkpoint
    if faults:
        folder = f"{paths.storage.uri}/{paths.trial(trial.trial_id)}"
        raise StorageError(
            f"{faults[0]}; no checkpoint of this trial can be used ({len(faults)} there): bring the files back, or "
            f"remove {folder} to train it from the start"
        ) from faults[0]
    return None


def load_to_go_on(paths: RunPaths, trial: TrialSpec, warn: Callable[[str], None]) -> Checkpoint | None:
    """`load_checkpoint` for training: without weights, only a trial that has ended has nothing to begin anew.

    One that a scheduler had halted is trimmed to its record when its sweep is complete; if the sweep is extended it may
    be promoted, and trains again from the start.
    """
    checkpoint = load_checkpoint(paths, trial, warn)
    if checkpoint is not None and checkpoint.is_record and checkpoint.progress.ended is None:
        return None
    return checkpoint


def load_epoch_end(paths: RunPaths, trial: TrialSpec, epoch: int) -> Checkpoint:
    """The newest committed checkpoint of exactly the end of an epoch (rank 0).

    Raises:
        TrainingFailed: there is none any more, or none yet.
    """
    found = []
    for step in committed_steps(paths, trial.trial_id):
        try:
            checkpoint = read_checkpoint(paths, trial, step)
        except StorageError:  # damaged: another one may do
            continue
        found.append(str(checkpoint.progress.epoch))
        if (checkpoint.progress.epoch, checkpoint.progress.batch) == (epoch, 0) and not checkpoint.is_record:
            return checkpoint
    raise TrainingFailed(
        f"{paths.storage.uri}/{paths.trial(trial.trial_id)}: no checkpoint of the end of epoch {epoch} to take over; "
        f"there are those of epochs {', '.join(found) or 'none'}"
    )


def weights_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of a model's tensors, by name and by the bytes of their values: equal for equal weights anywhere."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(name.encode() + b"\0")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def committed_steps(paths: RunPaths, trial_id: str) -> list[int]:
    """Steps with a committed checkpoint, newest first."""
    steps = paths.checkpoint_steps(trial_id)
    return [step for step in steps if paths.storage.exists(f"{paths.checkpoint(trial_id, step)}/{MANIFEST}")]


def read_checkpoint(paths: RunPaths, trial: TrialSpec, step: int) -> Checkpoint:
    """The committed checkpoint of one step.

    Raises:
        StorageError: it is damaged, of another model or settings, or of a newer bigray; one line with the file, what
            was expected and what was found.
    """
    folder = paths.checkpoint(trial.trial_id, step)
    place = f"{paths.storage.uri}/{folder}"
    manifest = read_manifest(paths.storage, folder)
    _check_manifest(manifest, trial, step, f"{place}/{MANIFEST}")
    files = read_files(paths.storage, folder, manifest)
    progress = _progress_from_json(files.pop(PROGRESS), f"{place}/{PROGRESS}")
    if progress.step != step:
        raise StorageError(f"{place}/{PROGRESS}: expected step {step}, found {progress.step}")
    for name, data in files.items():
        if name.endswith(".safetensors"):
            check_tensor_file(data, f"{place}/{name}")
    for stem in SHARDED_STEMS:
        part_names(files.keys(), stem, place)
    return Checkpoint(progress, files, bool(manifest.get("record")), place)


def _check_manifest(manifest: Mapping[str, Any], trial: TrialSpec, step: int, place: str) -> None:
    written = manifest.get("format")
    if not isinstance(written, int) or not 1 <= written <= FORMAT:
        newer = "; a newer bigray wrote it" if isinstance(written, int) and written > FORMAT else ""
        raise StorageError(f"{place}: expected format {FORMAT} or lower, found {written}{newer}")
    if manifest.get("step") != step:
        raise StorageError(f"{place}: expected step {step}, found {manifest.get('step')}")
    if (found := manifest.get("config_hash")) != trial.config_hash:
        raise StorageError(f"{place}: of another model or settings, expected {trial.config_hash}, found {found}")
    if PROGRESS not in manifest["files"]:
        raise StorageError(f"{place}: expected {PROGRESS} among its files, found none")
    if not manifest.get("record") and len(manifest["files"]) < 2:
        raise StorageError(f"{place}: expected files of weights, found none")


def _progress_from_json(data: bytes, place: str) -> Progress:
    try:
        document = json.loads(data)
        document["improvements"] = tuple((epoch, value) for epoch, value in document.get("improvements", ()))
        unknown = set(document) - {known.name for known in fields(Progress)}
        if unknown:
            raise ValueError(f"unknown '{min(unknown)}'")
        return Progress(**document)
    except (ValueError, TypeError, AttributeError) as error:
        raise StorageError(f"{place}: not a trial's progress: {error}") from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> StateDict:
    """Optimizer state, each tensor named `<parameter number>.<slot>`. Its settings are the trial's.

    The tensors are the live ones.

    Raises:
        StorageError: the optimizer keeps something that is no tensor.
    """
    import torch

    slots: StateDict = {}
    for number, state in optimizer.state_dict()["state"].items():
        for slot, value in state.items():
            if isinstance(value, torch.Tensor):
                slots[f"{number}.{slot}"] = value
            elif value is not None:  # SGD keeps an empty momentum buffer where it has no momentum
                kind = type(value).__name__
                raise StorageError(f"optimizer state '{slot}': expected a tensor, found a {kind}; it cannot be saved")
    return slots


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: StateDict) -> None:
    """Load what `pack_optimizer` gave into an optimizer of the same settings and parameters."""
    import torch

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        number, slot = name.split(".", 1)
        parameter = parameters[int(number)]
        if tensor.shape == parameter.shape:  # in the parameter's own memory layout, which fused optimizers rely on
            tensor = torch.empty_like(parameter, device="cpu", dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(number), {})[slot] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

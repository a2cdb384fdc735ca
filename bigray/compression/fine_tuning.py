"""Pruned weights trained on with their zeros kept: what is asked of the training, and what has to agree. Pure.

The training itself is that of `bigray train`: the caller brings it, since it needs a cluster.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from bigray.bundle import BundleManifest, ModelBundle, OutputSchema, pack_holdout
from bigray.compression.change import Changed
from bigray.data.dataset import Dataset
from bigray.data.features import FeatureSchema
from bigray.data.splitting import row_hashes
from bigray.errors import SpecError, TrainingFailed, did_you_mean
from bigray.models.transfer import keep_zeros_fault
from bigray.specs import JobSpec, ModelSpec, TrainingSpec

OPTION = "--fine-tune"


class Train(Protocol):
    """Trains a job of one model as `bigray train` does."""

    def __call__(self, job: JobSpec, check: Callable[[Dataset], None]) -> str:
        """Returns the location of the bundle. `check` looks at the job's data before anything is started."""


@dataclass(frozen=True)
class FineTuning:
    """How the pruned weights are trained on."""

    job: JobSpec
    train: Train
    epochs: int | None = None
    """None: those of the job."""


def training_job(manifest: BundleManifest, asked: FineTuning, weights: str) -> JobSpec:
    """The job that trains the bundle's model on from the file `weights`.

    Data, scaling, storage and seed are the job's. So is each key of `[training]` that the job file has; the others are
    as the bundle was trained with.

    Raises:
        SpecError: the job does not train such a model, or its settings do not go together with the bundle's.
    """
    job, name = asked.job, manifest.origin.model
    own = job.models.get(name)
    if own is None:
        known = did_you_mean(name, job.models)
        raise SpecError(f"{OPTION}: the bundle is of model '{name}', which the job does not have{known}")
    if own.factory != manifest.factory.factory:
        raise SpecError(
            f"{OPTION}: models.{name}.factory: '{own.factory}' in the job, '{manifest.factory.factory}' in the bundle"
        )
    training = _settings(manifest, job.training, asked.epochs)
    model = ModelSpec(
        factory=own.factory, params=manifest.factory.params, weights=weights, freeze=own.freeze, keep_zeros=True
    )
    if fault := keep_zeros_fault(model, training):
        raise SpecError(f"{OPTION}: {fault}")
    # folds are for choosing a model, and this one has been chosen
    data = job.data.model_copy(update={"k_folds": None})
    return _checked(job.model_copy(update={"data": data, "models": {name: model}, "training": training}))


def _settings(manifest: BundleManifest, asked: TrainingSpec, epochs: int | None) -> TrainingSpec:
    task = manifest.outputs.task
    if asked.target_kind != task:
        raise SpecError(f"{OPTION}: training.task: the job is for {asked.target_kind}, the bundle for {task}")
    said = asked.model_dump(mode="json", include=asked.model_fields_set)
    if epochs is not None:
        said["epochs"] = epochs
    try:
        return TrainingSpec.model_validate_json(json.dumps({**manifest.origin.config, **said}))
    except ValidationError as error:
        raise SpecError(f"{OPTION}: training: with what the bundle was trained with: {_first(error)}") from None


def _checked(job: JobSpec) -> JobSpec:
    """What is copied is not validated."""
    try:
        return JobSpec.model_validate_json(job.model_dump_json())
    except ValidationError as error:
        raise SpecError(f"{OPTION}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def check_data(manifest: BundleManifest, holdout: pa.Table | None, dataset: Dataset, split_seed: int) -> None:
    """Refuse data that are not those of the bundle, or of which other rows are sealed.

    Raises:
        SpecError: one line, the first that is found.
    """
    if (fault := next(_data_faults(manifest, holdout, dataset, split_seed), None)) is not None:
        raise SpecError(f"{OPTION}: {fault}")


def _data_faults(
    manifest: BundleManifest, holdout: pa.Table | None, dataset: Dataset, split_seed: int
) -> Iterator[str]:
    origin = manifest.origin
    if (there := _names(dataset.inputs)) != (ours := _names(manifest.inputs)):
        yield f"the job's data have the input columns {_listed(there)}, the bundle has {_listed(ours)}"
    if (target := dataset.outputs.target) != manifest.outputs.target:
        yield f"data.target: '{target}' in the job, '{manifest.outputs.target}' in the bundle"
    if dataset.fingerprint != origin.data_fingerprint:
        yield (
            f"the job's data are not those of the bundle: fingerprint {dataset.fingerprint}, "
            f"and {origin.data_fingerprint or 'none'} in the bundle"
        )
    if _undecided(dataset.outputs) != _undecided(manifest.outputs):
        yield "the job reads the target column otherwise than the bundle's did (data.target, training.positive)"
    if not _are_same_rows(_sealed(dataset, split_seed), holdout):
        yield "the job seals other rows than the bundle, so it would train on its holdout; set data.split as it was"
    if dataset.inputs != manifest.inputs or dataset.preprocessing != manifest.preprocessing:
        yield "the job prepares its data otherwise than the bundle's did; set [data] as it was"


def _names(inputs: FeatureSchema) -> list[str]:
    return [column.name for column in inputs.columns]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - 4
    return ", ".join(names[:4]) + (f" and {more} more" if more > 0 else "")


def _undecided(outputs: OutputSchema) -> OutputSchema:
    """Without the thresholds, which are chosen after training."""
    return outputs.model_copy(update={"threshold": None, "thresholds": ()})


def _sealed(dataset: Dataset, split_seed: int) -> pa.Table | None:
    """The holdout as it would travel in a bundle."""
    packed = pack_holdout(dataset.holdout, split_seed)
    return None if packed is None else pa.ipc.open_file(pa.BufferReader(packed)).read_all()


def _are_same_rows(some: pa.Table | None, others: pa.Table | None) -> bool:
    if some is None or others is None:
        return some is others
    if some.num_rows != others.num_rows or sorted(some.column_names) != sorted(others.column_names):
        return False
    return bool(np.array_equal(row_hashes(some), row_hashes(others.select(some.column_names))))


def trained_on(pruned: Changed, tuned: ModelBundle, manifest: BundleManifest) -> tuple[BundleManifest, Changed]:
    """What the training made of pruned weights, as a version of the bundle they come from.

    Raises:
        TrainingFailed: a zero did not stay, as a loop of one's own may have it.
    """
    if moved := _moved(pruned.weights, tuned.weights):
        raise TrainingFailed(
            f"{OPTION}: zeros of '{moved[0]}' did not stay zeros; a loop of your own has to train the model it is given"
        )
    notes = pruned.notes[:1] if tuned.onnx is not None else (*pruned.notes[:1], "it has no model.onnx")
    changed = Changed(tuned.weights, tuned.onnx, notes)
    return tuned.manifest.model_copy(update={"name": manifest.name}), changed


def _moved(before: bytes, after: bytes) -> list[str]:
    """Matrices of which a number that was 0 is none any more."""
    old, new = _matrices(before), _matrices(after)
    return [name for name, matrix in old.items() if name not in new or bool((new[name][matrix == 0] != 0).any())]


def share_of_zeros(weights: bytes) -> float:
    """Of all numbers in the matrices of a safetensors file, those that are exactly 0."""
    matrices = _matrices(weights).values()
    total = sum(matrix.numel() for matrix in matrices)
    return sum(int((matrix == 0).sum()) for matrix in matrices) / total if total else 0.0


def _matrices(weights: bytes) -> dict[str, Any]:
    import safetensors.torch

    return {name: tensor for name, tensor in safetensors.torch.load(weights).items() if tensor.dim() >= 2}

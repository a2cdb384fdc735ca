"""The model bundle: the only thing that crosses from training to serving.

A committed folder (see `bigray.storage`) of plain data and no pickle:

    manifest.json         what the model is, where it came from, and the SHA-256 of every file
    weights.safetensors   the winning weights
    model.onnx            only where the export reproduces the model's outputs
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bigray.data.features import FeatureSchema
from bigray.data.preprocessing import Preprocessing
from bigray.errors import StorageError
from bigray.storage import MANIFEST, Storage, commit_folder, open_storage, read_folder

SCHEMA_VERSION = 1
WEIGHTS = "weights.safetensors"
ONNX = "model.onnx"


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Origin(_Document):
    """Which training made these weights."""

    run: str
    trial: str
    model: str
    """The model's name in the job file."""
    step: int
    """Optimizer steps behind these weights."""
    epoch: int
    metrics: dict[str, float]
    """Validation metrics of exactly these weights."""
    config: dict[str, Any]
    """The trial's training settings, resolved."""
    seeds: dict[str, int]
    data_fingerprint: str
    git: str | None
    """Revision of the project the run started in; None outside a repository."""
    versions: dict[str, str]


class OutputSchema(_Document):
    """What the model returns."""

    task: Literal["classification", "regression"]
    num_outputs: int
    """Width of the model's output: the number of classes, or 1."""
    target: str
    """The target column's name in the data."""
    class_names: tuple[str | int, ...] = ()
    """Label of each output, in order; empty for regression."""


class FactorySpec(_Document):
    """How to rebuild the module where there is no `model.onnx`."""

    factory: str
    params: dict[str, Any]


class BundleManifest(_Document):
    """Everything about the model except the weights; `files` is filled in by `commit_folder`."""

    schema_version: int = SCHEMA_VERSION
    name: str
    """The job's name, and the model's name in URLs."""
    origin: Origin
    inputs: FeatureSchema
    preprocessing: Preprocessing
    outputs: OutputSchema
    factory: FactorySpec
    example: dict[str, Any]
    """One training row as a JSON record, for documentation and the ready-made curl."""


@dataclass(frozen=True)
class ModelBundle:
    """A verified bundle in memory."""

    manifest: BundleManifest
    weights: bytes
    onnx: bytes | None
    version: str
    """First 12 hex digits of the weights' SHA-256: names what is being served."""

    @classmethod
    def load(cls, location: str | os.PathLike[str] | Storage) -> ModelBundle:
        """Read a bundle folder and verify every hash.

        Raises:
            CorruptFile: a file differs from the manifest; names the file and both hashes.
            StorageError: the folder holds no bundle, or one of a schema this version does not read.
        """
        storage = location if isinstance(location, Storage) else open_storage(location)
        if not storage.exists(MANIFEST):
            raise StorageError(f"{storage.uri}: no bundle here ({MANIFEST} is missing)")
        folder = read_folder(storage)
        document = {key: value for key, value in folder.manifest.items() if key != "files"}
        if (version := document.get("schema_version")) != SCHEMA_VERSION:  # first: its fields may be other ones
            raise StorageError(
                f"{storage.uri}/{MANIFEST}: schema_version {version}, this bigray reads {SCHEMA_VERSION}"
            )
        try:
            manifest = BundleManifest.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise StorageError(f"{storage.uri}/{MANIFEST}: {place}: {first['msg']}") from None
        if WEIGHTS not in folder.files:
            raise StorageError(f"{storage.uri}/{MANIFEST}: lists no {WEIGHTS}")
        version = folder.manifest["files"][WEIGHTS]["sha256"][:12]
        return cls(manifest, folder.files[WEIGHTS], folder.files.get(ONNX), version)


def save_bundle(storage: Storage, folder: str, manifest: BundleManifest, weights: bytes, onnx: bytes | None) -> None:
    """Commit a bundle; the manifest is written last."""
    files = {WEIGHTS: weights} | ({ONNX: onnx} if onnx is not None else {})
    storage.delete_folder(folder)
    commit_folder(storage, folder, files, manifest.model_dump(mode="json"))

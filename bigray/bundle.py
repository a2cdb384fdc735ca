"""The model bundle: the only thing that crosses from training to serving.

A committed folder (see `bigray.storage`) of plain data and no pickle:

    manifest.json         what the model is, where it came from, and the SHA-256 of every file
    weights.safetensors   the winning weights
    model.onnx            only where the export reproduces the model's outputs
    golden.safetensors    a few validation rows as they came, and what the model made of them when it was exported
    holdout.arrow         sealed rows with their targets, where the job keeps some: a later version is compared on them
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bigray.data.features import FeatureSchema, column_to_numpy
from bigray.data.preprocessing import Preprocessing
from bigray.errors import StorageError
from bigray.specs import BuiltInTask
from bigray.storage import MANIFEST, Storage, commit_folder, open_storage, read_files, read_manifest

SCHEMA_VERSION = 3
WEIGHTS = "weights.safetensors"
ONNX = "model.onnx"
GOLDEN = "golden.safetensors"
HOLDOUT = "holdout.arrow"
FILES = (WEIGHTS, ONNX, GOLDEN, HOLDOUT)
"""All that a bundle may hold besides its manifest."""

GOLDEN_ROWS = 32
"""Most rows of golden answers."""
HOLDOUT_ROWS = 5_000
"""Most sealed rows that travel with a bundle: enough to tell versions a percent apart."""
HOLDOUT_BYTES = 32 * 2**20
"""About the most they may take."""

_FLOATS = {
    "F64": ("u8", 0x7FF0 << 48),
    "F32": ("u4", 0x7F80 << 16),
    "F16": ("u2", 0x7C00),
    "BF16": ("u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),
    "C64": ("u4", 0x7F80 << 16),
}
"""Each floating type of the format: its bits as a numpy type, and the least pattern, without the sign, that is an
infinity or NaN. It is told by the bits, since numpy knows neither bfloat16 nor the eight-bit ones."""
_PICKLE, _ZIP = b"\x80", b"PK\x03\x04"
_EXTENSION_KEY = b"ARROW:extension:name"

FloatArray = NDArray[np.float32]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


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

    task: BuiltInTask
    num_outputs: int
    """Width of the model's output: the number of classes, of labels or of tokens; 1 for regression and binary."""
    target: str
    """The target column's name in the data."""
    class_names: tuple[str | int, ...] = ()
    """Label of each output, in order; of a binary task the negative and the positive class. Empty for regression, and
    for tokens that are their numbers."""
    threshold: Probability | None = None
    """binary: the positive class from this probability on; None: 0.5."""
    thresholds: tuple[Probability, ...] = ()
    """multilabel: a row has a label from this probability on; empty: 0.5 for each."""

    @model_validator(mode="after")
    def _fits_together(self) -> OutputSchema:
        if self.task == "binary" and (self.num_outputs != 1 or len(self.class_names) != 2):
            raise ValueError("a binary task has one output and two class names")
        if self.task == "multilabel" and len(self.class_names) != self.num_outputs:
            raise ValueError("a multilabel task has a name for each output")
        if self.thresholds and (self.task != "multilabel" or len(self.thresholds) != self.num_outputs):
            raise ValueError("thresholds are of a multilabel task, one for each label")
        return self

    @property
    def num_probabilities(self) -> int:
        """Of an answer: one for each class, label or token; 0 for regression, which answers with a value."""
        return {"regression": 0, "binary": 2}.get(self.task, self.num_outputs)

    @property
    def decision(self) -> tuple[float, ...]:
        """From which probability on the positive class, or each label, is the answer; empty for other tasks."""
        if self.task == "binary":
            return (0.5 if self.threshold is None else self.threshold,)
        return (self.thresholds or (0.5,) * self.num_outputs) if self.task == "multilabel" else ()


class FactorySpec(_Document):
    """How to rebuild the module where there is no `model.onnx`."""

    factory: str
    params: dict[str, Any]


class ClassScores(_Document):
    """How well one class, or one label, is found among the validation rows."""

    name: str | int
    rows: int
    """That have it."""
    precision: float
    recall: float
    f1: float
    roc_auc: float | None = None
    """None where no validation row has the class, or every one; as of `pr_auc`."""
    pr_auc: float | None = None


class ModelCard(_Document):
    """What a person should know before using the model."""

    rows: dict[str, int] = {}
    """Rows of each part of the data: train, validation, holdout."""
    num_parameters: int = 0
    confusion: tuple[tuple[int, ...], ...] = ()
    """Validation rows of each true class (row) by the class they were given (column), both in the order of
    `outputs.class_names`; empty for regression and for very many classes."""
    scores: dict[str, float] = {}
    """Over the validation rows, with the thresholds of `outputs`: accuracy, roc_auc, calibration_error ..."""
    per_class: tuple[ClassScores, ...] = ()
    """In the order of `outputs.class_names`; empty for regression and for very many classes."""


class Derivation(_Document):
    """How a bundle was made smaller from another one, whose `origin` it keeps unless it was trained on."""

    version: str
    """Of the bundle it was made from."""
    method: Literal["int8", "prune", "low_rank"]
    amount: float | None = None
    """Share of the weights that became zero (prune), or of the parameters that are left (low_rank)."""
    metric: str
    """What both were measured by, on the same rows."""
    before: float
    after: float
    rows: int


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
    input_range: tuple[float, float] | None = None
    """Least and largest value of the tensor column among training and validation rows; None for scalar columns."""
    ranges: dict[str, tuple[float, float]] = {}
    """The same of each scalar column; empty for a tensor column."""
    card: ModelCard | None = None
    derived_from: Derivation | None = None
    """None for a bundle as it was trained."""

    @property
    def model_input_shape(self) -> tuple[int, ...]:
        """Shape of one row as the model sees it, behind the preprocessing."""
        return self.preprocessing.output_shape(self.inputs.input_shape)


@dataclass(frozen=True, eq=False)
class Golden:
    """Questions to which the answers are known."""

    inputs: FloatArray
    """(rows, *input_shape), before standardisation."""
    outputs: FloatArray
    """(rows, num_outputs), as the module gave them when it was exported."""

    def pack(self) -> bytes:
        """The file's bytes."""
        tensors = {"inputs": np.ascontiguousarray(self.inputs), "outputs": np.ascontiguousarray(self.outputs)}
        return bytes(safetensors.numpy.save(tensors))


@dataclass(frozen=True)
class ModelBundle:
    """A verified bundle in memory, but for its holdout (`load_holdout`), which serving has no use for."""

    manifest: BundleManifest
    weights: bytes
    onnx: bytes | None
    version: str
    """First 12 hex digits of the weights' SHA-256: names what is being served."""
    golden: Golden | None = field(default=None, compare=False)
    """None where the module had no answer that could be served when it was exported; such a bundle is not served."""
    sizes: Mapping[str, int] = field(default_factory=dict, compare=False)
    """Bytes of each file, the holdout's too."""

    @classmethod
    def load(cls, location: str | os.PathLike[str] | Storage) -> ModelBundle:
        """Read a bundle folder and verify every hash but the holdout's; imports no torch, runs nothing.

        Raises:
            CorruptFile: a file differs from the manifest; names the file and both hashes.
            StorageError: the folder holds no bundle, one of a schema this version does not read, a file that no bundle
                has, or weights that are no safetensors or not finite.
        """
        storage = location if isinstance(location, Storage) else open_storage(location)
        document, manifest = _read_manifest(storage)
        entries = document["files"]
        files = read_files(storage, "", document, [name for name in entries if name != HOLDOUT])
        check_weights(files[WEIGHTS], f"{storage.uri}/{WEIGHTS}")
        golden = _unpack_golden(files[GOLDEN], manifest, f"{storage.uri}/{GOLDEN}") if GOLDEN in files else None
        sizes = {name: int(entry["size"]) for name, entry in entries.items()}
        return cls(manifest, files[WEIGHTS], files.get(ONNX), entries[WEIGHTS]["sha256"][:12], golden, sizes)


def save_bundle(
    storage: Storage,
    folder: str,
    manifest: BundleManifest,
    weights: bytes,
    onnx: bytes | None,
    golden: Golden | None = None,
    holdout: bytes | None = None,
) -> None:
    """Commit a bundle; the manifest is written last. `holdout` is what `pack_holdout` makes."""
    files = {WEIGHTS: weights, ONNX: onnx, GOLDEN: golden.pack() if golden is not None else None, HOLDOUT: holdout}
    storage.delete_folder(folder)
    present = {name: data for name, data in files.items() if data is not None}
    commit_folder(storage, folder, present, manifest.model_dump(mode="json"))


def is_outdated(storage: Storage) -> bool:
    """Whether the bundle here is of a schema older than this bigray writes."""
    try:
        return int(json.loads(storage.read_bytes(MANIFEST)).get("schema_version", SCHEMA_VERSION)) < SCHEMA_VERSION
    except (ValueError, TypeError, AttributeError):
        return True


def load_holdout(location: str | os.PathLike[str] | Storage) -> pa.Table | None:
    """The sealed rows of a bundle, raw, with their target column; None where it has none (driver).

    Raises:
        CorruptFile: they differ from the manifest.
        StorageError: they are no Arrow file of plain columns, or lack a column of the model.
    """
    storage = location if isinstance(location, Storage) else open_storage(location)
    document, manifest = _read_manifest(storage)
    if HOLDOUT not in document["files"]:
        return None
    place = f"{storage.uri}/{HOLDOUT}"
    data = read_files(storage, "", document, [HOLDOUT])[HOLDOUT]
    # whoever registered an extension type has its code run when a file names it: a bundle names none
    if _EXTENSION_KEY in data:
        raise StorageError(f"{place}: holds Arrow extension types; a bundle holds plain columns only")
    try:
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"{place}: not an Arrow file: {_first_line(error)}") from None
    wanted = [*(column.name for column in manifest.inputs.columns), manifest.outputs.target]
    if missing := [name for name in wanted if name not in table.column_names]:
        raise StorageError(f"{place}: lacks the column '{missing[0]}'")
    return table


def pack_holdout(table: pa.Table, seed: int = 0) -> bytes | None:
    """Sealed rows -> an Arrow file of plain columns; of many rows a sample. None of no rows."""
    if table.num_rows == 0:
        return None
    most = max(1, min(HOLDOUT_ROWS, int(HOLDOUT_BYTES * table.num_rows / max(1, table.nbytes))))
    if table.num_rows > most:
        chosen = np.random.default_rng(seed).choice(table.num_rows, most, replace=False)
        table = table.take(pa.array(np.sort(chosen)))
    plain = pa.table({name: _plain_column(table, name) for name in table.column_names})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, plain.schema) as writer:
        writer.write_table(plain)
    return bytes(sink.getvalue())


def check_weights(data: bytes, place: str) -> None:
    """Refuse weights that are no safetensors, or of which a number is NaN or infinite.

    Raises:
        StorageError: names `place`, and the tensor.
    """
    for name, tensor in _unpack(data, place):
        if not _is_finite(tensor):
            raise StorageError(
                f"{place}: tensor '{name}' holds NaN or infinite values; the training that made it went wrong"
            )


def _read_manifest(storage: Storage) -> tuple[dict[str, Any], BundleManifest]:
    """The manifest as it is on disk, and checked."""
    place = f"{storage.uri}/{MANIFEST}"
    if not storage.exists(MANIFEST):
        raise StorageError(f"{storage.uri}: no bundle here ({MANIFEST} is missing)")
    document = read_manifest(storage)
    _check_version(document.get("schema_version"), place)  # first: the fields of another version may be other ones
    _check_names(document["files"], place)
    try:
        manifest = BundleManifest.model_validate({key: value for key, value in document.items() if key != "files"})
    except ValidationError as error:
        first = error.errors()[0]
        raise StorageError(f"{place}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return document, manifest


def _check_version(version: Any, place: str) -> None:
    if version == SCHEMA_VERSION:
        return
    is_newer = isinstance(version, int) and version > SCHEMA_VERSION
    way_out = (
        "update bigray, or export it with this one"
        if is_newer
        else "run the same `bigray train` or `bigray tune` again, which exports it anew without training"
    )
    raise StorageError(f"{place}: schema_version {version}, this bigray reads {SCHEMA_VERSION}; {way_out}")


def _check_names(names: Iterable[str], place: str) -> None:
    if foreign := sorted(set(names) - set(FILES)):
        raise StorageError(f"{place}: lists '{foreign[0]}'; a bundle holds plain data only: {', '.join(FILES)}")
    if WEIGHTS not in names:
        raise StorageError(f"{place}: lists no {WEIGHTS}")


def _unpack(data: bytes, place: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Name and `{"dtype", "shape", "data"}` of each tensor; the library checks lengths, offsets and gaps."""
    try:
        tensors: list[tuple[str, Mapping[str, Any]]] = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except Exception as error:  # the library's own error, or what its parser makes of hostile bytes
        kind = ""
        if data.startswith((_PICKLE, _ZIP)):
            kind = "it begins like a pickle or a torch file, which may carry code and is never opened; "
        raise StorageError(f"{place}: not a safetensors file: {kind}{_first_line(error)}") from None
    return sorted(tensors, key=itemgetter(0))  # the library gives them in any order


def _is_finite(tensor: Mapping[str, Any]) -> bool:
    if tensor["dtype"] not in _FLOATS or not tensor["data"]:
        return True
    unsigned, least = _FLOATS[tensor["dtype"]]
    bits = np.frombuffer(tensor["data"], dtype=f"<{unsigned}")
    sign = 1 << (8 * bits.itemsize - 1)
    # seen as signed, the positive numbers are the largest; seen as unsigned, the negative ones: two passes, no copy
    largest_positive = int(bits.view(f"<i{bits.itemsize}").max())
    return largest_positive < least and int(bits.max()) < least + sign


def _unpack_golden(data: bytes, manifest: BundleManifest, place: str) -> Golden:
    found = dict(_unpack(data, place))
    shapes = {"inputs": manifest.inputs.input_shape, "outputs": (manifest.outputs.num_outputs,)}
    if set(found) != set(shapes) or any(tensor["dtype"] != "F32" for tensor in found.values()):
        raise StorageError(f"{place}: expected float32 tensors 'inputs' and 'outputs', found {_described(found)}")
    arrays = {name: np.frombuffer(one["data"], dtype="<f4").reshape(one["shape"]) for name, one in found.items()}
    rows = len(arrays["inputs"]) if arrays["inputs"].ndim else 0
    if rows == 0 or any(arrays[name].shape != (rows, *shape) for name, shape in shapes.items()):
        wanted = ", ".join(f"{name} (rows, {', '.join(map(str, shape))})" for name, shape in shapes.items())
        raise StorageError(f"{place}: expected {wanted} with the same rows, found {_described(found)}")
    return Golden(arrays["inputs"], arrays["outputs"])


def _described(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{name[:40]} {one['dtype']} {tuple(one['shape'])}" for name, one in tensors.items()) or "none"


def _plain_column(table: pa.Table, name: str) -> pa.Array | pa.ChunkedArray:
    """A column without an extension type: tensors as lists of fixed length."""
    kind = table.schema.field(name).type
    if not isinstance(kind, pa.BaseExtensionType):
        return table.column(name)
    if not isinstance(kind, pa.FixedShapeTensorType):
        return table.column(name).cast(kind.storage_type)
    values = column_to_numpy(table, name)
    column = pa.array(np.ascontiguousarray(values).reshape(-1))
    for size in reversed(values.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

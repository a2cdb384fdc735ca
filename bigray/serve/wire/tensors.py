"""Named tensors, in and out: what the HTTP and the gRPC side of the Open Inference Protocol have in common."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigray.bundle import BundleManifest, OutputSchema
from bigray.data.features import Column, FeatureSchema, holds_text
from bigray.data.targets import SEPARATOR
from bigray.errors import SpecError
from bigray.inference import Predictions
from bigray.serve.wire.binary import DTYPES, read_flags, read_numbers, read_strings, write_numbers, write_strings

FloatArray = NDArray[np.float32]

ACCEPTED = "send FP32 (or FP16, FP64, INT8 to INT64, UINT8 to UINT64)"
ACCEPTED_OF_KIND = {"number": ACCEPTED, "category": "send BYTES (or BOOL, or numbers)", "date": "send BYTES"}
SHARED_MEMORY = "shared_memory_region"


class InputTensor(NamedTuple):
    """One tensor of a request, nothing of it checked."""

    name: Any
    datatype: Any
    shape: Any
    data: Any
    """Raw bytes as a memoryview; or values, as a list (flat or nested, texts perhaps as bytes) or an array."""


class OutputTensor(NamedTuple):
    """One tensor of an answer, or of a request to be sent: a flat array, or a list of labels or values."""

    name: str
    datatype: str
    shape: list[int]
    data: Any

    def raw(self) -> bytes:
        """The data as the protocol's raw bytes."""
        return write_strings(self.data) if self.datatype == "BYTES" else write_numbers(self.data, self.datatype)


def decode_tensors(tensors: Sequence[InputTensor], schema: FeatureSchema) -> FloatArray:
    """The tensors of a request -> float32 array (rows, *input_shape).

    One tensor holds everything; a model of scalar columns also takes a tensor of shape [rows] or [rows, 1] for each.
    Columns that are not all plain numbers come so alone, each with its values as they are in a record: categories and
    dates as texts. A missing one is null in JSON, NaN in numbers, an empty text in BYTES.

    Raises:
        SpecError: another number of tensors, or one whose name, datatype, shape or data does not fit.
    """
    if not schema.is_plain:
        return _decode_raw_columns(tensors, schema)
    if len(tensors) == 1 and tensors[0].name == schema.tensor_name:
        return schema.checked(_decode(tensors[0], schema.input_shape))
    if schema.is_tensor:
        raise SpecError(f"inputs: expected exactly one tensor named '{schema.tensor_name}', got {_names(tensors)}")
    return _decode_columns(tensors, schema)


def input_tensors(schema: FeatureSchema, codes: FloatArray) -> list[OutputTensor]:
    """Codes (rows, *input_shape) -> the tensors of a request that has them, as `describe_inputs` lists them."""
    if schema.is_plain:
        return [OutputTensor(schema.tensor_name, "FP32", list(codes.shape), codes.reshape(-1))]
    records, tensors = schema.to_records(codes), []
    for column, description in zip(schema.columns, describe_inputs(schema), strict=True):
        values = [record[column.name] for record in records]
        missing = "" if description["datatype"] == "BYTES" else math.nan
        shown = [missing if value is None else value for value in values]
        tensors.append(OutputTensor(column.name, description["datatype"], [len(codes)], shown))
    return tensors


def output_tensors(predictions: Predictions, label_datatype: str) -> list[OutputTensor]:
    """Every output of the model, in the order of its description."""
    if predictions.values is not None:
        return [OutputTensor("prediction", "FP32", [len(predictions.values)], predictions.values)]
    labels, probabilities = predictions.labels, predictions.probabilities
    assert labels is not None and probabilities is not None, "all but a regression have both"
    shown = [_label_text(label) for label in labels] if label_datatype == "BYTES" else labels
    flat = np.ascontiguousarray(probabilities).reshape(-1)
    return [
        OutputTensor("label", label_datatype, [len(labels)], shown),
        OutputTensor("probabilities", "FP32", list(probabilities.shape), flat),
    ]


def describe_inputs(schema: FeatureSchema) -> list[dict[str, Any]]:
    """Name, datatype and shape of each input; -1 marks the batch axis."""
    if not schema.is_plain:
        kinds = {"number": "FP32"}
        return [{"name": one.name, "datatype": kinds.get(one.kind, "BYTES"), "shape": [-1]} for one in schema.columns]
    return [{"name": schema.tensor_name, "datatype": "FP32", "shape": [-1, *schema.input_shape]}]


def describe_outputs(outputs: OutputSchema) -> list[dict[str, Any]]:
    """Name, datatype and shape of each output; -1 marks the batch axis."""
    if outputs.task == "regression":
        return [{"name": "prediction", "datatype": "FP32", "shape": [-1]}]
    return [
        {"name": "label", "datatype": label_datatype(outputs), "shape": [-1]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, outputs.num_probabilities]},
    ]


def platform_of(backend: str) -> str:
    """The protocol's word for what runs the model."""
    return {"onnxruntime": "onnxruntime_onnx", "torch": "pytorch"}[backend]


def label_datatype(outputs: OutputSchema) -> str:
    """A row's labels of a multilabel task are one text: the protocol has no lists of different lengths."""
    return "BYTES" if outputs.task == "multilabel" else _datatype(outputs.class_names)


@lru_cache(64)
def _datatype(labels: tuple[str | int, ...]) -> str:
    return "BYTES" if any(isinstance(label, str) for label in labels) else "INT64"


def _label_text(label: Any) -> str:
    return SEPARATOR.join(map(str, label)) if isinstance(label, list) else str(label)


def check_output_name(name: Any, manifest: BundleManifest) -> str:
    """The name of an output that was asked for."""
    known = ("prediction",) if manifest.outputs.task == "regression" else ("label", "probabilities")
    if name not in known:
        raise SpecError(f"outputs: the model has no output {_shown(name)}, only {', '.join(known)}")
    return str(name)


def _decode_columns(tensors: Sequence[InputTensor], schema: FeatureSchema) -> FloatArray:
    names = [column.name for column in schema.columns]
    if len(tensors) != len(names) or {str(tensor.name) for tensor in tensors} != set(names):
        whole = f"one tensor named '{schema.tensor_name}' of shape [rows, {len(names)}]"
        raise SpecError(f"inputs: expected {whole}, or one for each column ({_listed(names)}), got {_names(tensors)}")
    by_name = {tensor.name: _decode_column(tensor) for tensor in tensors}
    _check_lengths([len(values) for values in by_name.values()])
    return schema.checked(np.stack([by_name[name] for name in names], axis=1))


def _decode_raw_columns(tensors: Sequence[InputTensor], schema: FeatureSchema) -> FloatArray:
    names = [column.name for column in schema.columns]
    by_name = {str(tensor.name): tensor for tensor in tensors}
    if len(tensors) != len(names) or by_name.keys() != set(names):
        raise SpecError(f"inputs: expected a tensor for each column ({_listed(names)}), got {_names(tensors)}")
    columns = [_raw_values(by_name[column.name], column) for column in schema.columns]
    _check_lengths([len(values) for values in columns])
    return schema.checked(list(zip(*columns, strict=True)))


def _check_lengths(lengths: Sequence[int]) -> None:
    if len(set(lengths)) > 1:
        raise SpecError(f"inputs: the columns have different numbers of rows, from {min(lengths)} to {max(lengths)}")


def _raw_values(tensor: InputTensor, column: Column) -> list[Any]:
    """The values of a column, as a record would hold them."""
    name, datatype = str(tensor.name), tensor.datatype
    others = {"category": ("BYTES", "BOOL"), "date": ("BYTES",)}.get(column.kind, ())
    if not isinstance(datatype, str) or (datatype not in DTYPES and datatype not in others):
        raise SpecError(f"{name}: datatype {_shown(datatype)} is not accepted, {ACCEPTED_OF_KIND[column.kind]}")
    is_column = isinstance(tensor.shape, list) and len(tensor.shape) == 2
    shape = _checked_shape(name, tensor.shape, (1,) if is_column else ())
    values = _flat_values(tensor.data, datatype, shape, name)
    if len(values) != shape[0]:
        raise SpecError(f"{name}: data has {len(values)} values, expected {shape}, flat or nested")
    return _texts(values, name) if datatype == "BYTES" else _checked_values(values, datatype, name)


def _flat_values(data: Any, datatype: str, shape: list[int], name: str) -> list[Any]:
    if isinstance(data, memoryview):
        if datatype == "BYTES":
            return list(read_strings(data))
        data = read_flags(data) if datatype == "BOOL" else read_numbers(data, datatype, shape, name)
    if isinstance(data, np.ndarray):
        return data.reshape(-1).tolist()
    if not isinstance(data, list):
        raise SpecError(f"{name}: expected data, a list of {shape[0]} values")
    return [one[0] if type(one) is list and len(one) == 1 else one for one in data] if len(shape) == 2 else data


def _texts(values: list[Any], name: str) -> list[Any]:
    found = []
    for row, value in enumerate(values):
        if not (value is None or isinstance(value, str | bytes)):
            raise SpecError(f"{name}: datatype BYTES, but row {row} is {_shown(value)}")
        try:
            found.append(value.decode() if isinstance(value, bytes) else value)
        except UnicodeDecodeError:
            raise SpecError(f"{name}: row {row} is not UTF-8") from None
    return found


def _checked_values(values: list[Any], datatype: str, name: str) -> list[Any]:
    """As they are, where they are what the datatype says; null is for the schema to judge."""
    kinds = (bool,) if datatype == "BOOL" else (int, float)
    for row, value in enumerate(values):
        if value is not None and type(value) not in kinds:
            raise SpecError(f"{name}: datatype {datatype}, but row {row} is {_shown(value)}")
    if datatype == "BOOL":
        return values
    numbers = np.asarray([value for value in values if value is not None])
    if numbers.dtype.kind not in "iuf":
        raise SpecError(f"{name}: data holds numbers that are too large")
    _check_range(name, datatype, numbers)
    return values


def _decode_column(tensor: InputTensor) -> NDArray[Any]:
    is_column = isinstance(tensor.shape, list) and len(tensor.shape) == 2
    values = _decode(tensor, (1,) if is_column else ())
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf":
        raise SpecError(f"{tensor.name}: expected numbers")
    return values.reshape(-1)


def _decode(tensor: InputTensor, sample_shape: tuple[int, ...]) -> Any:
    """The values in the shape that the tensor names; as they came where they are not numbers, for a better message."""
    name, datatype = str(tensor.name), tensor.datatype
    if not isinstance(datatype, str) or datatype not in DTYPES:
        raise SpecError(f"{name}: datatype {_shown(datatype)} is not accepted, {ACCEPTED}")
    shape = _checked_shape(name, tensor.shape, sample_shape)
    if isinstance(tensor.data, memoryview):
        return read_numbers(tensor.data, datatype, shape, name)
    return _decode_values(name, datatype, shape, tensor.data)


def _checked_shape(name: str, shape: Any, sample_shape: tuple[int, ...]) -> list[int]:
    # by type, since `True` equals 1
    is_list = isinstance(shape, list) and set(map(type, shape)) == {int}
    if not is_list or tuple(shape[1:]) != sample_shape or shape[0] < 1:
        expected = f"[{', '.join(('rows', *map(str, sample_shape)))}]"
        raise SpecError(f"{name}: wrong shape {_shown(shape)}, expected {expected} with at least one row")
    return shape  # type: ignore[no-any-return]


def _decode_values(name: str, datatype: str, shape: list[int], data: Any) -> Any:
    try:
        values = _as_array(data)
    except (ValueError, OverflowError):
        raise SpecError(f"{name}: data is ragged, expected shape {shape}, flat or nested") from None
    if values.dtype.kind not in "iuf":
        return data
    _check_range(name, datatype, values)
    if values.shape != tuple(shape):
        if values.ndim != 1 or values.size != math.prod(shape):
            raise SpecError(f"{name}: data has shape {list(values.shape)}, expected {shape}, flat or nested")
        values = values.reshape(shape)
    return values


def _as_array(data: Any) -> NDArray[Any]:
    """Like `np.asarray`, and twice as fast on the flat list of numbers that clients send."""
    if type(data) is list and data and type(data[0]) in (float, int):
        try:
            return np.frombuffer(array("d", data), np.float64)
        except (TypeError, OverflowError):
            pass  # not numbers all through, or nested
    if isinstance(data, list) and holds_text(data):
        raise SpecError("data: expected numbers, flat or nested")
    return np.asarray(data)


def _check_range(name: str, datatype: str, values: NDArray[Any]) -> None:
    """JSON has one kind of number; what the datatype says of them has to be true all the same."""
    if DTYPES[datatype].kind == "f" or not values.size:
        return
    limits = np.iinfo(DTYPES[datatype])
    if values.dtype.kind == "f" and not (values == np.trunc(values)).all():
        raise SpecError(f"{name}: datatype {datatype}, but the data holds fractions")
    if values.min() < limits.min or values.max() > limits.max:
        raise SpecError(f"{name}: datatype {datatype}, but the data is not within {limits.min} to {limits.max}")


def _names(tensors: Sequence[InputTensor]) -> str:
    return _listed([str(tensor.name)[:40] for tensor in tensors]) or "none"


def _listed(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

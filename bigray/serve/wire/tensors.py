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
from bigray.data.features import FeatureSchema, holds_text
from bigray.errors import SpecError
from bigray.inference import Predictions
from bigray.serve.wire.binary import DTYPES, read_numbers, write_numbers, write_strings

FloatArray = NDArray[np.float32]

ACCEPTED = "send FP32 (or FP16, FP64, INT8 to INT64, UINT8 to UINT64)"
SHARED_MEMORY = "shared_memory_region"


class InputTensor(NamedTuple):
    """One tensor of a request, nothing of it checked."""

    name: Any
    datatype: Any
    shape: Any
    data: Any
    """Raw bytes as a memoryview; or numbers, as a list (flat or nested) or an array."""


class OutputTensor(NamedTuple):
    """One tensor of an answer; labels are a list, the rest a flat array."""

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

    Raises:
        SpecError: another number of tensors, or one whose name, datatype, shape or data does not fit.
    """
    if len(tensors) == 1 and tensors[0].name == schema.tensor_name:
        return schema.checked(_decode(tensors[0], schema.input_shape))
    if schema.is_tensor:
        raise SpecError(f"inputs: expected exactly one tensor named '{schema.tensor_name}', got {_names(tensors)}")
    return _decode_columns(tensors, schema)


def output_tensors(predictions: Predictions, label_datatype: str) -> list[OutputTensor]:
    """Every output of the model, in the order of its description."""
    if predictions.values is not None:
        return [OutputTensor("prediction", "FP32", [len(predictions.values)], predictions.values)]
    labels, probabilities = predictions.labels, predictions.probabilities
    assert labels is not None and probabilities is not None, "a classification has both"
    shown = [str(label) for label in labels] if label_datatype == "BYTES" else labels
    flat = np.ascontiguousarray(probabilities).reshape(-1)
    return [
        OutputTensor("label", label_datatype, [len(labels)], shown),
        OutputTensor("probabilities", "FP32", list(probabilities.shape), flat),
    ]


def describe_inputs(schema: FeatureSchema) -> list[dict[str, Any]]:
    """Name, datatype and shape of the input; -1 marks the batch axis."""
    return [{"name": schema.tensor_name, "datatype": "FP32", "shape": [-1, *schema.input_shape]}]


def describe_outputs(outputs: OutputSchema) -> list[dict[str, Any]]:
    """Name, datatype and shape of each output; -1 marks the batch axis."""
    if outputs.task == "regression":
        return [{"name": "prediction", "datatype": "FP32", "shape": [-1]}]
    return [
        {"name": "label", "datatype": label_datatype(outputs), "shape": [-1]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, outputs.num_outputs]},
    ]


def platform_of(backend: str) -> str:
    """The protocol's word for what runs the model."""
    return {"onnxruntime": "onnxruntime_onnx", "torch": "pytorch"}[backend]


def label_datatype(outputs: OutputSchema) -> str:
    return _datatype(outputs.class_names)


@lru_cache(64)
def _datatype(labels: tuple[str | int, ...]) -> str:
    return "BYTES" if any(isinstance(label, str) for label in labels) else "INT64"


def check_output_name(name: Any, manifest: BundleManifest) -> str:
    """The name of an output that was asked for."""
    known = ("label", "probabilities") if manifest.outputs.task == "classification" else ("prediction",)
    if name not in known:
        raise SpecError(f"outputs: the model has no output {_shown(name)}, only {', '.join(known)}")
    return str(name)


def _decode_columns(tensors: Sequence[InputTensor], schema: FeatureSchema) -> FloatArray:
    names = [column.name for column in schema.columns]
    if len(tensors) != len(names) or {str(tensor.name) for tensor in tensors} != set(names):
        whole = f"one tensor named '{schema.tensor_name}' of shape [rows, {len(names)}]"
        raise SpecError(f"inputs: expected {whole}, or one for each column ({_listed(names)}), got {_names(tensors)}")
    by_name = {tensor.name: _decode_column(tensor) for tensor in tensors}
    if len(lengths := {len(values) for values in by_name.values()}) > 1:
        raise SpecError(f"inputs: the columns have different numbers of rows, from {min(lengths)} to {max(lengths)}")
    return schema.checked(np.stack([by_name[name] for name in names], axis=1))


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

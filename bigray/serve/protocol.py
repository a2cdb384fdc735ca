"""What travels over HTTP: JSON records for people, and Open Inference Protocol v2 tensors for inference clients.

Pure functions of bytes and arrays: no network, no Ray. A request that does not fit the model raises `SpecError`, whose
message is the answer's text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from bigray.bundle import BundleManifest, OutputSchema
from bigray.data.features import FeatureSchema
from bigray.errors import SpecError
from bigray.inference import Predictions

FloatArray = NDArray[np.float32]

INTEGER_TYPES = frozenset(f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64))
FLOAT_TYPES = frozenset({"FP16", "FP32", "FP64"})


@dataclass(frozen=True)
class InferRequest:
    """A decoded `/infer` body."""

    rows: FloatArray
    """(rows, *input_shape), checked."""
    id: str | None
    """The caller's own name for the request, sent back."""
    outputs: tuple[str, ...]
    """Names of the outputs asked for; empty for all."""


def parse_json(body: bytes) -> dict[str, Any]:
    """A body -> its JSON object."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise SpecError(f"body: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise SpecError(f"body: expected a JSON object, got {_json_kind(document)}")
    return document


def decode_records(body: bytes, schema: FeatureSchema) -> FloatArray:
    """`{"records": [{column: value}]}` -> float32 array (rows, *input_shape)."""
    document = parse_json(body)
    if "records" not in document:
        raise SpecError("body: missing 'records', a list of objects with one value for each column")
    return schema.from_records(document["records"])


def encode_records(predictions: Predictions, model: str, version: str) -> bytes:
    """Answer of `/predict`: `{"model", "version", "predictions": [{"label", "probabilities"} or {"value"}]}`."""
    records: list[dict[str, Any]]
    if predictions.values is not None:
        records = [{"value": value} for value in predictions.values.tolist()]
    else:
        assert predictions.labels is not None
        assert predictions.probabilities is not None
        pairs = zip(predictions.labels, predictions.probabilities, strict=True)
        records = [{"label": label, "probabilities": row} for label, row in pairs]
    document = {"model": model, "version": version, "predictions": records}
    # rows stay numpy float32: orjson writes their shortest exact form, half as long as the doubles of tolist()
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def decode_infer(body: bytes, manifest: BundleManifest) -> InferRequest:
    """An Open Inference Protocol v2 request with its one input tensor as JSON."""
    document = parse_json(body)
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise SpecError(f"inputs: expected a list with exactly one tensor named '{manifest.inputs.tensor_name}'")
    rows = _decode_tensor(inputs[0], manifest.inputs)
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise SpecError(f"id: expected a string, got {_json_kind(request_id)}")
    return InferRequest(rows, request_id, _decode_output_names(document.get("outputs"), manifest.outputs))


def encode_infer(predictions: Predictions, request: InferRequest, model: str, version: str) -> bytes:
    """Answer of `/infer`: every output tensor asked for, data flattened in row-major order."""
    tensors = output_tensors(predictions)
    wanted = request.outputs or tuple(tensors)
    document: dict[str, Any] = {"model_name": model, "model_version": version}
    if request.id is not None:
        document["id"] = request.id
    document["outputs"] = [
        {"name": name, "datatype": datatype, "shape": shape, "data": data}
        for name, (datatype, shape, data) in tensors.items()
        if name in wanted
    ]
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def output_tensors(predictions: Predictions) -> dict[str, tuple[str, list[int], Any]]:
    """Name -> (datatype, shape, flat data) of each output."""
    if predictions.values is not None:
        return {"prediction": ("FP32", [len(predictions.values)], predictions.values)}
    labels, probabilities = predictions.labels, predictions.probabilities
    assert labels is not None
    assert probabilities is not None
    return {
        "label": (label_datatype(labels), [len(labels)], labels),
        "probabilities": ("FP32", list(probabilities.shape), np.ascontiguousarray(probabilities).reshape(-1)),
    }


def describe_model(manifest: BundleManifest, version: str, platform: str) -> dict[str, Any]:
    """Model metadata of the Open Inference Protocol; -1 marks the batch axis."""
    schema, outputs = manifest.inputs, manifest.outputs
    tensors: list[dict[str, Any]] = [{"name": "prediction", "datatype": "FP32", "shape": [-1]}]
    if outputs.task == "classification":
        tensors = [
            {"name": "label", "datatype": label_datatype(outputs.class_names), "shape": [-1]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, outputs.num_outputs]},
        ]
    return {
        "name": manifest.name,
        "versions": [version],
        "platform": platform,
        "inputs": [{"name": schema.tensor_name, "datatype": "FP32", "shape": [-1, *schema.input_shape]}],
        "outputs": tensors,
    }


def label_datatype(labels: list[str | int] | tuple[str | int, ...]) -> str:
    return "BYTES" if any(isinstance(label, str) for label in labels) else "INT64"


def _decode_tensor(tensor: dict[str, Any], schema: FeatureSchema) -> FloatArray:
    name = schema.tensor_name
    if tensor.get("name") != name:
        raise SpecError(f"inputs.0.name: expected '{name}', got {tensor.get('name')!r}")
    datatype = tensor.get("datatype")
    if datatype not in FLOAT_TYPES and datatype not in INTEGER_TYPES:
        raise SpecError(f"{name}: datatype {datatype!r} is not accepted, send FP32 (or FP16, FP64, INT*, UINT*)")
    shape = _decode_shape(tensor.get("shape"), schema)
    try:
        values = np.asarray(tensor.get("data"))
    except ValueError:
        raise SpecError(f"{name}: data is ragged, expected shape {tuple(shape)}, flat or nested") from None
    if datatype in INTEGER_TYPES and values.dtype.kind == "f":
        raise SpecError(f"{name}: datatype {datatype}, but the data holds fractions")
    if values.dtype.kind in "iuf" and values.shape != tuple(shape):
        if values.ndim != 1 or values.size != np.prod(shape):
            raise SpecError(f"{name}: data has shape {values.shape}, expected {tuple(shape)}, flat or nested")
        values = values.reshape(shape)
    return schema.checked(values if values.dtype.kind in "iuf" else tensor.get("data"))


def _decode_shape(shape: Any, schema: FeatureSchema) -> list[int]:
    expected = f"[rows, {', '.join(map(str, schema.input_shape))}]"
    is_list = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not is_list or shape[1:] != list(schema.input_shape) or shape[0] == 0:
        raise SpecError(f"{schema.tensor_name}: wrong shape {shape}, expected {expected} with at least one row")
    return shape  # type: ignore[no-any-return]


def _decode_output_names(outputs: Any, schema: OutputSchema) -> tuple[str, ...]:
    if outputs is None:
        return ()
    known = ("label", "probabilities") if schema.task == "classification" else ("prediction",)
    if not isinstance(outputs, list):
        raise SpecError(f"outputs: expected a list of objects with a 'name' out of {', '.join(known)}")
    names = tuple(str(output.get("name")) if isinstance(output, dict) else str(output) for output in outputs)
    for name in names:
        if name not in known:
            raise SpecError(f"outputs: the model has no output {name!r}, only {', '.join(known)}")
    return names


def _json_kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")

"""The Open Inference Protocol v2 over HTTP: tensors as JSON, or as raw bytes behind a JSON header.

Pure functions of bytes and arrays: no network, no Ray. A request that does not fit the model raises `SpecError`, whose
message is the answer's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version as installed_version
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from bigray.bundle import BundleManifest
from bigray.data.features import FeatureSchema
from bigray.errors import SpecError
from bigray.inference import Predictions
from bigray.serve.http import Answer
from bigray.serve.wire.tensors import (
    SHARED_MEMORY,
    InputTensor,
    OutputTensor,
    check_output_name,
    decode_tensors,
    describe_inputs,
    describe_outputs,
    input_tensors,
    label_datatype,
    output_tensors,
    platform_of,
)

FloatArray = NDArray[np.float32]

HEADER_LENGTH = b"inference-header-content-length"
BINARY = b"application/octet-stream"
EXTENSIONS = ("binary_tensor_data", "model_configuration")
"""Names of the protocol's extensions that are spoken here."""


class InferRequest(NamedTuple):
    """A decoded `/infer` request, of HTTP or gRPC."""

    rows: FloatArray
    """(rows, *input_shape), checked."""
    label_datatype: str
    """BYTES or INT64: the same for every batch of a model."""
    id: str | None = None
    """The caller's own name for the request, sent back."""
    outputs: tuple[str, ...] = ()
    """Names of the outputs asked for; empty for all."""
    binary: bool = False
    """Whether outputs go back as raw bytes, where `binary_outputs` says nothing of them."""
    binary_outputs: tuple[tuple[str, bool], ...] = ()

    def wanted(self, predictions: Predictions) -> list[OutputTensor]:
        """The output tensors asked for."""
        tensors = output_tensors(predictions, self.label_datatype)
        return [tensor for tensor in tensors if tensor.name in self.outputs] if self.outputs else tensors

    def is_binary(self, name: str) -> bool:
        return dict(self.binary_outputs).get(name, self.binary) if self.binary_outputs else self.binary


def parse_json(body: bytes | memoryview) -> dict[str, Any]:
    """A body -> its JSON object; of a key that comes twice, the last."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise SpecError(f"body: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise SpecError(f"body: expected a JSON object, got {_json_kind(document)}")
    return document


def header_length(text: str) -> int | None:
    """The request header `Inference-Header-Content-Length` -> bytes of JSON before the raw tensors; None without it."""
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise SpecError(f"Inference-Header-Content-Length: expected a number of bytes, got '{text[:40]}'")
    return int(text)


def decode_infer(body: bytes, manifest: BundleManifest, header_length: int | None = None) -> InferRequest:
    """An inference request; with `header_length`, so many bytes of JSON come first and raw tensors behind them."""
    if header_length is None:
        document, binary = parse_json(body), None
    else:
        if header_length > len(body):
            raise SpecError(f"Inference-Header-Content-Length: {header_length}, but the body has {len(body)} bytes")
        view = memoryview(body)
        document, binary = parse_json(view[:header_length]), view[header_length:]
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise SpecError(f"id: expected a string, got {_json_kind(request_id)}")
    outputs, binary_outputs = _decode_outputs(document.get("outputs"), manifest)
    return InferRequest(
        rows=decode_tensors(_input_tensors(document.get("inputs"), binary), manifest.inputs),
        label_datatype=label_datatype(manifest.outputs),
        id=request_id,
        outputs=outputs,
        binary=_flag(_parameters(document, "parameters"), "binary_data_output") or False,
        binary_outputs=binary_outputs,
    )


def encode_request(schema: FeatureSchema, codes: FloatArray, outputs: Sequence[str] = ()) -> tuple[bytes, int]:
    """A request for rows that have these codes (rows, *input_shape), raw both ways -> its body and its header's length.

    `outputs` are the names of those asked for; none for all.
    """
    tensors = [(one, one.raw()) for one in input_tensors(schema, codes)]
    described = [
        {"name": one.name, "datatype": one.datatype, "shape": one.shape, "parameters": {"binary_data_size": len(raw)}}
        for one, raw in tensors
    ]
    document: dict[str, Any] = {"inputs": described, "parameters": {"binary_data_output": True}}
    if outputs:
        document["outputs"] = [{"name": name} for name in outputs]
    header = orjson.dumps(document)
    return b"".join((header, *(raw for _, raw in tensors))), len(header)


def encode_infer(predictions: Predictions, request: InferRequest, model: str, version: str) -> Answer:
    """Every output tensor asked for, data flattened in row-major order."""
    document: dict[str, Any] = {"model_name": model, "model_version": version}
    if request.id is not None:
        document["id"] = request.id
    parts: list[bytes] = []
    document["outputs"] = [_encode_output(tensor, request, parts) for tensor in request.wanted(predictions)]
    # arrays stay numpy float32: orjson writes their shortest exact form, half as long as the doubles of tolist()
    header = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if not parts:
        return Answer(header)
    length = (HEADER_LENGTH, str(len(header)).encode())
    return Answer(b"".join((header, *parts)), BINARY, headers=(length,))


def describe_server() -> dict[str, Any]:
    """Server metadata."""
    return {"name": "bigray", "version": installed_version("bigray"), "extensions": list(EXTENSIONS)}


def describe_model(
    manifest: BundleManifest, versions: Sequence[str], backend: str, name: str | None = None
) -> dict[str, Any]:
    """Model metadata; `backend` is `onnxruntime` or `torch`."""
    return {
        "name": name or manifest.name,
        "versions": list(versions),
        "platform": platform_of(backend),
        "inputs": describe_inputs(manifest.inputs),
        "outputs": describe_outputs(manifest.outputs),
    }


def describe_config(manifest: BundleManifest, backend: str, name: str | None = None) -> dict[str, Any]:
    """The few fields of Triton's model configuration that are true here: the batch axis is part of each shape."""
    return {
        "name": name or manifest.name,
        "platform": platform_of(backend),
        "backend": backend,
        "max_batch_size": 0,
        "input": [_config_tensor(tensor) for tensor in describe_inputs(manifest.inputs)],
        "output": [_config_tensor(tensor) for tensor in describe_outputs(manifest.outputs)],
    }


def _config_tensor(tensor: dict[str, Any]) -> dict[str, Any]:
    kind = "STRING" if tensor["datatype"] == "BYTES" else tensor["datatype"]
    return {"name": tensor["name"], "data_type": f"TYPE_{kind}", "dims": tensor["shape"]}


def _input_tensors(inputs: Any, binary: memoryview | None) -> list[InputTensor]:
    if not isinstance(inputs, list) or set(map(type, inputs)) != {dict}:
        raise SpecError("inputs: expected a list of tensors with name, datatype, shape and data")
    tensors: list[InputTensor] = []
    taken = 0
    for tensor in inputs:
        name = tensor.get("name")
        size = _binary_size(tensor)
        if size is None:
            data = tensor.get("data")
        elif binary is None:
            raise SpecError(f"{name}: raw data takes the header Inference-Header-Content-Length")
        else:
            data = binary[taken : taken + size]
            taken += size
        tensors.append(InputTensor(name, tensor.get("datatype"), tensor.get("shape"), data))
    if binary is not None and taken != len(binary):
        raise SpecError(f"inputs: 'binary_data_size' comes to {taken} bytes, but {len(binary)} follow the JSON")
    return tensors


def _binary_size(tensor: dict[str, Any]) -> int | None:
    if tensor.get("parameters") is None:
        return None
    parameters = _parameters(tensor, f"{tensor.get('name')}: parameters")
    if SHARED_MEMORY in parameters:
        raise SpecError(f"{tensor.get('name')}: shared memory is not supported, send the data in the body")
    size = parameters.get("binary_data_size")
    if size is not None and (type(size) is not int or size < 0):
        raise SpecError(f"{tensor.get('name')}: binary_data_size: expected a number of bytes, got {_json_kind(size)}")
    return size


def _decode_outputs(outputs: Any, manifest: BundleManifest) -> tuple[tuple[str, ...], tuple[tuple[str, bool], ...]]:
    if outputs is None:
        return (), ()
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        raise SpecError("outputs: expected a list of objects with a 'name'")
    names: list[str] = []
    binary: list[tuple[str, bool]] = []
    for output in outputs:
        name = check_output_name(output.get("name"), manifest)
        parameters = _parameters(output, f"outputs: {name}: parameters")
        for word in (SHARED_MEMORY, "classification"):
            if word in parameters:
                raise SpecError(f"outputs: {name}: '{word}' is not supported")
        if (flag := _flag(parameters, "binary_data")) is not None:
            binary.append((name, flag))
        names.append(name)
    return tuple(names), tuple(binary)


def _encode_output(tensor: OutputTensor, request: InferRequest, parts: list[bytes]) -> dict[str, Any]:
    document: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
    if request.is_binary(tensor.name):
        raw = tensor.raw()
        parts.append(raw)
        document["parameters"] = {"binary_data_size": len(raw)}
    else:
        document["data"] = tensor.data
    return document


def _parameters(document: dict[str, Any], place: str) -> dict[str, Any]:
    parameters = document.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise SpecError(f"{place}: expected an object, got {_json_kind(parameters)}")
    return parameters


def _flag(parameters: dict[str, Any], name: str) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise SpecError(f"parameters: {name}: expected true or false, got {_json_kind(value)}")
    return value


def _json_kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")

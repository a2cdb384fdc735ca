"""The Open Inference Protocol v2 over gRPC: the same requests as over HTTP, for a Serve replica or any gRPC server.

A caller's mistake is answered with a status code and an empty message rather than an exception, which Serve would log.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import grpc  # type: ignore[import-untyped, unused-ignore]
import numpy as np
from numpy.typing import NDArray

from bigray.bundle import BundleManifest
from bigray.errors import SpecError
from bigray.inference import Predictions
from bigray.serve.http import Refusal
from bigray.serve.wire.binary import DTYPES
from bigray.serve.wire.grpc_messages import CONFIG_TYPES, METHODS, SERVICE, message_class
from bigray.serve.wire.protocol import InferRequest, describe_config, describe_model, describe_server
from bigray.serve.wire.tensors import SHARED_MEMORY, InputTensor, check_output_name, decode_tensors, label_datatype

FloatArray = NDArray[np.float32]
Answering = Callable[[], Awaitable[Any]]

LONGEST_DETAILS = 1000
"""Characters of a message; it travels in a header, and those are short."""
MOST_PARAMETERS, MOST_OUTPUTS = 64, 64
"""Two bytes of a message can make a part of it, and each is looked at: what no client sends is refused by number."""

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Status of HTTP -> that of gRPC."""

TYPED_CONTENTS = {
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
    "BOOL": "bool_contents",
}
"""Which field holds the values of a datatype, where they are not sent raw; FP16 has none."""

# Serve sends this logger to the replica's own log file
_logger = logging.getLogger("ray.serve")


class Model(Protocol):
    """One loaded version of a model."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def backend(self) -> str: ...

    @property
    def manifest(self) -> BundleManifest: ...

    def check_room(self) -> None: ...

    async def submit(self, rows: FloatArray) -> Predictions: ...


class Backend(Protocol):
    """What answers the requests. Each method may raise `Refusal`."""

    def find(self, name: str | None, version: str | None, sticky: str) -> Model: ...

    def authorize(self, metadata: Mapping[bytes, bytes], scope: str) -> Any: ...

    def names(self) -> Sequence[str]: ...

    def is_loaded(self, name: str) -> bool:
        """Without having it loaded, which `find` may."""


def add_inference_service(servicer: Any, server: Any) -> None:
    """Register the service's methods with a gRPC server; what Serve's `grpc_servicer_functions` names."""
    handlers = {
        method: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, method),
            request_deserializer=message_class(f"{method}Request").FromString,
            response_serializer=message_class(f"{method}Response").SerializeToString,
        )
        for method in METHODS
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


class InferenceMethods:
    """The service's methods, for a class that has a `_grpc_backend` (replica, event loop).

    The parameter's name `grpc_context` is how Serve knows that a method wants the context.
    """

    _grpc_backend: Backend

    async def ServerLive(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return message_class("ServerLiveResponse")(live=True)

    async def ServerReady(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return message_class("ServerReadyResponse")(ready=True)

    async def ServerMetadata(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return message_class("ServerMetadataResponse")(**describe_server())

    async def ModelReady(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """Not ready rather than not found: the question is whether it can be asked."""
        try:
            ready = not request.name or self._grpc_backend.is_loaded(request.name)
            if ready:
                self._grpc_backend.find(request.name or None, request.version or None, "")
        except Refusal:
            ready = False
        return message_class("ModelReadyResponse")(ready=ready)

    async def ModelMetadata(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        async def answer() -> Any:
            model = self._find(request.name, request.version, grpc_context)
            document = describe_model(model.manifest, [model.version], model.backend, model.name)
            return message_class("ModelMetadataResponse")(**document)

        return await _answered("ModelMetadata", grpc_context, answer)

    async def ModelConfig(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        async def answer() -> Any:
            model = self._find(request.name, request.version, grpc_context)
            document = describe_config(model.manifest, model.backend, model.name)
            for tensor in (*document["input"], *document["output"]):
                tensor["data_type"] = CONFIG_TYPES[tensor["data_type"]]
            return message_class("ModelConfigResponse")(config=document)

        return await _answered("ModelConfig", grpc_context, answer)

    async def RepositoryIndex(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        async def answer() -> Any:
            self._grpc_backend.authorize(_metadata(grpc_context), "predict")
            models = [self._index_entry(name) for name in self._grpc_backend.names()]
            return message_class("RepositoryIndexResponse")(
                models=[model for model in models if model["state"] == "READY" or not request.ready]
            )

        return await _answered("RepositoryIndex", grpc_context, answer)

    async def ModelInfer(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        async def answer() -> Any:
            model = self._find(request.model_name, request.model_version, grpc_context)
            model.check_room()
            asked = decode_request(request, model.manifest)
            return encode_response(await model.submit(asked.rows), asked, model.name, model.version)

        return await _answered("ModelInfer", grpc_context, answer)

    def _find(self, name: str, version: str, grpc_context: Any) -> Model:
        metadata = _metadata(grpc_context)
        self._grpc_backend.authorize(metadata, "predict")
        sticky = metadata.get(b"x-bigray-key", b"").decode("latin-1")
        return self._grpc_backend.find(name or None, version or None, sticky)

    def _index_entry(self, name: str) -> dict[str, str]:
        if not self._grpc_backend.is_loaded(name):
            return {"name": name, "state": "UNAVAILABLE"}
        return {"name": name, "version": self._grpc_backend.find(name, None, "").version, "state": "READY"}


def decode_request(request: Any, manifest: BundleManifest) -> InferRequest:
    """A `ModelInferRequest` -> its rows, checked, and what is wanted of the answer."""
    _check_numbers(request, max(1, len(manifest.inputs.columns)))
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise SpecError(
            f"raw_input_contents: expected one for each of the {len(request.inputs)} inputs, got {len(raw)}"
        )
    inputs = [_input_tensor(tensor, raw[position] if raw else None) for position, tensor in enumerate(request.inputs)]
    return InferRequest(
        rows=decode_tensors(inputs, manifest.inputs),
        label_datatype=label_datatype(manifest.outputs),
        id=request.id or None,
        outputs=tuple(_output_name(output, manifest) for output in request.outputs),
    )


def encode_response(predictions: Predictions, request: InferRequest, model: str, version: str) -> Any:
    """A `ModelInferResponse` with its outputs raw, as the stock client expects them."""
    tensors = request.wanted(predictions)
    return message_class("ModelInferResponse")(
        model_name=model,
        model_version=version,
        id=request.id or "",
        outputs=[{"name": one.name, "datatype": one.datatype, "shape": one.shape} for one in tensors],
        raw_output_contents=[one.raw() for one in tensors],
    )


def _check_numbers(request: Any, most_inputs: int) -> None:
    """Refuse a message with more parts than any request for this model has."""
    for name, parts, most in (("inputs", request.inputs, most_inputs), ("outputs", request.outputs, MOST_OUTPUTS)):
        if len(parts) > most:
            raise SpecError(f"{name}: expected at most {most} tensors, got {len(parts)}")
        if any(len(part.parameters) > MOST_PARAMETERS for part in parts):
            raise SpecError(f"{name}: more than {MOST_PARAMETERS} parameters")


def _input_tensor(tensor: Any, raw: bytes | None) -> InputTensor:
    if any(parameter.key == SHARED_MEMORY for parameter in tensor.parameters):
        raise SpecError(f"{tensor.name}: shared memory is not supported, send the data in the request")
    data: Any = memoryview(raw) if raw is not None else _typed_contents(tensor)
    return InputTensor(tensor.name, tensor.datatype, list(tensor.shape), data)


def _typed_contents(tensor: Any) -> Any:
    field = TYPED_CONTENTS.get(tensor.datatype)
    if field is None:
        return memoryview(b"")  # FP16 has to come raw, and of the others the datatype is refused
    values = getattr(tensor.contents, field)
    if tensor.datatype not in DTYPES:
        return list(values)
    wide = DTYPES[{"int_contents": "INT32", "uint_contents": "UINT32"}.get(field, tensor.datatype)]
    return np.fromiter(values, wide, len(values))


def _output_name(output: Any, manifest: BundleManifest) -> str:
    for parameter in output.parameters:
        if parameter.key in (SHARED_MEMORY, "classification"):
            raise SpecError(f"outputs: {output.name}: '{parameter.key}' is not supported")
    return check_output_name(output.name, manifest)


async def _answered(method: str, grpc_context: Any, answer: Answering) -> Any:
    """The answer; or an empty one with the code and the words of what is wrong."""
    try:
        return await answer()
    except Refusal as refusal:
        code, message = CODES.get(refusal.status, grpc.StatusCode.UNKNOWN), refusal.message
    except SpecError as error:
        code, message = grpc.StatusCode.INVALID_ARGUMENT, "; ".join(error.faults)
    except Exception:
        _logger.exception("bigray: a gRPC request failed")
        code, message = grpc.StatusCode.INTERNAL, "internal error; the replica's log has the details"
    grpc_context.set_code(code)
    grpc_context.set_details(message[:LONGEST_DETAILS])
    return message_class(f"{method}Response")()


def _metadata(grpc_context: Any) -> dict[bytes, bytes]:
    """The call's headers as the guard takes them; their names are in lower case already."""
    return {
        name.encode(): value if isinstance(value, bytes) else value.encode()
        for name, value in grpc_context.invocation_metadata()
    }

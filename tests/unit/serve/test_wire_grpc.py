"""The stock gRPC client of the Open Inference Protocol, against a real server in this process."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np
import pytest

from bigray.bundle import BundleManifest, ModelBundle
from bigray.errors import SpecError
from bigray.inference import Predictions, Predictor
from bigray.serve.http import Refusal
from bigray.serve.wire.binary import DTYPES
from bigray.serve.wire.grpc_messages import FIELDS, message_class
from bigray.serve.wire.grpc_service import InferenceMethods, add_inference_service, decode_request

tritonclient = pytest.importorskip("tritonclient.grpc")
service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2")
model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")

ROWS = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
KEY = {"authorization": "Bearer good"}


@dataclass(frozen=True)
class Loaded:
    manifest: BundleManifest
    version: str
    predictor: Predictor
    backend: str = "torch"

    @property
    def name(self) -> str:
        return self.manifest.name

    def check_room(self) -> None:
        if self.backend == "full":
            raise Refusal(503, "overloaded")

    async def submit(self, rows: np.ndarray) -> Predictions:
        if rows.max() == 666:
            raise RuntimeError("secret detail")
        return self.predictor.run(rows)


class Backend:
    def __init__(self, bundles: Sequence[ModelBundle]) -> None:
        self._models = {one.manifest.name: Loaded(one.manifest, one.version, Predictor(one)) for one in bundles}
        self.sticky: list[str] = []

    def find(self, name: str | None, version: str | None = None, sticky: str = "") -> Loaded:
        self.sticky.append(sticky)
        model = self._models.get(name or "animals")
        if name == "busy":
            raise Refusal(503, "too much waits already")
        if name == "full":
            return replace(self._models["animals"], backend="full")
        if model is None or version not in (None, model.version):
            raise Refusal(404, f"model '{name}' is not served here")
        return model

    def authorize(self, metadata: Mapping[bytes, bytes], scope: str) -> None:
        presented = metadata.get(b"authorization", b"")
        if presented == b"Bearer weak" or scope != "predict":
            raise Refusal(403, "not allowed")
        if presented != b"Bearer good":
            raise Refusal(401, "no valid key")

    def names(self) -> tuple[str, ...]:
        return (*self._models, "busy")

    def is_loaded(self, name: str) -> bool:
        return name in self._models


class Service(InferenceMethods):
    def __init__(self, backend: Backend) -> None:
        self._grpc_backend = backend


@pytest.fixture(scope="module")
def backend(bundle: ModelBundle, regression_bundle: ModelBundle) -> Backend:
    return Backend([bundle, regression_bundle])


@pytest.fixture(scope="module")
def client(backend: Backend) -> Iterator[Any]:
    ports: list[int] = []
    started, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        server = grpc.aio.server()
        add_inference_service(Service(backend), server)
        ports.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        started.set()
        await asyncio.to_thread(stop.wait)
        await server.stop(None)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(10)
    with tritonclient.InferenceServerClient(f"127.0.0.1:{ports[0]}") as one:
        yield one
    stop.set()
    thread.join(10)


def tensor(array: np.ndarray, datatype: str = "FP32", name: str = "image") -> Any:
    one = tritonclient.InferInput(name, list(array.shape), datatype)
    one.set_data_from_numpy(array)
    return one


def failure(call: Any, *args: Any, **options: Any) -> tuple[str, str]:
    with pytest.raises(tritonclient.InferenceServerException) as caught:
        call(*args, **options)
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


def test_fields_are_those_of_the_public_protocol():
    others = {
        "Metadata": "ModelMetadataResponse.TensorMetadata",
        "Tensor": "ModelInferRequest.InferInputTensor",
        "Requested": "ModelInferRequest.InferRequestedOutputTensor",
        "Parameter": "ModelInferRequest.ParametersEntry",
        "Value": "InferParameter",
        "Contents": "InferTensorContents",
        "Config": "ModelConfig",
        "ConfigInput": "ModelInput",
        "ConfigOutput": "ModelOutput",
        "ModelIndex": "RepositoryIndexResponse.ModelIndex",
    }
    for name in FIELDS:
        place, *nested = others.get(name, name).split(".")
        theirs = getattr(service_pb2, place, None) or getattr(model_config_pb2, place)
        for part in nested:
            theirs = getattr(theirs, part)
        published = {field.name: field for field in theirs.DESCRIPTOR.fields}
        for field in message_class(name).DESCRIPTOR.fields:
            other = published[field.name]
            assert field.number == other.number, f"{name}.{field.name}"
            assert field.is_repeated == other.is_repeated, f"{name}.{field.name}"
            is_enum = other.type == other.TYPE_ENUM
            assert field.type == (field.TYPE_INT32 if is_enum else other.type), f"{name}.{field.name}"


def test_health_is_open_to_all(client, bundle):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("animals")
    assert client.is_model_ready("animals", bundle.version)
    assert not client.is_model_ready("plants")
    assert not client.is_model_ready("animals", "other")
    assert client.get_server_metadata().name == "bigray"


def test_metadata_names_the_tensors(client, bundle):
    metadata = client.get_model_metadata("animals", headers=KEY)
    assert (metadata.name, list(metadata.versions)) == ("animals", [bundle.version])
    assert [(one.name, one.datatype, list(one.shape)) for one in metadata.inputs] == [("image", "FP32", [-1, 2, 3])]
    assert [one.name for one in metadata.outputs] == ["label", "probabilities"]


def test_configuration_and_index(client, bundle):
    config = client.get_model_config("animals", headers=KEY).config
    assert (config.name, config.backend, config.max_batch_size) == ("animals", "torch", 0)
    assert config.input[0].data_type == model_config_pb2.TYPE_FP32
    assert [one.data_type for one in config.output] == [model_config_pb2.TYPE_STRING, model_config_pb2.TYPE_FP32]
    index = client.get_model_repository_index(headers=KEY)
    assert [(one.name, one.state) for one in index.models] == [
        ("animals", "READY"),
        ("area", "READY"),
        ("busy", "UNAVAILABLE"),
    ]
    assert index.models[0].version == bundle.version


def test_answers_are_those_of_the_model(client, bundle, predictor):
    result = client.infer("animals", [tensor(ROWS)], request_id="r1", headers=KEY)
    offline = predictor.run(ROWS)
    assert [one.decode() for one in result.as_numpy("label")] == offline.labels
    assert np.array_equal(result.as_numpy("probabilities"), offline.probabilities)
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("r1", "animals", bundle.version)


def test_only_the_outputs_asked_for_come(client):
    outputs = [tritonclient.InferRequestedOutput("probabilities")]
    result = client.infer("animals", [tensor(ROWS)], outputs=outputs, headers=KEY)
    assert [one.name for one in result.get_response().outputs] == ["probabilities"]
    assert len(result.get_response().raw_output_contents) == 1


@pytest.mark.parametrize(("datatype", "dtype"), [("FP16", "f2"), ("FP64", "f8"), ("INT8", "i1"), ("UINT64", "u8")])
def test_other_datatypes_are_taken(client, predictor, datatype, dtype):
    result = client.infer("animals", [tensor(ROWS.astype(dtype), datatype)], headers=KEY)
    assert np.array_equal(result.as_numpy("probabilities"), predictor.run(ROWS).probabilities)


def test_columns_are_taken_each_as_a_tensor(client, regression_bundle):
    columns = [
        tensor(np.array([[2], [4]], np.int16), "INT16", "height"),
        tensor(np.array([1, 3], np.float32), name="width"),
    ]
    expected = Predictor(regression_bundle).run(np.array([[1, 2], [3, 4]], np.float32)).values
    assert np.array_equal(client.infer("area", columns, headers=KEY).as_numpy("prediction"), expected)


def test_the_version_and_the_sticky_key_reach_the_store(client, backend, bundle):
    client.infer("animals", [tensor(ROWS)], model_version=bundle.version, headers=KEY | {"x-bigray-key": "me"})
    assert backend.sticky[-1] == "me"


def test_what_is_wrong_comes_as_a_code_and_in_words(client):
    infer = client.infer
    assert failure(infer, "animals", [tensor(ROWS)])[0] == "UNAUTHENTICATED"
    weak = {"authorization": "Bearer weak"}
    assert failure(infer, "animals", [tensor(ROWS)], headers=weak) == ("PERMISSION_DENIED", "not allowed")
    assert failure(infer, "plants", [tensor(ROWS)], headers=KEY)[0] == "NOT_FOUND"
    assert failure(infer, "animals", [tensor(ROWS)], model_version="x", headers=KEY)[0] == "NOT_FOUND"
    assert failure(infer, "busy", [tensor(ROWS)], headers=KEY) == ("UNAVAILABLE", "too much waits already")
    assert failure(infer, "full", [tensor(ROWS[:, :1])], headers=KEY) == ("UNAVAILABLE", "overloaded"), "not decoded"
    code, words = failure(infer, "animals", [tensor(ROWS[:, :1])], headers=KEY)
    assert code == "INVALID_ARGUMENT"
    assert "wrong shape" in words
    outputs = [tritonclient.InferRequestedOutput("label", class_count=2)]
    assert failure(infer, "animals", [tensor(ROWS)], outputs=outputs, headers=KEY)[0] == "INVALID_ARGUMENT"
    assert failure(client.get_model_metadata, "animals")[0] == "UNAUTHENTICATED"
    assert failure(client.get_model_repository_index)[0] == "UNAUTHENTICATED"


def test_an_internal_failure_tells_nothing_about_the_code(client):
    code, words = failure(client.infer, "animals", [tensor(np.full((1, 2, 3), 666, np.float32))], headers=KEY)
    assert code == "INTERNAL"
    assert "secret" not in words


def request_of(datatype: str, shape: Sequence[int] = (1, 2, 3), raw: Sequence[bytes] = (), **contents: Any) -> Any:
    one = {"name": "image", "datatype": datatype, "shape": shape, "contents": contents}
    return message_class("ModelInferRequest")(inputs=[one], raw_input_contents=raw)


@pytest.mark.parametrize(
    ("datatype", "field"),
    [
        ("INT8", "int_contents"),
        ("INT16", "int_contents"),
        ("INT32", "int_contents"),
        ("INT64", "int64_contents"),
        ("UINT8", "uint_contents"),
        ("UINT32", "uint_contents"),
        ("UINT64", "uint64_contents"),
        ("FP32", "fp32_contents"),
        ("FP64", "fp64_contents"),
    ],
)
def test_typed_contents_are_taken(bundle: ModelBundle, datatype, field):
    request = decode_request(request_of(datatype, **{field: [1, 2, 3, 4, 5, 6]}), bundle.manifest)
    assert request.rows.ravel().tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("request_", "fault"),
    [
        (request_of("FP32"), "data has shape"),
        (request_of("FP32", fp32_contents=[1] * 5), "data has shape"),
        (request_of("FP32", int_contents=[1] * 6), "data has shape"),
        (request_of("FP32", fp32_contents=[float("nan")] * 6), "NaN or infinite"),
        (request_of("INT8", int_contents=[300] * 6), "not within"),
        (request_of("FP16"), "0 bytes of data"),
        (request_of("BOOL", bool_contents=[True] * 6), "'BOOL' is not accepted"),
        (request_of("BYTES", bytes_contents=[b"a"] * 6), "'BYTES' is not accepted"),
        (request_of("FP32", shape=(-1, 2, 3), fp32_contents=[1] * 6), "wrong shape"),
        (request_of("FP32", raw=[bytes(20)]), "20 bytes of data"),
        (request_of("FP32", raw=[bytes(24)] * 2), "expected one for each"),
        (message_class("ModelInferRequest")(), "exactly one tensor"),
        (message_class("ModelInferRequest")(raw_input_contents=[b""]), "expected one for each"),
    ],
)
def test_a_message_that_does_not_fit_is_refused(bundle: ModelBundle, request_, fault):
    with pytest.raises(SpecError, match=fault):
        decode_request(request_, bundle.manifest)


def message(**parts: Any) -> Any:
    return message_class("ModelInferRequest")(**parts)


@pytest.mark.parametrize(
    ("request_", "fault"),
    [
        (message(inputs=[{}] * 3), "inputs: expected at most 1 tensors, got 3"),
        (message(inputs=[{"parameters": [{}] * 65}]), "inputs: more than 64 parameters"),
        (message(inputs=[{}], outputs=[{"name": "label"}] * 65), "outputs: expected at most 64 tensors, got 65"),
        (message(inputs=[{}], outputs=[{"parameters": [{}] * 65}]), "outputs: more than 64 parameters"),
    ],
)
def test_a_message_of_more_parts_than_any_request_has_is_refused_by_their_number(bundle: ModelBundle, request_, fault):
    with pytest.raises(SpecError, match=fault):
        decode_request(request_, bundle.manifest)


def test_raw_rows_can_be_handed_to_any_kernel(bundle: ModelBundle):
    raw = np.arange(6, dtype=DTYPES["FP32"]).tobytes()
    rows = decode_request(request_of("FP32", raw=[raw]), bundle.manifest).rows
    assert rows.flags.aligned
    assert rows.flags.writeable


def test_a_request_survives_the_way_through_serves_own_proxy():
    request = request_of("FP32", fp32_contents=[1, 2])
    assert pickle.loads(pickle.dumps(request)) == request

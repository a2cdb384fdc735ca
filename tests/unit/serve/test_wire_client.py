"""The stock HTTP client of the Open Inference Protocol, against a server made of the functions in `wire` alone."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest
import uvicorn

from bigray.bundle import ModelBundle
from bigray.errors import SpecError
from bigray.inference import Predictor
from bigray.serve.http import Answer, Refusal
from bigray.serve.wire import bodies, protocol

tritonclient = pytest.importorskip("tritonclient.http")
LIMIT = 1 << 20


class TinyServer:
    """One model over HTTP, without Ray."""

    def __init__(self, bundle: ModelBundle) -> None:
        self._bundle, self._predictor = bundle, Predictor(bundle)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            answer = self._answer(
                scope["path"], {name.decode(): value.decode() for name, value in scope["headers"]}, body
            )
        except Refusal as refusal:
            answer = Answer(orjson.dumps({"error": refusal.message}), status=refusal.status)
        except SpecError as error:
            answer = Answer(orjson.dumps({"error": str(error)}), status=400)
        length = (b"content-length", str(len(answer.body)).encode())
        headers = [(b"content-type", answer.content_type), length, *answer.headers]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})

    def _answer(self, path: str, headers: dict[str, str], body: bytes) -> Answer:
        manifest, version = self._bundle.manifest, self._bundle.version
        model = f"/v2/models/{manifest.name}"
        path = path.replace(f"/versions/{version}", "")
        documents: dict[str, Any] = {
            "/v2": protocol.describe_server(),
            "/v2/health/live": {"live": True},
            "/v2/health/ready": {"ready": True},
            "/v2/repository/index": [{"name": manifest.name, "version": version, "state": "READY"}],
            model: protocol.describe_model(manifest, [version], "torch"),
            f"{model}/ready": {"name": manifest.name, "ready": True},
            f"{model}/config": protocol.describe_config(manifest, "torch"),
        }
        if path in documents:
            return Answer(orjson.dumps(documents[path]))
        if path != f"{model}/infer":
            raise Refusal(404, "no such route")
        plain = bodies.decompress(body, headers.get("content-encoding", ""), LIMIT)
        length = protocol.header_length(headers.get("inference-header-content-length", ""))
        request = protocol.decode_infer(plain, manifest, length)
        return protocol.encode_infer(self._predictor.run(request.rows), request, manifest.name, version)


def serve(bundle: ModelBundle) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(TinyServer(bundle), lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def client(bundle: ModelBundle) -> Iterator[Any]:
    for address in serve(bundle):
        with tritonclient.InferenceServerClient(address) as one:
            yield one


@pytest.fixture(scope="module")
def regression_client(regression_bundle: ModelBundle) -> Iterator[Any]:
    for address in serve(regression_bundle):
        with tritonclient.InferenceServerClient(address) as one:
            yield one


def tensor(array: np.ndarray, datatype: str = "FP32", *, name: str = "image", binary: bool = True) -> Any:
    one = tritonclient.InferInput(name, list(array.shape), datatype)
    one.set_data_from_numpy(array, binary_data=binary)
    return one


ROWS = np.arange(12, dtype=np.float32).reshape(2, 2, 3)


def test_health_and_metadata(client, bundle):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("animals")
    assert client.is_model_ready("animals", bundle.version)
    assert not client.is_model_ready("plants")
    assert client.get_server_metadata()["name"] == "bigray"
    assert client.get_model_metadata("animals")["versions"] == [bundle.version]
    assert client.get_model_config("animals", bundle.version)["input"][0]["dims"] == [-1, 2, 3]
    assert [model["name"] for model in client.get_model_repository_index()] == ["animals"]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_answers_are_those_of_the_model_in_each_form(client, predictor, binary_in, binary_out):
    outputs = None
    if binary_out is not None:
        names = ("label", "probabilities")
        outputs = [tritonclient.InferRequestedOutput(name, binary_data=binary_out) for name in names]
    result = client.infer("animals", [tensor(ROWS, binary=binary_in)], outputs=outputs, request_id="r1")
    offline = predictor.run(ROWS)
    labels = [one.decode() if isinstance(one, bytes) else one for one in result.as_numpy("label").tolist()]
    assert labels == offline.labels
    assert np.array_equal(result.as_numpy("probabilities"), offline.probabilities)
    assert result.get_response()["id"] == "r1"


@pytest.mark.parametrize(
    ("datatype", "dtype"), [("FP16", "f2"), ("FP64", "f8"), ("INT8", "i1"), ("UINT64", "u8"), ("INT32", "i4")]
)
@pytest.mark.parametrize("binary", [True, False])
def test_other_datatypes_are_taken(client, predictor, datatype, dtype, binary):
    result = client.infer("animals", [tensor(ROWS.astype(dtype), datatype, binary=binary)])
    assert np.array_equal(result.as_numpy("probabilities"), predictor.run(ROWS).probabilities)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests_are_taken(client, predictor, algorithm):
    result = client.infer(
        "animals",
        [tensor(ROWS)],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert np.array_equal(result.as_numpy("probabilities"), predictor.run(ROWS).probabilities)


def test_a_refusal_reaches_the_caller_in_words(client):
    with pytest.raises(Exception, match="wrong shape"):
        client.infer("animals", [tensor(ROWS[:, :1])])
    with pytest.raises(Exception, match="BOOL"):
        client.infer("animals", [tensor(ROWS > 2, "BOOL")])
    zeros = np.zeros((LIMIT // 16, 2, 3), np.float32)
    with pytest.raises(Exception, match="decompressed"):
        client.infer("animals", [tensor(zeros)], request_compression_algorithm="gzip")


def test_columns_are_taken_each_as_a_tensor(regression_client, regression_bundle):
    width, height = np.array([1, 3], np.float32), np.array([[2], [4]], np.int16)
    columns = [tensor(height, "INT16", name="height"), tensor(width, name="width")]
    together = tensor(np.array([[1, 2], [3, 4]], np.float32), name="features")
    expected = Predictor(regression_bundle).run(np.array([[1, 2], [3, 4]], np.float32)).values
    for inputs in (columns, [together]):
        assert np.array_equal(regression_client.infer("area", inputs).as_numpy("prediction"), expected)

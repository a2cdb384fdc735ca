"""A real endpoint on an embedded Ray: one cluster and, for most tests, one deployment."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pytest
import yaml

from bigray.bundle import ModelBundle
from bigray.cluster.connect import Connection, connect
from bigray.data.features import Column
from bigray.errors import CorruptFile, DeployError, StorageError
from bigray.inference import Predictor
from bigray.serve import runner
from bigray.serve.client import Client, fetch_json, predict_file, predict_table
from bigray.serve.config import GrpcSection, ServeSpec, load_serve
from bigray.serve.ingress import free_port, haproxy_folder
from bigray.serve.sample import write_sample_bundle
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(300)
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_sample_bundle(
        str(tmp_path_factory.mktemp("bundles")),
        name="animals",
        columns=(Column(name="image", shape=(4, 5)),),
        class_names=("cat", "dog", "fox"),
        params={"hidden": [16]},
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Connection]:
    with connect() as connection:
        yield connection
        runner.shutdown()


@pytest.fixture(scope="module")
def grpc_port() -> int:
    return free_port(0)


@pytest.fixture(scope="module")
def endpoint(cluster: Connection, bundle: str, grpc_port: int) -> runner.Deployment:
    spec = load_serve("serve/local.yaml").with_port(0)
    return runner.deploy(bundle, spec.model_copy(update={"grpc_options": GrpcSection(port=grpc_port)}), is_open=True)


@pytest.fixture(scope="module")
def table() -> pa.Table:
    images = np.random.default_rng(3).normal(size=(300, 4, 5)).astype(np.float32)
    return pa.table({"image": pa.FixedShapeTensorArray.from_numpy_ndarray(images)})


def make_spec(tmp_path: Path, name: str, **deployment: object) -> ServeSpec:
    """A serve file with another application beside the shared one, on the same port."""
    options = {"name": "Model", "ray_actor_options": {"num_cpus": 0.2}} | deployment
    application = {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": "bigray.serve.app:build",
        "args": {"bundle": "replaced", "open": True},  # the shared Serve listens for gRPC, on all interfaces
        "deployments": [options],
    }
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"http_options": {"port": 0}, "applications": [application]}))
    return load_serve(file)


def post(url: str, body: bytes, path: str = "/predict") -> tuple[int, dict]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        connection.request("POST", urlsplit(url).path + path, body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def good_body() -> bytes:
    return json.dumps({"records": [{"image": np.ones((4, 5)).tolist()}]}).encode()


def test_it_is_reported_as_running(endpoint, bundle):
    (row,) = runner.status()
    assert (row.name, row.url, row.state) == (endpoint.name, endpoint.url, "RUNNING")
    assert (row.replicas_running, row.replicas_target, row.bundle, row.message) == (1, 1, bundle, "")


def test_every_route_answers(endpoint):
    index = fetch_json(f"{endpoint.url}/")
    assert (index["name"], index["version"]) == ("animals", endpoint.version)
    gets = [route.removeprefix("GET ") for route in index["routes"] if route.startswith("GET ")]
    assert {"/v2/health/ready", "/v2/models/animals", "/openapi.json", "/card", "/stats", "/metrics"} <= set(gets)
    with Client(endpoint.url) as client:
        assert all(client.send("GET", path).body for path in gets)


def test_its_answers_equal_the_offline_ones(endpoint, bundle, table):
    loaded = ModelBundle.load(bundle)
    offline = Predictor(loaded).run_table(table)
    online = predict_table(endpoint.url, table, loaded.manifest.inputs)
    assert online.labels == offline.labels
    assert np.allclose(online.probabilities, offline.probabilities, atol=1e-6)


def test_answers_under_concurrency_belong_to_their_requests(endpoint, bundle, table):
    offline = Predictor(ModelBundle.load(bundle)).run_table(table).probabilities
    images = table.column("image").combine_chunks().to_numpy_ndarray()
    differences: list[float] = []

    def ask(rows: range) -> None:
        with Client(endpoint.url) as connection:
            for row in rows:
                (answer,) = connection.predict([{"image": images[row]}])
                differences.append(float(np.abs(np.array(answer["probabilities"]) - offline[row]).max()))

    threads = [threading.Thread(target=ask, args=(range(start, 300, 8),)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(differences) == 300
    assert max(differences) < 1e-6


def test_the_open_inference_protocol_answers_the_same(endpoint, bundle, table):
    images = table.column("image").combine_chunks().to_numpy_ndarray()[:7]
    tensor = {"name": "image", "datatype": "FP32", "shape": [7, 4, 5], "data": images.reshape(-1).tolist()}
    status, document = post(endpoint.url, json.dumps({"inputs": [tensor]}).encode(), "/v2/models/animals/infer")
    outputs = {output["name"]: output for output in document["outputs"]}
    offline = Predictor(ModelBundle.load(bundle)).run(images)
    assert status == 200
    assert outputs["label"]["data"] == offline.labels
    assert np.allclose(outputs["probabilities"]["data"], offline.probabilities.reshape(-1), atol=1e-6)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"not json", 400),
        (b"", 400),
        (b'{"records": []}', 400),
        (b'{"records": [{"image": [1, 2, 3]}]}', 400),
        (b'{"records": [{"image": "x"}]}', 400),
        (b'{"records": [{"image": [[NaN, 0, 0, 0, 0]]}]}', 400),
        (b'{"records": [{"picture": 1}]}', 400),
        (b" " * 10 * 2**20, 413),
    ],
    ids=["not JSON", "empty", "zero rows", "shape", "type", "NaN", "column", "10 MB"],
)
def test_a_bad_body_is_refused_and_the_next_request_served(endpoint, body, status):
    answered, document = post(endpoint.url, body)
    assert (answered, list(document)) == (status, ["error"])
    assert post(endpoint.url, good_body())[0] == 200


def test_the_stock_triton_client_asks_over_http(endpoint, bundle, table):
    tritonclient = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
    images = table.column("image").combine_chunks().to_numpy_ndarray()[:5]
    client = tritonclient.InferenceServerClient(urlsplit(endpoint.url).netloc)
    tensor = tritonclient.InferInput("image", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    outputs = [tritonclient.InferRequestedOutput("probabilities"), tritonclient.InferRequestedOutput("label")]
    answer = client.infer("animals", [tensor], outputs=outputs)
    offline = Predictor(ModelBundle.load(bundle)).run(images)
    assert client.is_server_ready() and client.is_model_ready("animals", endpoint.version)
    assert client.get_model_metadata("animals")["versions"] == [endpoint.version]
    assert np.allclose(answer.as_numpy("probabilities"), offline.probabilities, atol=1e-6)
    assert [label.decode() for label in answer.as_numpy("label")] == offline.labels
    assert answer.get_response()["model_version"] == endpoint.version


def test_the_stock_triton_client_asks_over_grpc(endpoint, bundle, table, grpc_port):
    tritonclient = pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
    images = table.column("image").combine_chunks().to_numpy_ndarray()[:5]
    client = tritonclient.InferenceServerClient(f"127.0.0.1:{grpc_port}")
    tensor = tritonclient.InferInput("image", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    answer = client.infer("animals", [tensor])
    offline = Predictor(ModelBundle.load(bundle)).run(images)
    assert client.is_server_live() and client.is_model_ready("animals")
    assert np.allclose(answer.as_numpy("probabilities"), offline.probabilities, atol=1e-6)
    wrong = tritonclient.InferInput("image", [5, 5, 4], "FP32")
    wrong.set_data_from_numpy(images.reshape(5, 5, 4))
    with pytest.raises(Exception, match=r"INVALID_ARGUMENT.*wrong shape"):
        client.infer("animals", [wrong])


def test_a_file_can_be_sent(endpoint, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"image": np.ones((4, 5)).tolist()}] * 3))
    assert len(predict_file(endpoint.url, file)) == 3
    assert len(predict_file(endpoint.url, file, limit=2)) == 2


def test_a_refusal_reaches_the_caller_of_the_client_in_one_line(endpoint):
    with (
        Client(endpoint.url) as connection,
        pytest.raises(DeployError, match="400: records: expected a list") as e,
    ):
        connection.predict([])
    assert "\n" not in str(e.value)


def test_a_corrupt_bundle_is_refused_with_file_and_hashes(cluster, endpoint, bundle, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle, damaged)
    weights = damaged / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CorruptFile) as caught:
        runner.deploy(str(damaged), make_spec(tmp_path, "damaged"))
    assert caught.value.path.endswith("weights.safetensors")
    assert caught.value.expected in str(caught.value)
    assert caught.value.actual in str(caught.value)
    assert [row.name for row in runner.status()] == [endpoint.name]


def test_a_missing_bundle_is_refused(cluster, tmp_path):
    with pytest.raises(StorageError, match="no bundle here"):
        runner.deploy(str(tmp_path / "nothing"), make_spec(tmp_path, "nothing"))


def test_a_factory_that_is_not_allowed_does_not_run(cluster, tmp_path):
    location = write_sample_bundle(str(tmp_path), params={"hidden": [4]}, onnx=False)
    spec = make_spec(tmp_path, "strict")
    (application,) = spec.applications
    args = application.args.model_copy(update={"allow_factories": ()})
    spec = spec.model_copy(update={"applications": (application.model_copy(update={"args": args}),)})
    with pytest.raises(DeployError, match="not allowed"):
        runner.deploy(location, spec)


def test_another_port_than_the_running_one_is_refused(endpoint, bundle):
    with pytest.raises(DeployError, match="already listens on"):
        runner.deploy(bundle, load_serve("serve/local.yaml").with_port(8199))


def test_a_second_application_leaves_the_first_and_can_be_deleted(endpoint, bundle, tmp_path):
    second = runner.deploy(bundle, make_spec(tmp_path, "second"))
    assert second.url == f"{endpoint.url}/second"
    assert post(second.url, good_body())[0] == post(endpoint.url, good_body())[0] == 200
    runner.delete("second")
    assert [row.name for row in runner.status()] == [endpoint.name]
    assert post(endpoint.url, good_body())[0] == 200
    with pytest.raises(DeployError, match=f"no application named 'second'; there are: {endpoint.name}"):
        runner.delete("second")


def test_replicas_follow_the_load_up_and_down(endpoint, bundle, tmp_path):
    shipped = load_serve("serve/autoscale.yaml").deployment.autoscaling_config.model_dump(exclude_unset=True)
    shipped["policy"]["policy_kwargs"]["scale_down_after_s"] = 3
    scaled = runner.deploy(bundle, make_spec(tmp_path, "scaled", autoscaling_config=shipped))
    stop = threading.Event()
    failures: list[object] = []

    # Written once: 24 threads that each write their JSON again keep this process busier than the replica.
    body = json.dumps({"records": [{"image": np.ones((4, 5)).tolist()}] * 200}).encode()

    def load() -> None:
        with Client(scaled.url) as connection:
            while not stop.is_set():
                try:
                    connection.request("POST", "/predict", body)
                except DeployError as error:
                    failures.append(error)

    def replicas() -> int:
        return next(row.replicas_running for row in runner.status() if row.name == "scaled")

    assert replicas() == 1
    threads = [threading.Thread(target=load) for _ in range(24)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: replicas() == 2, timeout_s=PATIENCE_S)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    wait_until(lambda: replicas() == 1, timeout_s=PATIENCE_S)
    assert failures == []
    runner.delete("scaled")


def test_rays_own_tool_serves_the_written_file(cluster, endpoint, bundle, tmp_path):
    port = urlsplit(endpoint.url).port
    document = runner.resolved_config(bundle, load_serve("serve/local.yaml").with_port(port))
    document["applications"][0]["name"] = "native"
    document["applications"][0]["args"]["open"] = True
    file = tmp_path / "written.yaml"
    file.write_text(yaml.safe_dump(document))
    tool = [sys.executable, "-m", "ray.serve.scripts", "run", "--non-blocking", "--address", cluster.address, str(file)]
    subprocess.run(tool, check=True, capture_output=True, timeout=120)
    wait_until(
        lambda: [(row.name, row.state) for row in runner.status()] == [("native", "RUNNING")], timeout_s=PATIENCE_S
    )
    wait_until(lambda: post(endpoint.url, good_body())[0] == 200, timeout_s=PATIENCE_S)


def test_nothing_remains_after_the_last_delete(cluster, endpoint):
    folder = haproxy_folder(urlsplit(endpoint.url).port)
    for row in runner.status():
        runner.delete(row.name)
    assert runner.status() == ()
    assert not folder.exists()
    wait_until(lambda: "haproxy" not in process_names(), timeout_s=PATIENCE_S)
    with pytest.raises(DeployError, match="no answer"):
        fetch_json(f"{endpoint.url}/")
    with pytest.raises(DeployError, match="nothing is served"):
        runner.delete("native")


def process_names() -> set[str]:
    """Names of this process's descendants."""
    parents, names = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (entry / "stat").read_text().partition(") ")
        except OSError:
            continue
        parents[int(entry.name)] = int(rest.split()[1])
        names[int(entry.name)] = name.partition("(")[2]

    def descends(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return {names[pid] for pid in parents if descends(pid)}

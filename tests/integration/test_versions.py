"""Versions of a live endpoint on a real Ray: swap, canary, shadow, rollback, what is refused, what a kill leaves."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from bigray.bundle import ModelBundle
from bigray.cluster.connect import Connection, connect
from bigray.data.features import Column
from bigray.errors import DeployError
from bigray.inference import Predictor
from bigray.serve import runner
from bigray.serve.client import Client
from bigray.serve.config import ServeSpec, load_serve
from bigray.serve.protect.keys import create_key, revoke_key
from bigray.serve.release.judge import JudgeLimits
from bigray.serve.release.record import ChannelState
from bigray.serve.rollout import Mode
from bigray.serve.sample import write_sample_bundle
from bigray.serve.steward import SILENT_S
from tests.full_size import full_size
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(300)
PATIENCE_S = 60.0

IMAGE = np.linspace(-1, 1, 20, dtype=np.float32).reshape(4, 5)
ANY_ANSWERS = JudgeLimits(min_requests=30, max_disagreement=1.0, max_latency_ratio=1_000)


def write_version(folder: Path, seed: int, name: str = "animals") -> str:
    return write_sample_bundle(
        str(folder / f"{name}-{seed}"),
        name=name,
        columns=(Column(name="image", shape=(4, 5)),),
        class_names=("cat", "dog", "fox"),
        params={"hidden": [16]},
        seed=seed,
        onnx=False,
    )


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("bundles")
    return write_version(folder, 0), write_version(folder, 1)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("keys") / "keys.json")


@pytest.fixture(scope="module")
def key(key_file: str) -> str:
    return create_key(key_file, "test")


@pytest.fixture(scope="module")
def spec(bundles: tuple[str, str], key_file: str, key: str, tmp_path_factory: pytest.TempPathFactory) -> ServeSpec:
    """One replica behind a key, with a further model."""
    other = write_version(tmp_path_factory.mktemp("other"), 7, name="others")
    spec = load_serve("serve/local.yaml").with_port(0)
    return spec.with_args(keys=key_file, models=({"name": "others", "bundle": other},))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Connection]:
    with connect() as connection:
        yield connection
        runner.shutdown()


@pytest.fixture(scope="module")
def endpoint(cluster: Connection, bundles: tuple[str, str], spec: ServeSpec) -> runner.Deployment:
    return runner.deploy(bundles[0], spec)


class Traffic:
    """Clients that ask all the time, none of which asks twice; keeps what was answered and checks each answer."""

    def __init__(self, url: str, key: str, bundles: tuple[str, ...]) -> None:
        self.versions: Counter[str] = Counter()
        self.faults: list[str] = []
        self._url, self._key = url, key
        loaded = [ModelBundle.load(bundle) for bundle in bundles]
        self._expected = {one.version: Predictor(one).run(IMAGE[None]).probabilities[0] for one in loaded}
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(4)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        body = json.dumps({"records": [{"image": IMAGE.tolist()}]}).encode()
        with Client(self._url, key=self._key, retries=0) as client:
            while not self._stopped.is_set():
                try:
                    answer = client.send("POST", "/predict", body, {"x-bigray-key": f"{number}-{time.monotonic()}"})
                except DeployError as error:
                    self.faults.append(str(error))
                    continue
                self._check(json.loads(answer.body), answer.version)
                time.sleep(0.005)

    def _check(self, document: dict, version: str) -> None:
        self.versions[version] += 1
        probabilities = np.array(document["predictions"][0]["probabilities"])
        if document["version"] != version or np.abs(probabilities - self._expected[version]).max() > 1e-5:
            self.faults.append(f"an answer of {document['version']} under the name {version}")


@contextmanager
def traffic(endpoint: runner.Deployment, key: str, bundles: tuple[str, ...]) -> Iterator[Traffic]:
    with Traffic(endpoint.url, key, bundles) as asked:
        yield asked
    assert asked.faults == []


def version_of(bundle: str) -> str:
    return ModelBundle.load(bundle).version


def state_of(endpoint: runner.Deployment) -> ChannelState:
    return runner.versions(endpoint.name)[0]


def test_a_swap_of_the_only_replica_drops_no_request_and_mixes_no_answer(endpoint, bundles, spec, key):
    with traffic(endpoint, key, bundles) as asked:
        wait_until(lambda: asked.versions[version_of(bundles[0])] > 20, timeout_s=PATIENCE_S)
        second = runner.deploy(bundles[1], spec, force=True)
        wait_until(lambda: asked.versions[version_of(bundles[1])] > 20, timeout_s=PATIENCE_S)
    assert second.version == version_of(bundles[1])
    assert state_of(endpoint).live.bundle == bundles[1]


def test_a_rollback_returns_to_the_version_before(endpoint, bundles, key):
    before = state_of(endpoint)
    with traffic(endpoint, key, bundles) as asked:
        after = runner.rollback(endpoint.name)
        wait_until(lambda: asked.versions[after.live.version] > 20, timeout_s=PATIENCE_S)
    assert (after.live, after.previous) == (before.previous, before.live)


def test_a_canary_is_promoted_by_what_is_seen(endpoint, bundles, spec, key):
    live = state_of(endpoint).live.bundle
    (candidate,) = set(bundles) - {live}
    with traffic(endpoint, key, bundles) as asked:
        deployed = runner.deploy(candidate, spec, force=True, mode=Mode("canary", 0.3, ANY_ANSWERS))
    assert deployed.version == version_of(candidate)
    assert asked.versions[version_of(live)] > asked.versions[version_of(candidate)] * 0.5
    entry = state_of(endpoint).history[-1]
    assert (entry.action, entry.version) == ("promoted", version_of(candidate))
    assert "requests" in entry.why


def test_a_canary_that_answers_otherwise_is_rolled_back(endpoint, bundles, spec, key):
    live = state_of(endpoint).live
    (candidate,) = set(bundles) - {live.bundle}
    limits = JudgeLimits(min_requests=500, max_disagreement=0.05)
    with traffic(endpoint, key, bundles), pytest.raises(DeployError, match=r"compared rows.*rolled back") as caught:
        runner.deploy(candidate, spec, force=True, mode=Mode("canary", 0.5, limits))
    assert caught.value.exit_code == 6
    state = state_of(endpoint)
    assert (state.live, state.rollout, state.history[-1].action) == (live, None, "rolled back")


def test_a_shadow_answers_nobody(endpoint, bundles, spec, key):
    live = state_of(endpoint).live
    (candidate,) = set(bundles) - {live.bundle}
    with traffic(endpoint, key, bundles) as asked:
        deployed = runner.deploy(candidate, spec, force=True, mode=Mode("shadow", 0.0, ANY_ANSWERS))
    assert deployed.version == live.version
    assert set(asked.versions) == {live.version}
    assert state_of(endpoint).history[-1].action == "compared"


def test_a_version_that_is_worse_is_refused_while_the_live_one_goes_on(endpoint, bundles, spec, key):
    live = state_of(endpoint).live
    (candidate,) = set(bundles) - {live.bundle}
    other = write_version(Path(candidate).parent / "other-schema", 3)
    manifest = Path(other) / "manifest.json"
    document = json.loads(manifest.read_text())
    document["outputs"]["class_names"] = ["a", "b", "c"]
    manifest.write_text(json.dumps(document))
    with traffic(endpoint, key, bundles), pytest.raises(DeployError, match="--force"):
        runner.deploy(other, spec)
    assert state_of(endpoint).live == live


@full_size
def test_a_version_in_replicas_of_its_own_takes_over_without_a_dropped_request(endpoint, bundles, spec, key):
    before = state_of(endpoint)
    (candidate,) = set(bundles) - {before.live.bundle}
    with traffic(endpoint, key, bundles) as asked:
        deployed = runner.deploy(candidate, spec.with_args(swap="surge"), force=True)
        wait_until(lambda: asked.versions[deployed.version] > 20, timeout_s=PATIENCE_S)
    state, reports = runner.versions(endpoint.name)
    assert (state.live.bundle, state.previous, state.replaced) == (candidate, None, before.live)
    assert [entry.version for entry in state.history[: len(before.history)]] == [e.version for e in before.history]
    assert {report.loaded for report in reports} == {(deployed.version,)}
    with traffic(endpoint, key, bundles):
        after = runner.rollback(endpoint.name)
    assert (after.live, after.replaced) == (before.live, state.live)
    runner.deploy(candidate, spec, force=True)  # in place again, with a version to go back to


def test_a_killed_replica_comes_back_with_the_live_version(endpoint, bundles, key):
    live = runner.rollback(endpoint.name).live  # so that at one of the two it is not the one Serve was given
    state, (report,) = runner.versions(endpoint.name)
    os.kill(report.pid, signal.SIGKILL)
    with Client(endpoint.url, key=key, retries=100) as client:
        wait_until(
            lambda: any(one.pid != report.pid for one in runner.versions(endpoint.name)[1]), timeout_s=PATIENCE_S
        )
        answer = client.send("POST", "/predict", json.dumps({"records": [{"image": IMAGE.tolist()}]}).encode())
    assert answer.version == live.version
    assert runner.versions(endpoint.name)[0].live == state.live


def test_a_replica_that_is_reached_directly_asks_for_the_key_too(endpoint, key):
    _, (report,) = runner.versions(endpoint.name)
    ports = [port for port in listening_ports(report.pid) if answers_http(port)]
    assert ports, "the replica serves HTTP itself"
    for url in (endpoint.url, *(f"http://127.0.0.1:{port}" for port in ports)):
        with Client(url) as stranger, pytest.raises(DeployError, match="401: no valid key"):
            stranger.predict([{"image": IMAGE.tolist()}])
        with Client(url, key=key) as friend:
            assert friend.predict([{"image": IMAGE.tolist()}])[0]["label"] in ("cat", "dog", "fox")


def test_a_further_model_is_loaded_when_it_is_asked(endpoint, key):
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 4, 5], "data": IMAGE.reshape(-1).tolist()}
    with Client(endpoint.url, key=key, retries=0) as client:
        assert (
            client.request("POST", "/v2/models/others/infer", json.dumps({"inputs": [tensor]}).encode())["model_name"]
            == "others"
        )
        assert client.request("GET", "/v2/models/others/ready")["ready"] is True
        with pytest.raises(DeployError, match="404"):
            client.request("GET", "/v2/models/strangers/ready")


def test_the_numbers_of_the_endpoint_are_those_of_its_replicas_and_soon_of_no_killed_one(endpoint, key):
    with Client(endpoint.url, key=key) as client:
        wait_until(lambda: len(client.stats()["replicas"]) == 1, timeout_s=SILENT_S + 5)
        stats = client.stats()
        metrics = client.send("GET", "/metrics").body.decode()
    assert [replica["live"] for replica in stats["replicas"]] == [state_of(endpoint).live.version]
    assert stats["total"]["requests"] > 0
    assert f'bigray_requests_total{{replica="{stats["replicas"][0]["id"]}"' in metrics


def test_a_revoked_key_is_refused_within_seconds(endpoint, key_file):
    secret = create_key(key_file, "short-lived")

    def status() -> int:
        connection = http.client.HTTPConnection(urlsplit(endpoint.url).netloc)
        connection.request("GET", "/card", headers={"x-api-key": secret})
        return connection.getresponse().status

    wait_until(lambda: status() == 200, timeout_s=15)
    revoke_key(key_file, "short-lived")
    wait_until(lambda: status() == 401, timeout_s=15)


def listening_ports(pid: int) -> list[int]:
    """TCP ports on which a process listens, out of /proc."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(link) if link.is_symlink() else ""
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    ports = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                ports.append(int(fields[1].rpartition(":")[2], 16))
    return ports


def answers_http(port: int) -> bool:
    try:
        with Client(f"http://127.0.0.1:{port}", retries=0, timeout_s=3) as client:
            client.send("GET", "/v2/health/live")
    except DeployError:
        return False
    return True
